"""Builds the CPU kernels: one extension module for each instruction set, from the same sources.

Each is optional: where no C++ compiler is at hand the install succeeds without it, and the worker serves on the
reference kernels and says so. QWIRE_NATIVE=0 leaves them out, for installs that only want the client.
"""

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

NATIVE = Path("worker/kernels/cpu/native")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
VNNI = [*AVX512, "-mavx512vnni"]
INSTRUCTION_SETS = {
    "avx512_amx": [*VNNI, "-mamx-tile", "-mamx-int8"],
    "avx512_vnni": VNNI,
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": [],
}
"""Name (as in worker.kernels.names) and compiler flags. Modules share no symbols, so that none can be entered on a
machine that lacks its instructions."""


def extensions() -> list[Pybind11Extension]:
    if os.environ.get("QWIRE_NATIVE") == "0":
        return []
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [
        Pybind11Extension(
            f"worker.kernels.cpu._{name}",
            sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            extra_compile_args=[
                "-O3",
                "-g0",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wno-psabi",
                "-pthread",
                *flags,
            ],
            extra_link_args=["-pthread"],
            define_macros=[("QWIRE_MODULE", f"_{name}")],
            cxx_std=20,
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
        if x86 or not flags
    ]


ParallelCompile("NPY_NUM_BUILD_JOBS", default=0).install()
setup(ext_modules=extensions(), cmdclass={"build_ext": build_ext})
