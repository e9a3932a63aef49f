"""`python -m worker quantize`: a model folder to one with quantized weights, which loads faster and takes less room."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import click
import torch
from torch import Tensor

from worker.kernels import QUANTIZED_FORMATS
from worker.kernels.quantized import Format, quantize
from worker.model import ModelConfig, ModelError
from worker.model.checkpoint import DTYPES, INDEX_NAME, SINGLE_NAME, Checkpoint, StoredTensor
from worker.model.config import QUANTIZATION_FIELD, QUANTIZATION_METHOD, QUANTIZATION_VERSION
from worker.model.plan import style_of
from worker.model.quantization import format_of, stored_tensors
from worker.output import OutputError, whole_folder

PIECE_WEIGHTS = 4 * 1024 * 1024
_COPIED = ("*.json", "*.jinja", "*.txt", "LICENSE*")

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


def quantize_folder(source: Path, out: Path, format: Format, progress: Progress | None = None) -> None:  # noqa: A002
    """Writes config.json, model.safetensors and copies of the tokenizer's files and the like.

    The folder appears whole or not at all; it must not exist yet. Raises ModelError for a folder that cannot be served,
    and OutputError where the result cannot be written.
    """
    config = ModelConfig.read(source)
    if config.quantization != "none":
        raise ModelError(f"{source}: is {config.quantization} already")
    if out.exists():
        raise OutputError(f"{out}: already exists")
    with Checkpoint(source) as checkpoint, whole_folder(out) as folder:
        _write(folder / SINGLE_NAME, checkpoint, config, format, progress)
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


def _write(path: Path, checkpoint: Checkpoint, config: ModelConfig, format: Format, progress: Progress | None) -> None:  # noqa: A002
    """Some rows at a time: no weight is ever whole in memory."""
    plan: list[tuple[StoredTensor, Format | None, list[_Target]]] = []
    for name, stored in checkpoint.tensors.items():
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
        for stored, own, targets in plan:
            others = targets[1:]
            for rows in _pieces(checkpoint, stored):
                if own is None:
                    _append(file, rows)
                else:
                    quantized = quantize(rows, own)
                    _append(file, quantized.q)
                    for target, made in zip(others, (quantized.scale, quantized.zero), strict=False):
                        target.kept.append(made)  # type: ignore[arg-type]
                done += rows.numel()
                if progress is not None:
                    progress(done, total)
            for target in others:
                for made in target.kept:
                    _append(file, made)
                target.kept.clear()


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
def quantize_command(source: Path, out: Path, format_: Format) -> None:
    """Write the model folder IN with quantized weights to the folder OUT."""
    with click.progressbar(length=1, label="Quantizing") as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        try:
            quantize_folder(source, out, format_, advance)
        except (ModelError, OutputError) as error:
            raise click.ClickException(str(error)) from error
    click.echo(f"{out}: written")
