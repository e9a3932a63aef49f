"""What a worker says of itself: the model it serves, and the id that equivalent workers share."""

from __future__ import annotations

import hashlib
import platform
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch

from qwire.v1 import models_pb2
from qwire.v1 import worker_pb2 as pb
from worker.config import WorkerConfig
from worker.constraints.grammars import numerics as grammar_numerics
from worker.kernels.names import SAME_BITS
from worker.model import ModelConfig, WeightsDigest
from worker.runner.runner import TorchRunner

REFERENCE_NUMERICS_VERSION = 2
CPU_NUMERICS_VERSION = 6
CUDA_NUMERICS_VERSION = 1
"""To be counted up whenever these kernels give other bits than before."""
NUMERICS_VERSIONS = {
    "reference": REFERENCE_NUMERICS_VERSION,
    "cpu": CPU_NUMERICS_VERSION,
    "cuda": CUDA_NUMERICS_VERSION,
}


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 of a model's files."""

    weights: str
    config: str
    tokenizer: str


def read_digests(folder: Path, weights: str | WeightsDigest) -> Digests:
    """Reads the files, and of the weights what has not been read: about 0.6 s a GB, without holding the GIL.

    Args:
        weights: their digest, or where it is not known what it takes to finish it.

    Raises ModelError.
    """
    known = weights if isinstance(weights, str) else weights.finish()
    return Digests(known, _digest(folder / "config.json"), _digest(folder / "tokenizer.json"))


def describe(config: WorkerConfig, runner: TorchRunner, digests: Digests, *, constraints: bool) -> pb.WorkerInfo:
    """What routers are told.

    Args:
        constraints: whether its output can be held to a format.
    """
    model = runner.config
    dtype, kv_dtype = (str(kind).removeprefix("torch.") for kind in (runner.dtype, runner.kv_dtype))
    boot_id = uuid.uuid4().hex
    fingerprint = _hash(digests.weights, digests.config)
    numerics = _hash(
        fingerprint.hex(),
        digests.tokenizer,
        f"dtype {dtype}",
        f"quantization {runner.quantization}",
        f"kv {kv_dtype}",
        f"backend {runner.kernels.name} {NUMERICS_VERSIONS[runner.kernels.name]} torch {torch.__version__}",
        f"isa {SAME_BITS.get(runner.kernels.isa, runner.kernels.isa)}",
        # The arithmetic of a draw is torch's under either backend.
        f"torch on {platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        f"tp {config.tp} pp {config.pp}",
        # Results that follow the batch are nobody else's, nor this worker's when it starts anew.
        *([] if runner.kernels.batch_invariant else [f"boot {boot_id}"]),
        grammar_numerics(),
    )
    capabilities = [models_pb2.CAPABILITY_GENERATE]
    if has_chat_template(config.model):
        capabilities.append(models_pb2.CAPABILITY_CHAT)
    features = [
        pb.FEATURE_SAMPLING,
        pb.FEATURE_PENALTIES,
        pb.FEATURE_LOGPROBS,
        pb.FEATURE_CHOICES,
        pb.FEATURE_SUBMITS,
    ]
    if runner.scores_prompts:
        features.append(pb.FEATURE_PROMPT_LOGPROBS)
    if constraints:
        capabilities.append(models_pb2.CAPABILITY_CONSTRAINTS)
        features.append(pb.FEATURE_CONSTRAINTS)
    return pb.WorkerInfo(
        worker_id=config.id,
        boot_id=boot_id,
        model=models_pb2.ModelInfo(
            name=config.name,
            architecture=model.architecture,
            context_length=min(model.max_positions, runner.num_blocks * runner.block_size),
            vocab_size=model.vocab_size,
            dtype=dtype,
            quantization=runner.quantization,
            capabilities=capabilities,
            default_sampling=default_sampling(model),
            eos_token_ids=model.eos_token_ids,
            tokenizer_digest=digests.tokenizer,
            numerics_id=numerics.hex(),
        ),
        block_size=runner.block_size,
        num_blocks=runner.num_blocks,
        max_running=config.max_running,
        max_waiting=config.max_waiting,
        features=features,
        backend=runner.kernels.name,
        model_fingerprint=fingerprint,
        kv_dtype=kv_dtype,
    )


def default_sampling(model: ModelConfig) -> models_pb2.DefaultSampling:
    """What generation_config.json recommends; where it says nothing, plain sampling at temperature 1."""
    given = model.default_sampling
    temperature = 1.0 if given.temperature is None else given.temperature
    return models_pb2.DefaultSampling(
        temperature=0.0 if given.do_sample is False else temperature,
        top_p=1.0 if given.top_p is None else given.top_p,
        top_k=given.top_k or 0,
        min_p=given.min_p or 0.0,
        repetition_penalty=given.repetition_penalty or 1.0,
    )


def has_chat_template(folder: Path) -> bool:
    """Whether the folder holds a chat template, by the two places where one may be."""
    config = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (
        config.exists() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
    )


def _digest(path: Path) -> str:
    """SHA-256 of a file in hex; empty where there is none (a worker needs no tokenizer to serve token ids)."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(*parts: str) -> bytes:
    return hashlib.sha256("\0".join(parts).encode()).digest()
