"""`python -m worker quantize`: a model folder to one with quantized weights, which loads faster and takes less room."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch
from torch import Tensor

from worker.calibration import TEXT, Moments, layer_moments, tokenize
from worker.kernels import QUANTIZED_FORMATS, QuantizedWeight
from worker.kernels.calibrated import quantize_for
from worker.kernels.quantized import Format, quantize
from worker.model import ModelConfig, ModelError
from worker.model.checkpoint import DTYPES, Checkpoint, StoredTensor
from worker.model.config import QUANTIZATION_FIELD, QUANTIZATION_METHOD, QUANTIZATION_VERSION
from worker.model.files import INDEX_NAME, SINGLE_NAME
from worker.model.plan import style_of
from worker.model.quantization import format_of, stored_tensors
from worker.output import OutputError, whole_folder

PIECE_WEIGHTS = 4 * 1024 * 1024
_COPIED = ("*.json", "*.jinja", "*.txt", "LICENSE*")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")

Progress = Callable[[int, int], None]
"""Called with (weights written, weights in all)."""


@dataclass(slots=True)
class _Target:
    """A tensor to write, and where its data come from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kept: list[Tensor] = field(default_factory=list)
    """Data that were made while an earlier tensor was written."""

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * DTYPES[self.dtype].itemsize


def calibrates(source: Path, format: Format) -> bool:  # noqa: A002
    """Whether weights are chosen by what the model makes of a text; else each is rounded by itself."""
    return format == "int4" and (source / "tokenizer.json").is_file()


def quantize_folder(
    source: Path,
    out: Path,
    format: Format,  # noqa: A002
    progress: Progress | None = None,
    text: Path = TEXT,
) -> None:
    """Writes config.json, model.safetensors and copies of the tokenizer's files and the like.

    Args:
        text: UTF-8, what int4 weights are calibrated on, if there is a tokenizer.

    The folder appears whole or not at all; it must not exist yet. Raises ModelError for a folder that cannot be served,
    and OutputError where the result cannot be written.
    """
    config = ModelConfig.read(source)
    if config.quantization != "none":
        raise ModelError(f"{source}: is {config.quantization} already")
    if out.exists():
        raise OutputError(f"{out}: already exists")
    moments: Iterator[Moments] = iter(())
    if calibrates(source, format):
        moments = layer_moments(source, tokenize(source, text))
    with Checkpoint(source) as checkpoint, whole_folder(out) as folder:
        _write(folder / SINGLE_NAME, checkpoint, config, format, moments, progress)
        values = json.loads((source / "config.json").read_bytes())
        values[QUANTIZATION_FIELD] = {
            "quant_method": QUANTIZATION_METHOD,
            "version": QUANTIZATION_VERSION,
            "format": format,
        }
        (folder / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for pattern in _COPIED:
            for path in source.glob(pattern):
                if path.is_file() and path.name not in ("config.json", INDEX_NAME):
                    shutil.copyfile(path, folder / path.name)


def _write(
    path: Path,
    checkpoint: Checkpoint,
    config: ModelConfig,
    format: Format,  # noqa: A002
    moments: Iterator[Moments],
    progress: Progress | None,
) -> None:
    """Layer by layer, as `moments` come."""
    plan: list[tuple[StoredTensor, Format | None, list[_Target]]] = []
    for name, stored in sorted(checkpoint.tensors.items(), key=lambda item: _layer(item[0])):
        stem = name.removesuffix(".weight")
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue  # a copy of the embedding
        if name.endswith(".weight") and style_of(stem) != "replicated" and len(stored.shape) == 2:
            own = format_of(stem, format)
            assert own is not None  # noqa: S101
            shape = (stored.shape[0], stored.shape[1])
            targets = [_Target(n, dtype, size) for n, (dtype, size) in stored_tensors(stem, shape, own).items()]
            plan.append((checkpoint.find(name, stored.shape), own, targets))
        else:
            plan.append((checkpoint.find(name, stored.shape), None, [_Target(name, stored.dtype, stored.shape)]))
    with path.open("wb") as file:
        _write_header(file, [target for _, _, targets in plan for target in targets])
        done, total = 0, sum(_numel(stored.shape) for stored, _, _ in plan)
        seen: Moments = {}
        layer = -1
        for stored, own, targets in plan:
            if _layer(stored.name) > layer:
                layer, seen = _layer(stored.name), next(moments, {})
            others = targets[1:]
            for rows, made in _quantized(checkpoint, stored, own, seen.get(stored.name.removesuffix(".weight"))):
                if made is None:
                    _append(file, rows)
                else:
                    _append(file, made.q)
                    for target, extra in zip(others, (made.scale, made.zero), strict=False):
                        target.kept.append(extra)  # type: ignore[arg-type]
                done += rows.numel()
                if progress is not None:
                    progress(done, total)
            for target in others:
                for extra in target.kept:
                    _append(file, extra)
                target.kept.clear()


def _layer(name: str) -> int:
    """Of a tensor; -1 for one that belongs to none."""
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _quantized(
    checkpoint: Checkpoint,
    stored: StoredTensor,
    format: Format | None,  # noqa: A002
    moments: Tensor | None,
) -> Iterator[tuple[Tensor, QuantizedWeight | None]]:
    """A tensor's rows, as stored and quantized. Some at a time; all at once where moments are given."""
    if format == "int4" and moments is not None:
        rows = checkpoint.rows(stored, 0, stored.shape[0])
        yield rows, quantize_for(rows, moments)
        return
    for rows in _pieces(checkpoint, stored):
        yield rows, None if format is None else quantize(rows, format)


def _pieces(checkpoint: Checkpoint, stored: StoredTensor) -> Iterator[Tensor]:
    rows = stored.shape[0] if stored.shape else 0
    at_once = max(1, PIECE_WEIGHTS // max(1, _numel(stored.shape[1:])))
    for start in range(0, rows, at_once):
        yield checkpoint.rows(stored, start, min(start + at_once, rows))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _write_header(file: BinaryIO, targets: list[_Target]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for target in targets:
        end = offset + target.nbytes
        header[target.name] = {"dtype": target.dtype, "shape": list(target.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(struct.pack("<Q", len(encoded)) + encoded)


def _append(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


@click.command("quantize")
@click.argument("source", metavar="IN", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(QUANTIZED_FORMATS), required=True, help="Of the weights.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=TEXT,
    help="What int4 weights are calibrated on, UTF-8, instead of our own text: the first 8192 tokens count.",
)
def quantize_command(source: Path, out: Path, format_: Format, text: Path) -> None:
    """Write the model folder IN with quantized weights to the folder OUT."""
    if format_ == "int4" and not calibrates(source, format_):
        click.echo(f"{source}: has no tokenizer.json, so weights are rounded without calibration", err=True)
    with click.progressbar(length=1, label="Quantizing") as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        try:
            quantize_folder(source, out, format_, advance, text)
        except (ModelError, OutputError) as error:
            raise click.ClickException(str(error)) from error
    click.echo(f"{out}: written")
