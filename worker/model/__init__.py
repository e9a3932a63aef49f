"""Qwen models: configuration, layers, and loading from a folder of safetensors."""

import importlib
from typing import TYPE_CHECKING, Any

from worker.model.config import DefaultSampling, ModelConfig, RopeConfig
from worker.model.digest import WeightsDigest, weights_digest, weights_state
from worker.model.errors import ModelError
from worker.model.plan import Shard, check_shares, check_stages, stage_layers

if TYPE_CHECKING:
    from worker.model.loader import load_model
    from worker.model.quantization import resolve_quantization
    from worker.model.qwen import CausalLM

__all__ = [
    "CausalLM",
    "DefaultSampling",
    "ModelConfig",
    "ModelError",
    "RopeConfig",
    "Shard",
    "WeightsDigest",
    "check_shares",
    "check_stages",
    "load_model",
    "resolve_quantization",
    "stage_layers",
    "weights_digest",
    "weights_state",
]

_HOMES = {"load_model": "loader", "resolve_quantization": "quantization", "CausalLM": "qwen"}


def __getattr__(name: str) -> Any:
    # Loaded when first used: what needs no torch can be had before it is imported.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
