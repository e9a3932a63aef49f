"""Compiles every Triton kernel as it ships, for every architecture, and records what each takes. No GPU is needed.

The launch functions themselves say what is compiled: they run on tensors without memory, and in place of a start, each
kernel's arguments are taken down and compiled as Triton would compile them on that GPU. `python -m
scripts.triton_kernels` writes `docs/kernels.md`; with `--check ARCH`, the kernels of bfloat16 and of logits go to
standard output instead, one a line, as JSON.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from worker.kernels import KVCache
from worker.kernels.cuda import triton as kernels
from worker.kernels.cuda.triton import configs

PAGE = Path("docs/kernels.md")
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}
_OPTIONS = ("num_warps", "num_stages")
_INT32 = 2**31


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel as one call starts it."""

    kernel: str
    case: str
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    """Arguments that Triton takes to be multiples of 16."""
    options: dict[str, int]


@dataclass(frozen=True, slots=True)
class Made:
    """What ptxas says of a kernel."""

    kernel: str
    case: str
    arch: int
    warps: int
    registers: int
    shared: int
    """Bytes a block."""
    spilled: int
    """Bytes stored to and loaded from local memory because registers ran out, by one thread."""


def _take_down(fn: JITFunction[Any], case: str, args: tuple[Any, ...], given: dict[str, Any]) -> Case:
    """A start's arguments as `JITFunction.run` specializes them."""
    options = {name: given.pop(name) for name in _OPTIONS}
    values = dict(zip(fn.arg_names, args, strict=False)) | given
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned: list[str] = []
    for parameter in fn.params:
        name, value = parameter.name, values[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or (type(value) is int and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            aligned.append(name)
        elif isinstance(value, int):
            signature[name] = "i32" if -_INT32 <= value < _INT32 else "i64"
            if value % 16 == 0 and not free:
                aligned.append(name)
        else:
            signature[name] = "fp32"
    return Case(f"{fn.__module__}:{fn.__name__}", case, signature, constants, tuple(aligned), options)


def cases(arch: int) -> list[Case]:
    """Every kernel that ships for an architecture, each way of being called once."""
    found: dict[str, Case] = {}
    calls = _calls()
    case, call = next(calls, ("", None))

    def run(fn: JITFunction[Any], *args: Any, grid: object, warmup: bool, **given: Any) -> None:
        taken = _take_down(fn, case, args, given)
        found.setdefault(repr((taken.kernel, taken.signature, taken.constants, taken.options)), taken)

    def pick(device: torch.device) -> int:
        return arch

    modules = ("attention", "experts", "linear", "logits", "rope", "rows", "sampling")
    patches = [mock.patch(f"worker.kernels.cuda.triton.{module}.architecture", pick) for module in modules]
    with mock.patch.object(JITFunction, "run", run):
        for patch in patches:
            patch.start()
        try:
            while call is not None:
                call()
                case, call = next(calls, ("", None))
        finally:
            for patch in patches:
                patch.stop()
    return list(found.values())


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Calls of the launch functions at the sizes of Qwen3's models, and what distinguishes each."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from _dense_calls(dtype, str(dtype).removeprefix("torch."))
    for coding in (torch.int8, torch.float8_e4m3fn):
        yield from _attention_calls(torch.bfloat16, 128, 4, coding)
    yield from _logit_calls()


def _dense_calls(dtype: torch.dtype, name: str) -> Iterator[tuple[str, Callable[[], object]]]:
    def empty(*shape: int) -> Tensor:
        return _empty(*shape, dtype=dtype)

    for width in (1024, 8192):
        x = empty(32, width)
        for residual in (None, empty(32, width)):
            yield f"{name}, {width}", partial(kernels.rms_norm, x, empty(width), 1e-6, residual)
    yield name, lambda: kernels.silu_mul(empty(32, 6144), empty(32, 3072))
    for head_dim, group in ((128, 2), (128, 4), (128, 8), (64, 7)):
        yield from _attention_calls(dtype, head_dim, group, dtype)
    forms: dict[str, Tensor | kernels.Codes] = {"": empty(4096, 4096)}
    if dtype != torch.float32:
        scale, q = empty(4096, 32), _empty(4096, 2048, dtype=torch.uint8)
        forms |= {
            "int8, ": kernels.Codes(_empty(4096, 4096, dtype=torch.int8), scale, None, 128),
            "int4, ": kernels.Codes(q, empty(4096, 128), _empty(4096, 128, dtype=torch.uint8), 32, 4.5, 0.375),
            "AWQ or GPTQ, ": kernels.Codes(q, scale, _empty(4096, 32, dtype=torch.uint8), 128),
        }
    for form, weight in forms.items():
        for rows, fixed in ((1, False), (64, False), (512, False), (32, True)):
            how = f"{name}, {form}{'fixed' if fixed else f'{rows} rows'}"
            yield how, partial(kernels.linear, empty(rows, 4096), weight, None, fixed=fixed)
    for rows in (8, 2048):
        plan = kernels.ExpertPlan(_empty(rows * 8, dtype=torch.int32), _empty(129, dtype=torch.int32))
        up, down = empty(128, 768, 2048), empty(128, 2048, 768)
        slots, shares = empty(rows * 8, 768), _empty(rows * 8, dtype=torch.float32)
        yield (
            f"{name}, up, {rows} rows",
            partial(kernels.expert_linear, empty(rows, 2048), up, plan, None, slots),
        )
        yield (
            f"{name}, down, {rows} rows",
            partial(kernels.expert_linear, slots, down, plan, shares, empty(rows * 8, 2048)),
        )
    yield name, lambda: kernels.combine_experts(empty(256, 2048), empty(32, 2048))


def _attention_calls(
    dtype: torch.dtype, head_dim: int, group: int, coding: torch.dtype
) -> Iterator[tuple[str, Callable[[], object]]]:
    kv_heads, rows = 8, 32
    pool = _empty(kv_heads, 1000, 16, head_dim, dtype=coding)
    scale = _empty(kv_heads, 1000, 16, dtype=torch.float32)
    cache = KVCache(pool, pool, scales=(scale, scale) if coding != dtype else None)
    queries = _empty(rows, kv_heads * group, head_dim, dtype=dtype)
    qkv = _empty(rows, kv_heads * (group + 2) * head_dim, dtype=dtype)
    turns, norm = _empty(rows, head_dim // 2, dtype=torch.float32), _empty(head_dim, dtype=dtype)
    tables, lengths = _empty(rows, 250, dtype=torch.int32), _empty(rows, dtype=torch.int32)
    starts, slots = _empty(rows + 1, dtype=torch.int32), _empty(rows, dtype=torch.int64)
    name = ", ".join(str(kind).removeprefix("torch.") for kind in dict.fromkeys((dtype, coding)))
    case = f"{name}, heads of {head_dim}, {group} to a key head"
    for weight in (norm, None):
        yield (
            case,
            partial(kernels.rope_and_cache, qkv, turns, turns, cache, slots, weight, weight, 1e-6, queries),
        )
    yield case, lambda: kernels.decode_attention(queries, cache, tables, lengths, 4000, None, queries)
    yield case, lambda: kernels.ragged_attention(queries, cache, tables, lengths, starts, None, queries)


def _logit_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    size = 151936
    logits, ids = _empty(32, size, dtype=torch.float32), _empty(32, dtype=torch.int64)
    single, double = _empty(32, dtype=torch.float32), _empty(32, dtype=torch.float64)
    draws = kernels.Draws(single, ids, double, double, ids, ids, ids)
    for greedy, filtered in ((True, False), (False, False), (False, True)):
        how = "greedy" if greedy else "filtered" if filtered else "whole"
        yield how, partial(kernels.sample, logits, draws, greedy=greedy, filtered=filtered)
    yield "bitmask", lambda: kernels.mask_logits(logits, ids, _empty(32, 4748, dtype=torch.int32))
    yield "repeated", lambda: kernels.penalize_repeated(logits, ids, ids, single)
    yield "added", lambda: kernels.add_to_logits(logits, ids, ids, single)
    yield "banned", lambda: kernels.ban(logits, ids, ids)


def make(case: Case, arch: int) -> Made:
    """Compiles a case by Triton, and its PTX once more for ptxas's own account. Raises RuntimeError if that fails."""
    module, name = case.kernel.split(":")
    fn = getattr(sys.modules[module], name)
    attributes = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn, case.signature, case.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    tool = triton.knobs.nvidia.ptxas_blackwell if arch >= 100 else triton.knobs.nvidia.ptxas
    suffix = "a" if arch >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [tool.path, "-v", f"--gpu-name=sm_{arch}{suffix}", str(ptx), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
    if said.returncode:
        raise RuntimeError(f"{case.kernel}, {case.case}: {said.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", said.stderr)
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill", said.stderr)]
    if registers is None or not spills:
        raise RuntimeError(f"ptxas said nothing of registers: {said.stderr.strip()}")
    return Made(
        kernel=name.removesuffix("_kernel"),
        case=case.case,
        arch=arch,
        warps=case.options["num_warps"],
        registers=int(registers[1]),
        shared=compiled.metadata.shared,
        spilled=sum(spills),
    )


def make_all(architectures: tuple[int, ...], without: tuple[str, ...] = ()) -> list[Made]:
    """All cases for some architectures, in order, on two processes; but for those whose names begin with any word."""
    work = [(case, arch) for arch in architectures for case in cases(arch) if not case.case.startswith(without)]
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(make, *zip(*work, strict=True), chunksize=4))


def page(made: list[Made]) -> str:
    """The page, with one row for each way in which a case starts a kernel."""
    rows: dict[tuple[str, str], dict[int, list[Made]]] = {}
    for one in made:
        rows.setdefault((one.kernel, one.case), {}).setdefault(one.arch, []).append(one)
    lines = [
        "# What each Triton kernel takes",
        "",
        "Warps, registers of a thread, kB of shared memory of a block, and bytes spilled, by the ptxas that Triton",
        f"{triton.__version__} brings, for every launch in `worker/kernels/cuda/triton/tables.json`.",
        "float16 has the launches of bfloat16, float32's are interpreted only. Nothing was run: no GPU was at hand.",
        "`.venv/bin/python -m scripts.triton_kernels` writes this page.",
        "",
        "| kernel | case | " + " | ".join(f"sm_{arch}" for arch in configs.ARCHITECTURES) + " |",
        "|---|---|" + "---|" * len(configs.ARCHITECTURES),
    ]
    for (kernel, case), by_arch in rows.items():
        for ways in zip(*(by_arch[arch] for arch in configs.ARCHITECTURES), strict=True):
            cells = [f"{one.warps}, {one.registers}, {one.shared / 1024:.0f} kB, {one.spilled}" for one in ways]
            lines.append(f"| {kernel} | {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the page, or checks one architecture."""
    if sys.argv[1:2] == ["--check"]:
        for one in make_all((int(sys.argv[2]),), without=("float16", "float32")):
            print(json.dumps(asdict(one)))
        return
    PAGE.write_text(page(make_all(configs.ARCHITECTURES, without=("float16", "float32"))))


if __name__ == "__main__":
    main()
