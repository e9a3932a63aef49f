"""Compiled linear layers, every instruction set of this machine, against float64 products of the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.memory import bytes_in_large_pages, offers_large_pages
from tests.helpers.native_modules import instruction_sets
from tests.helpers.stacks import eventually
from worker.kernels import StoredError, StoredPart, quantized
from worker.kernels.cpu import linear, native
from worker.kernels.cpu.linear import Format, PackedLinear, Packer
from worker.kernels.cpu.memory import zeros
from worker.kernels.reference import dense

FLOATS: dict[Format, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FORMATS: list[Format] = [*FLOATS, "int8", "int4"]
SHAPES = [
    *((1, 1, 1), (1, 64, 32), (2, 130, 33), (5, 7, 31), (14, 256, 64), (17, 1000, 40), (64, 96, 96), (3, 1024, 257)),
    *((48, 33, 5), (49, 1100, 70), (81, 128, 32)),
]
"""Rows, in, out."""


@pytest.fixture(params=instruction_sets())
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    _, module = native.load(request.param)
    module.set_threads(2, [])
    yield module
    module.set_threads(1, [])


def made(
    module: ModuleType,
    format: Format,  # noqa: A002
    out: int,
    size: int,
    bias: bool = False,
) -> tuple[PackedLinear, torch.Tensor]:
    """A packed weight and what it stands for, float32 [out, in]."""
    generator = torch.Generator().manual_seed(out * size)
    weight = torch.randn(out, size, generator=generator)
    added = torch.randn(out, generator=generator) if bias else None
    if format == "int8" or format == "int4":
        few = quantized.quantize(weight, format)
        return linear.pack(module, few, added), quantized.dequantize(few)
    weight = weight.to(FLOATS[format])
    return linear.pack(module, weight, added), kept(module, weight.float(), format)


def in_groups(x: torch.Tensor, most: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """In steps of which the largest magnitude of every 128 values of a row has so many."""
    parts = []
    for part in torch.split(x, 128, 1):
        largest = part.abs().amax(1, keepdim=True)
        steps = most(largest)
        parts.append((part.double() * (steps / largest)).round().float() * (largest / steps))
    return torch.cat(parts, 1)


def is_fixed(module: ModuleType, format: Format) -> bool:  # noqa: A002
    """Whether weights of this format are kept as fixed-point values."""
    return bool(module.fixed_point) and format == "bfloat16"


def rounded(module: ModuleType, x: torch.Tensor, format: Format) -> torch.Tensor:  # noqa: A002
    """What a product reads of its rows: with few-bit weights 8 bits, with fixed-point ones 13."""
    if format in FLOATS and not is_fixed(module, format):
        return x
    return in_groups(x, lambda largest: torch.full_like(largest, 4095 if is_fixed(module, format) else 127))


def kept(module: ModuleType, weight: torch.Tensor, format: Format) -> torch.Tensor:  # noqa: A002
    """What is kept of weights: of fixed-point ones, multiples of what makes a group's largest 2048 to 4095."""
    if not is_fixed(module, format):
        return weight
    return in_groups(weight, lambda largest: largest * 2.0 ** (11 - largest.log2().floor()))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("rows", "size", "out"), SHAPES)
def test_product(kernels: ModuleType, format: Format, rows: int, size: int, out: int) -> None:  # noqa: A002
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(rows))
    for bias in (False, True):
        packed, weight = made(kernels, format, out, size, bias)
        wanted = rounded(kernels, x, format).double() @ weight.double().t()
        wanted += 0 if packed.bias is None else packed.bias.double()
        got = linear.linear(kernels, x, packed)
        assert got.dtype == torch.float32
        assert float((got - wanted).abs().max()) <= 4e-7 * size + 1e-5


@pytest.mark.parametrize("format", FORMATS)
def test_a_rows_bits_are_its_own(kernels: ModuleType, format: Format) -> None:  # noqa: A002
    packed, _ = made(kernels, format, 72, 328, bias=True)
    x = torch.randn(130, 328)
    x[3] *= 1e4
    whole = linear.linear(kernels, x, packed)
    for rows in (1, 2, 3, 6, 7, 8, 13, 14, 15, 29, 43, 48, 70, 97):
        for first in (0, 130 - rows):
            part = linear.linear(kernels, x[first : first + rows], packed)
            assert torch.equal(part, whole[first : first + rows]), f"{rows} rows from {first}"
    kernels.set_threads(1, [])
    assert torch.equal(linear.linear(kernels, x, packed), whole)
    kernels.set_threads(3, [])
    assert torch.equal(linear.linear(kernels, x, packed), whole)


