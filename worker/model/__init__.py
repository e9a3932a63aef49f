"""Qwen models: configuration, layers, and loading from a folder of safetensors."""

from worker.model.config import DefaultSampling, ModelConfig, RopeConfig
from worker.model.digest import weights_digest, weights_state
from worker.model.errors import ModelError
from worker.model.loader import load_model
from worker.model.plan import Shard, check_shares, check_stages, stage_layers
from worker.model.quantization import resolve_quantization
from worker.model.qwen import CausalLM

__all__ = [
    "CausalLM",
    "DefaultSampling",
    "ModelConfig",
    "ModelError",
    "RopeConfig",
    "Shard",
    "check_shares",
    "check_stages",
    "load_model",
    "resolve_quantization",
    "stage_layers",
    "weights_digest",
    "weights_state",
]
