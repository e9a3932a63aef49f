"""How weights are cut over tensor-parallel ranks and a pipeline's stages, and merged into layers; data that the loader
applies.

Names are checkpoint paths without the leading "model.", `*` stands for a layer's index.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from worker.model.config import ModelConfig
from worker.model.errors import ModelError

Style = Literal["colwise", "rowwise", "vocab", "replicated"]

SHARDING: Final[Mapping[str, Style]] = MappingProxyType(
    {
        "embed_tokens": "vocab",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
        "lm_head": "vocab",
    }
)
"""Style of each weight that ranks share out; every other one is whole on every rank. "colwise" and "vocab" split the
output features (rows of the stored [out, in] weight), "rowwise" the input features (its columns). "colwise" and
"rowwise" cut between whole heads or features, which must divide; a vocabulary is filled up with zeros until it does."""

MERGED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)
"""Layers whose weight is several stored ones, stacked in this order."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's place in a tensor-parallel group."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is not in a group of {self.world}")

    def local(self, units: int, what: str) -> int:
        """How many of `units` (heads, features) a rank holds; fewer units than ranks are replicated, one a rank.

        Raises ModelError where they do not divide.
        """
        if units % self.world and self.world % units:
            raise ModelError(f"{what}: {units} cannot be shared out over {self.world} ranks")
        return max(1, units // self.world)

    def bounds(self, size: int, units: int, what: str) -> tuple[int, int]:
        """This rank's (start, stop) of a dimension of `size` elements that holds `units` equal units."""
        count = self.local(units, what)
        first = self.rank * units // self.world
        return first * (size // units), (first + count) * (size // units)

    def rows(self, size: int) -> int:
        """How many rows of a vocabulary of `size` each rank holds, the last ones padded with rows that no id has."""
        return -(-size // self.world)

    def vocab_bounds(self, size: int) -> tuple[int, int]:
        """This rank's (start, stop) of a vocabulary's real rows; empty where all its rows are padding."""
        rows = self.rows(size)
        return min(self.rank * rows, size), min((self.rank + 1) * rows, size)


def stage_layers(layers: int, stage: int, stages: int) -> range:
    """The layers of a pipeline's stage, by index: numbers that differ by one at most. The last stage, which has the
    head besides, has no more than any other."""
    return range(-(-stage * layers // stages), -(-(stage + 1) * layers // stages))


def stage_of(name: str, layers: int, stages: int) -> int:
    """The stage that has a stored tensor, named as in a checkpoint. What is no layer's, the embedding aside, is the
    last one's."""
    parts = name.split(".")
    if parts[:2] == ["model", "embed_tokens"]:
        return 0
    if parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdecimal() and int(parts[2]) < layers:
        return next(s for s in range(stages) if int(parts[2]) in stage_layers(layers, s, stages))
    return stages - 1


def check_stages(config: ModelConfig, stages: int) -> None:
    """Raises ModelError where a model has not a layer for each stage."""
    if stages > config.num_layers:
        raise ModelError(f"num_hidden_layers, {config.num_layers}, cannot be cut into {stages} stages")


def check_shares(config: ModelConfig, world: int) -> None:
    """Raises ModelError, naming field and value, where a model cannot be shared out over `world` ranks."""
    heads, kv_heads, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
    if heads % world:
        raise ModelError(
            f"num_attention_heads, {heads}, cannot be shared out over {world} ranks: it must divide by them"
        )
    if kv_heads % world and world % kv_heads:
        raise ModelError(
            f"num_key_value_heads, {kv_heads}, cannot be shared out over {world} ranks: one must divide by the other"
        )
    if inner % world:
        raise ModelError(f"intermediate_size, {inner}, cannot be shared out over {world} ranks: it must divide by them")


def style_of(name: str) -> Style:
    """The sharding style of a module named as in a checkpoint, e.g. "model.layers.3.mlp.up_proj"."""
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removeprefix("model."))
    return SHARDING.get(pattern, "replicated")