@pytest.mark.parametrize("format", FORMATS)
def test_long_rows_of_few_tiles(kernels: ModuleType, format: Format) -> None:  # noqa: A002
    """Threads share them out along K; the same bits, of gated rows too."""
    packed, _ = made(kernels, format, 40, 3 * 1000 + 5)
    gate_up = torch.randn(16, 2 * 3005)
    for rows in (4, 6, 14, 16):
        for x, is_gated in ((gate_up[:rows], True), (gate_up[:rows, :3005].contiguous(), False)):
            kernels.set_threads(1, [])
            wanted = torch.cat([linear.linear(kernels, row[None], packed, gated=is_gated) for row in x])
            for threads in (1, 2, 3):
                kernels.set_threads(threads, [])
                assert torch.equal(linear.linear(kernels, x, packed, gated=is_gated), wanted), f"{rows}, {threads}"


@pytest.mark.parametrize("format", FORMATS)
def test_outputs_that_no_cache_holds(kernels: ModuleType, format: Format) -> None:  # noqa: A002
    """They may be written past the caches, where they lie so that they can be; the same bits."""
    packed, _ = made(kernels, format, 4096, 160)
    x = torch.randn(70, 160)
    whole = linear.linear(kernels, x, packed)
    assert torch.equal(linear.linear(kernels, x, packed, torch.empty(70, 4099)[:, 1:4097]), whole)
    assert torch.equal(torch.cat([linear.linear(kernels, part, packed) for part in torch.split(x, 10)]), whole)


@pytest.mark.parametrize("format", FORMATS)
def test_instruction_sets_agree(format: Format) -> None:  # noqa: A002
    """Integer sums are exact everywhere, so only the rounding of scales and float sums may differ."""
    x = torch.randn(9, 520)
    results = []
    for name in instruction_sets():
        _, module = native.load(name)
        packed, _ = made(module, format, 64, 520)
        results.append(linear.linear(module, x, packed))
    for result in results[1:]:
        # Fixed-point values stand for floats; sums of 520 products are about 23.
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=0.05 if format == "bfloat16" else 2e-4)


