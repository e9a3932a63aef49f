"""`CudaRunner`: steps on a GPU. Decodes are graphs, everything else is handed out kernel by kernel, and the GPU works
on the next step while the engine thinks about the last.

That next step is begun before anyone has asked for it: once a step's ids are drawn, its sequences' next positions are
computed from them, where they lie on the GPU, before the host has them. Mostly that is what the next plan asks for, and
then only the draw is left to do. What it doesn't ask for is harmless: a row of a sequence that has ended has written
one position of that sequence's last block behind all that it was said to hold, and whoever is given the block writes
there before reading it, later in the same queue of work.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine.plan import Chunk, Draw, Drawn, SamplingParams, StepPlan
from worker.kernels.cuda import CudaKernels
from worker.kernels.cuda.attention import CudaPlan, padded_tables
from worker.kernels.cuda.staging import Download
from worker.parallel import Group
from worker.runner.drawing import Drawing, draw_all
from worker.runner.graphs import DecodeBuffers, DecodeGraphs, DecodeRows, ladder
from worker.runner.memory import blocks_that_fit
from worker.runner.runner import TorchRunner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CudaSettings:
    """How a GPU is used."""

    max_step_tokens: int = 512
    """Of the largest step: what memory is left for it."""
    max_running: int = 64
    """Sequences of the largest step."""
    memory_share: float = 0.9
    """Of the GPU's memory that this process may use, where the number of KV blocks isn't given."""
    graphs: bool = True
    """Whether decode steps are recorded."""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """Positions that were computed before anyone asked for them."""

    rows: dict[int, int]
    """By slot of the cache."""
    ids: Sequence[int]
    """[rows]: what stands at each position."""
    logits: Tensor
    """float32 [rows, V], until graphs run again."""

    def asked_for(self, plan: StepPlan, block_size: int) -> dict[int, int]:
        """The plan's chunks that are among them, each with its row.

        A slot and an id say enough: only one sequence may write to a block, and what lies before the position in it
        tells all that came before that. A block that this very plan copies to has had other contents until now.
        """
        changed = {target for _, target in plan.copies}
        found = {}
        for index, chunk in enumerate(plan.chunks):
            if not is_decode(chunk):
                continue
            block = chunk.block_table[chunk.start // block_size]
            row = self.rows.get(block * block_size + chunk.start % block_size)
            if row is not None and self.ids[row] == chunk.token_ids[0] and block not in changed:
                found[index] = row
        return found


def is_decode(chunk: Chunk) -> bool:
    """Whether a chunk is one token, and one token is drawn behind it."""
    return len(chunk.token_ids) == 1 and len(chunk.draws) == 1


class CudaRunner(TorchRunner):
    """The `ModelRunner` of a rank that has a GPU.

    Args:
        num_blocks: of the cache; None takes what `settings.memory_share` leaves room for.

    Nothing can be executed before `make_ready`.
    """

    scores_prompts = False

    def __init__(
        self,
        folder: Path,
        *,
        kernels: CudaKernels,
        settings: CudaSettings,
        num_blocks: int | None = None,
        block_size: int | None = None,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        quantize: str = "none",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            folder,
            num_blocks=None,
            block_size=block_size,
            dtype=dtype,
            kv_dtype=kv_dtype,
            quantize=quantize,
            kernels=kernels,
            group=group,
        )
        self._cuda, self._settings = kernels, settings
        self._wanted_blocks = num_blocks
        self._graphs: DecodeGraphs | None = None
        self._ahead: _Ahead | None = None

    @property
    def positions_ahead(self) -> int:
        return int(self._settings.graphs and self._group.size == 1)

    def make_ready(self) -> None:
        """Sizes the cache and records graphs; all ranks at the same time, once their group is connected.

        Raises NoRoom where not one block fits.
        """
        started = time.monotonic()
        self.make_cache(self._wanted_blocks or self._group.least(self._fitting()), dummies=1)
        if self._settings.graphs:
            with torch.inference_mode():
                self._graphs = self._record()
        log.info(
            "rank %d: %d KV blocks of %d, graphs for %s rows, ready in %.1f s",
            self._group.index,
            self.num_blocks,
            self.block_size,
            "no" if self._graphs is None else ", ".join(map(str, self._graphs.rungs)),
            time.monotonic() - started,
        )

    def execute(self, plan: StepPlan) -> list[list[Drawn]]:
        """See `TorchRunner.execute`."""
        drawn: list[list[Drawn]] = [[] for _ in plan.chunks]
        with torch.inference_mode():
            self._copy(plan.copies)
            ahead, self._ahead = self._ahead, None
            asked = {} if ahead is None else ahead.asked_for(plan, self.block_size)
            # In this order: a graph's logits are gone when the next one runs.
            parts = []
            if ahead is not None and asked:
                rows = list(asked.values())
                every = rows == list(range(len(ahead.ids)))
                parts.append(self._draw(list(asked), plan, ahead.logits if every else ahead.logits[rows]))
            rest = [index for index in range(len(plan.chunks)) if index not in asked]
            if rest:
                logits = self._forward([plan.chunks[index] for index in rest])
                if logits is not None:
                    parts.append(self._draw(rest, plan, logits))
            begun = self._go_ahead(plan, parts)
            ids = []
            for indexes, drawing in parts:
                for index, token in zip(indexes, drawing.read(), strict=True):
                    drawn[index].append(token)
                    ids.append(token.token_id)
        if begun is not None:
            self._ahead = _Ahead(begun[0], ids, begun[1])
        return drawn

    def _draw(self, chunks: Sequence[int], plan: StepPlan, logits: Tensor) -> tuple[list[int], Drawing]:
        """Begins the draws of these chunks; with them, the chunk of each."""
        draws = [draw for index in chunks for draw in plan.chunks[index].draws]
        owners = [index for index in chunks for _ in plan.chunks[index].draws]
        return owners, draw_all(self.kernels, logits, draws, lambda tensors: Download(self._cuda.gpu, tensors))

    def _forward(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Logits of the chunks' draws, float32 [draws, V]; None without any, and on ranks other than 0 of the last
        stage."""
        step, count = self._build(StepPlan(chunks)), len(chunks)
        if self._graphs is not None and all(map(is_decode, chunks)) and self._graphs.rung(count) is not None:
            rows = DecodeRows(step.positions, step.slots, padded_tables(step.ragged.block_tables))
            (ids,) = self._upload(step.ids)
            return self._graphs.run(rows, ids, self._cuda.staging)
        hidden = self._hidden(step)
        if hidden is None or not len(step.draw_rows):
            return None
        (indexes,) = self._upload(step.draw_rows)
        return self._logits(hidden[indexes])

    def _upload(self, *arrays: npt.NDArray[np.int64]) -> list[Tensor]:
        return self._cuda.staging.upload(*arrays)

    def _logits(self, rows: Tensor) -> Tensor | None:
        """In memory of their own: those of a step that was begun ahead may still be wanted."""
        return self._model.compute_logits(rows)

    def _record(self) -> DecodeGraphs:
        rungs = ladder(self._settings.max_running)
        blocks = -(-self._max_positions // self.block_size)
        buffers = DecodeBuffers(rungs[-1], blocks, self.block_size, self.num_blocks, self.kernels.device)

        def forward(ids: Tensor, positions: Tensor, slots: Tensor, plan: CudaPlan) -> Tensor | None:
            hidden = self._compute(ids, self._cos[positions], self._sin[positions], slots, plan)
            self._group.settle()  # what is sent in a graph is waited for in it
            return None if hidden is None else self._logits(hidden)

        return DecodeGraphs(rungs, buffers, forward, self._cuda.gpu.recorder())

    def _go_ahead(
        self, plan: StepPlan, parts: Sequence[tuple[list[int], Drawing]]
    ) -> tuple[dict[int, int], Tensor] | None:
        """Begins the next position of every sequence that has drawn; gives slots with their rows, and the logits.

        Not where one of them has no block for it: a next step that computed that one by itself would read all weights
        once more. Nor behind guesses, of which it isn't known yet which were right; nor with several ranks, of which
        the others learn of ids with the plan that has them.
        """
        chunks = [plan.chunks[index] for indexes, _ in parts for index in indexes]
        graphs, size = self._graphs, self.block_size
        if not chunks or graphs is None or self._group.size > 1 or graphs.rung(len(chunks)) is None:
            return None
        positions = np.array([chunk.start + len(chunk.token_ids) for chunk in chunks], np.int64)
        room = np.array([len(chunk.block_table) for chunk in chunks]) * size
        if (positions >= np.minimum(room, self._max_positions)).any() or any(len(c.draws) > 1 for c in chunks):
            return None
        tables = [np.asarray(chunk.block_table, np.int64) for chunk in chunks]
        blocks = np.array([table[at // size] for table, at in zip(tables, positions.tolist(), strict=True)], np.int64)
        slots = blocks * size + positions % size
        drawn = [drawing.tokens for _, drawing in parts]
        tokens = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        logits = graphs.run(DecodeRows(positions, slots, padded_tables(tables)), tokens, self._cuda.staging)
        return None if logits is None else ({slot: row for row, slot in enumerate(slots.tolist())}, logits)

    def _fitting(self) -> int:
        """How many KV blocks there is room for beside a step of the largest size, which is tried. Raises NoRoom."""
        settings, size, gpu = self._settings, self.block_size, self._cuda.gpu
        length = min(settings.max_step_tokens, self.config.max_positions)
        count, per_chunk = -(-settings.max_step_tokens // length), -(-length // size)
        self.make_cache(count * per_chunk, dummies=1)
        borrowed = sum(tensor.nbytes for cache in self.caches for tensor in cache.tensors)
        gpu.reset_peak()
        chunks = [Chunk([0] * length, 0, range(index * per_chunk, (index + 1) * per_chunk)) for index in range(count)]
        with torch.inference_mode():
            hidden = self._hidden(self._build(StepPlan(chunks), every=True))
            logits = None
            if hidden is not None:
                rows = torch.arange(settings.max_running, device=hidden.device) % hidden.shape[0]
                logits = self._logits(hidden[rows])
            if logits is not None:
                draw = Draw(SamplingParams(temperature=1.0, top_p=0.9), 0, 0)
                self._draw([0], StepPlan([Chunk([0], 0, [0], [draw] * settings.max_running)]), logits)[1].read()
        after = gpu.memory()
        del hidden, logits
        self.caches = ()
        gpu.reset_peak()
        rung = ladder(settings.max_running)[-1] if settings.graphs else 0
        return blocks_that_fit(
            after,
            settings.memory_share,
            borrowed=borrowed,
            graph_logits=rung * self.config.vocab_size * 4,
            block_bytes=size * self.kv_bytes_per_position,
        )
