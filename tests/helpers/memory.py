"""What lies in memory, and in what pages."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

_libc = ctypes.CDLL(None, use_errno=True)


def missing(tensor: Tensor) -> int:
    """Pages of a CPU's tensor that nothing has given memory yet."""
    first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - first
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    if _libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(size), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(not page & 1 for page in pages)


def offers_large_pages() -> bool:
    """Whether the system gives large pages to memory that asks for them."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


def bytes_in_large_pages() -> int:
    """Of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))