@pytest.mark.parametrize("most", [127.0, -127.0])
@pytest.mark.parametrize("format", FORMATS)
def test_extreme_integers(kernels: ModuleType, format: Format, most: float) -> None:  # noqa: A002
    """The largest products, all of one sign: nothing saturates."""
    if format in FLOATS:
        weight = torch.full((32, 512), most)
        packed = linear.pack(kernels, weight.to(FLOATS[format]))
    else:
        assert format == "int8" or format == "int4"
        few = quantized.quantize(torch.full((32, 512), most), format)
        weight = quantized.dequantize(few)
        packed = linear.pack(kernels, few)
    for rows, value in ((4, 127.0), (4, -127.0), (50, 127.0), (50, -127.0)):
        x = torch.full((rows, 512), value)
        torch.testing.assert_close(linear.linear(kernels, x, packed), x @ weight.t(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_odd_rows(kernels: ModuleType, format: Format) -> None:  # noqa: A002
    packed, _ = made(kernels, format, 40, 100)
    x = torch.randn(6, 100)
    x[1] = 0
    x[2] = 1e-42
    x[3, 7] = torch.nan
    x[4, 7] = torch.inf
    for rows in (x, x.repeat(9, 1)):
        got = linear.linear(kernels, rows, packed)[-6:]
        assert bool(torch.isfinite(got[[0, 1, 2, 5]]).all())
        assert not got[1].any()
        assert float(got[2].abs().max()) < 1e-38
        assert not torch.isfinite(got[3:5]).any()


@pytest.mark.parametrize("format", FORMATS)
def test_embed(kernels: ModuleType, format: Format) -> None:  # noqa: A002
    packed, weight = made(kernels, format, 77, 203)
    ids = torch.tensor([76, 0, 31, 32, 0])
    assert torch.equal(linear.embed(kernels, ids, packed), weight[ids])
    for bad in (-1, 77):
        with pytest.raises(IndexError):
            linear.embed(kernels, torch.tensor([0, bad]), packed)


@pytest.mark.parametrize("format", FORMATS)
def test_packing_slice_by_slice(kernels: ModuleType, format: Format) -> None:  # noqa: A002
    weight = torch.randn(101, 160).bfloat16()
    whole, sliced = Packer(kernels, 101, 160, format), Packer(kernels, 101, 160, format)
    whole.put(0, weight)
    for first, last in ((64, 101), (0, 7), (7, 64)):
        sliced.put(first, weight[first:last])
    assert torch.equal(whole.finish().data, sliced.finish().data)
    with pytest.raises(ValueError, match="don't fit"):
        Packer(kernels, 101, 160, format).put(100, weight[:2])


def stored(file: int, part: torch.Tensor) -> tuple[int, int]:
    """Writes a tensor behind what is in the file; where it lies."""
    place = file, os.lseek(file, 0, os.SEEK_END)
    os.write(file, part.contiguous().view(torch.uint8).numpy().tobytes())
    return place


@pytest.mark.parametrize("size", [160, 33])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_from_files(kernels: ModuleType, format: Format, size: int, tmp_path: Path) -> None:  # noqa: A002
    weight = torch.randn(101, size)
    few = quantized.quantize(weight, format) if format == "int8" or format == "int4" else None
    rows = few or weight.to(FLOATS[format])
    packed, wanted = Packer(kernels, 101, size, format).finish(), linear.pack(kernels, rows)
    file = os.open(tmp_path / "weights", os.O_RDWR | os.O_CREAT)
    os.write(file, b"odd")
    parts = []
    for first, last in ((64, 101), (0, 64)):
        cut = few.rows(first, last) if few else weight.to(FLOATS[format])[first:last]
        tensors = [cut] if isinstance(cut, torch.Tensor) else [t for t in (cut.q, cut.scale, cut.zero) if t is not None]
        places = tuple(stored(file, tensor) for tensor in tensors)
        parts.append(StoredPart(packed, first, last - first, tensors[0].dtype, places))
    linear.pack_stored(kernels, parts)
    assert torch.equal(packed.data, wanted.data)

    os.ftruncate(file, os.fstat(file).st_size - 1)
    with pytest.raises(StoredError) as ended:
        linear.pack_stored(kernels, parts)
    assert (ended.value.part, ended.value.place, ended.value.reason) == (1, len(parts[1].places) - 1, "")
    os.close(file)
    with pytest.raises(StoredError, match="Bad file descriptor"):
        linear.pack_stored(kernels, parts)
    for wrong in ({"first_row": 1}, {"first_row": -32}, {"rows": 38}, {"rows": 0}, {"first_row": 0, "rows": 33}):
        with pytest.raises(ValueError, match="rows"):
            linear.pack_stored(kernels, [replace(parts[0], **wrong)])  # type: ignore[arg-type]
    others = torch.float32, torch.int8, torch.uint8
    misfits = [replace(parts[0], dtype=other) for other in others[0 if few else 1 :] if other != parts[0].dtype]
    for part in (*misfits, replace(parts[0], places=parts[0].places[1:])):
        with pytest.raises(ValueError, match="don't fit"):
            linear.pack_stored(kernels, [part])


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_packing_converts_floats(kernels: ModuleType, source: Format, to: Format) -> None:
    special = [
        0.0,
        -0.0,
        1.0,
        65504.0,
        65519.9,
        65520.0,
        6e-8,
        2.9e-8,
        3.1e-8,
        6.1e-5,
        -1e-7,
        1e30,
        torch.inf,
        torch.nan,
    ]
    if is_fixed(kernels, to):  # of a group that isn't finite nothing is kept, of others what their largest leaves
        special = [0.0, -0.0, 1.0, 2.0**-11, 1.1, 6e-8, -4.4]
    weight = torch.cat((torch.randn(50), torch.tensor(special))).view(1, -1).to(FLOATS[source])
    packer = Packer(kernels, 1, weight.shape[1], to)
    packer.put(0, weight)
    got = linear.embed(kernels, torch.tensor([0]), packer.finish())
    wanted = kept(kernels, weight.to(FLOATS[to]).float(), to)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_fixed_point_weights(kernels: ModuleType) -> None:
    """Exact down to 1/16 of a group's largest, however far groups lie apart; extremes don't trouble others."""
    weight = torch.zeros(34, 300)
    weight[0] = torch.linspace(1, 15.9, 300).bfloat16()
    weight[1, :128], weight[1, 128:] = 1e30, 3e-20
    weight[2] = 1e-38
    weight[3, 5] = torch.inf
    weight[33] = -3.0e38
    packed = linear.pack(kernels, weight.bfloat16())
    got = linear.embed(kernels, torch.tensor([0, 1, 33]), packed)
    assert torch.equal(got, weight[[0, 1, 33]].bfloat16().float())
    x = torch.full((1, 300), 1.0)
    x[0, :128] = 0
    product = linear.linear(kernels, x, packed)[0]
    torch.testing.assert_close(product[1], torch.tensor(172 * 3e-20), rtol=1e-2, atol=0)
    assert float(product[2]) < 1e-35
    assert not torch.isfinite(linear.linear(kernels, torch.ones(1, 300), packed)[0, 3])
    assert not product[4:33].any()


def gated(module: ModuleType, gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of each row, as a product with 1 gives it back."""
    size = gate_up.shape[1] // 2
    return linear.linear(module, gate_up, linear.pack(module, torch.eye(size)), gated=True)


@pytest.mark.parametrize("rows", [1, 2, 13, 40])
@pytest.mark.parametrize("size", [1, 31, 328])
def test_gated_rows(kernels: ModuleType, rows: int, size: int) -> None:
    gate_up = torch.randn(rows, 2 * size + 3)[:, 2:-1] * 8
    wanted = dense.silu_mul(gate_up)
    got = gated(kernels, gate_up)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(gated(kernels, gate_up[-1:]), got[-1:])


def test_gates_at_the_ends_of_float32(kernels: ModuleType) -> None:
    gates = torch.tensor([[-3e38], [-200.0], [-88.0], [-0.0], [0.0], [88.0], [3e38], [torch.inf]])
    gate_up = torch.cat((gates, torch.ones(8, 1)), 1)
    got = linear.linear(kernels, gate_up, linear.pack(kernels, torch.ones(1, 1)), gated=True)
    torch.testing.assert_close(got[1:], dense.silu_mul(gate_up)[1:])
    assert -3.0 < float(got[0]) <= 0.0  # exp stops short of infinity


@pytest.mark.parametrize("format", FORMATS)
def test_product_of_gated_rows(kernels: ModuleType, format: Format) -> None:  # noqa: A002
    """The same bits as of rows that were gated before, on one thread and two."""
    packed, _ = made(kernels, format, 72, 328, bias=True)
    gate_up = torch.randn(61, 656)
    wanted = linear.linear(kernels, gated(kernels, gate_up), packed)
    for rows in (1, 5, 16, 43, 61):
        assert torch.equal(linear.linear(kernels, gate_up[:rows], packed, gated=True), wanted[:rows])
    kernels.set_threads(2, [])
    assert torch.equal(linear.linear(kernels, gate_up, packed, gated=True), wanted)


def test_wrong_shapes_are_refused(kernels: ModuleType) -> None:
    packed, _ = made(kernels, "float32", 32, 16)
    with pytest.raises(ValueError, match="rows of 16"):
        linear.linear(kernels, torch.zeros(1, 17), packed)
    with pytest.raises(ValueError, match="rows of 16"):
        linear.linear(kernels, torch.zeros(1, 16, dtype=torch.bfloat16), packed)
    with pytest.raises(ValueError, match="out must be"):
        linear.linear(kernels, torch.zeros(1, 16), packed, torch.zeros(2, 32))
    with pytest.raises(ValueError, match="int64"):
        linear.embed(kernels, torch.zeros(1), packed)
    with pytest.raises(ValueError, match="rows of 32"):
        linear.linear(kernels, torch.zeros(1, 16), packed, gated=True)
    with pytest.raises(ValueError, match="bias"):
        linear.pack(kernels, torch.zeros(4, 4), torch.zeros(5))
    with pytest.raises(ValueError, match="rows and columns"):
        linear.pack(kernels, torch.zeros(0, 4))


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_pages_are_gathered_under_a_weight(
    kernels: ModuleType,
    format: Format,  # noqa: A002
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "zeros", lambda nbytes, large: zeros(nbytes))  # as where the system had none at first
    packed, _ = made(kernels, format, 8192, 1024)
    x = torch.randn(1, 1024)
    before, large = linear.linear(kernels, x, packed), bytes_in_large_pages()
    if linear.gather_pages(kernels, packed):
        assert bytes_in_large_pages() > large
    assert linear.linear(kernels, x, packed).equal(before)


def test_weights_come_into_large_pages(kernels: ModuleType) -> None:
    def come() -> bool:
        before = bytes_in_large_pages()
        packed, _ = made(kernels, "bfloat16", 8192, 1024)
        return bytes_in_large_pages() > before + packed.nbytes // 2

    if offers_large_pages():
        assert eventually(come, 10)  # the system may be short of them for a moment


def test_machine_limits(kernels: ModuleType) -> None:
    for measure in (kernels.measure_read_bandwidth, kernels.measure_fma, kernels.measure_int8):
        assert measure(0.001) > 1e8
