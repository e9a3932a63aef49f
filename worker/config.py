"""Settings of a worker."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Literal

import click

from qwire.service.config import ConfigError, setting, settings
from worker.kernels import BACKENDS, INSTRUCTION_SETS, QUANTIZED_FORMATS
from worker.model.config import DTYPES


@settings
class WorkerConfig:
    """Run a model: take token ids from routers, batch them, stream generated ids back."""

    model: Path = setting(
        help="Folder with config.json, tokenizer.json and safetensors.",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
    )
    served_model_name: str = setting(default="", help="The name that requests use; the folder's name if empty.")
    listen: str = setting(default="127.0.0.1:50061", help="Address for routers: host:port or unix:path.")
    insecure_bind: bool = setting(default=False, help="Allow an address that other machines can reach, without TLS.")
    worker_id: str = setting(default="", help="Names the worker in placements and logs; host and process id if empty.")
    backend: str = setting(
        default="auto",
        help="Kernels: cuda (an NVIDIA GPU), cpu (compiled at install), reference (plain torch), or auto: the first of "
        "these that is there.",
        type=click.Choice(["auto", *BACKENDS]),
    )
    isa: str = setting(
        default="auto",
        help="Instruction set of the cpu kernels; auto takes the best that this machine has. Workers that are to give "
        "the same tokens need the same one; avx512_amx and avx512_vnni give the same.",
        type=click.Choice(["auto", *INSTRUCTION_SETS]),
    )
    dtype: str = setting(
        default="auto",
        help="What weights are kept in that are not quantized; auto is the checkpoint's own. The reference kernels "
        "and cuda kernels compute in it, the cpu kernels in float32.",
        type=click.Choice(["auto", *DTYPES]),
    )
    quantize: str = setting(
        default="none",
        help="What the weights are quantized to while they are loaded. A folder made by `qwire quantize` needs none.",
        type=click.Choice(["none", *QUANTIZED_FORMATS]),
    )
    kv_dtype: str = setting(
        default="auto",
        help="What keys and values are kept in; auto is as dtype, but int16 in place of bfloat16 on cpu kernels that "
        "multiply in fixed point (with VNNI, with AVX2). int8, int16 (which the cuda kernels don't have) and fp8 "
        "(e4m3, of the cuda kernels) have a scale for each position and head; int8 and fp8 take about half of "
        "bfloat16's memory.",
        type=click.Choice(["auto", *DTYPES, "int8", "int16", "fp8"]),
    )
    kv_cache_mib: int = setting(
        default=0,
        help="Memory for keys and values, of all ranks together, in MiB; 0 takes 1,024 on CPUs, and on GPUs what "
        "gpu_memory_utilization leaves.",
    )
    kv_blocks: int = setting(default=0, help="Number of KV blocks; 0 takes as many as kv_cache_mib holds.")
    block_size: int = setting(
        default=0,
        help="Positions in a KV block: a power of two up to 256; 0 takes 16, and on GPUs what attention likes best "
        "(256 for flash-attn 2, which takes no other).",
    )
    gpu_memory_utilization: float = setting(
        default=0.9,
        help="Share of a GPU's memory that a rank may use. What weights and the largest step leave of it is for keys "
        "and values, unless kv_cache_mib or kv_blocks says how much.",
    )
    attention: Literal["auto", "flash", "triton"] = setting(
        default="auto",
        help="Of the cuda kernels: flash (flash-attn 2, 3 or 4), triton (our own), or auto: flash where there is one.",
        type=click.Choice(["auto", "flash", "triton"]),
    )
    deterministic: bool = setting(
        default=False,
        help="Of the cuda kernels: results of a row don't depend on its batch, which takes time. Without, streams "
        "can't move to another worker exactly. Kernels on CPUs are so always.",
    )
    cuda_graphs: bool = setting(default=True, help="Of the cuda kernels: record decode steps, and replay them.")
    max_step_tokens: int = setting(default=512, help="Tokens that one step computes.")
    step_target_ms: float = setting(
        default=0.0,
        help="Milliseconds that a step may take while sequences decode: chunks of prompts are made as small as that "
        "takes. 0 is twice what the sequences that decode take alone, at least 10.",
    )
    max_running: int = setting(default=64, help="Sequences that run at once.")
    max_waiting: int = setting(
        default=16, help="Requests beyond max_running that wait; one more is refused. The queue is the router's."
    )
    speculation: int = setting(
        default=12,
        help="Tokens that a step guesses for a sequence at most, by looking up what followed where its last ones came "
        "before, and keeps if they are what is drawn: output is the same without. As many as are likely to pay are "
        "guessed; 0 guesses none.",
    )
    check_steps: bool = setting(
        default=False,
        help="Verify the books of scheduler and block pool after every step, and end where they are broken: for tests "
        "and for hunting a fault.",
    )
    tp: int = setting(default=1, help="Ranks (processes) that share each layer of the model: its tensor parallelism.")
    pp: int = setting(
        default=1,
        help="Stages that the layers are cut into, each of tp ranks: pipeline parallelism, for models that are too "
        "large for the memory of tp GPUs. Its tokens are those of one stage, on GPUs if deterministic.",
    )
    collective_timeout: float = setting(
        default=30.0,
        help="Seconds that a rank waits for another before their group is given up and replaced. With pp, longer than "
        "a step takes: stages wait for each other's work.",
    )
    threads: int = setting(
        default=0,
        help="Threads that a rank computes with; 0 takes one for each CPU that the process may use, by its affinity "
        "and its control group, or with --tp and --pp its share of them.",
    )
    grace: float = setting(default=30.0, help="Seconds that running requests get when the worker is told to stop.")

    def __post_init__(self) -> None:
        for name in ("max_step_tokens", "max_running", "max_waiting", "tp", "pp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: must be at least 1")
        for name in ("kv_blocks", "kv_cache_mib", "step_target_ms", "speculation", "threads", "grace"):
            if getattr(self, name) < 0:
                raise ConfigError(f"--{name.replace('_', '-')}: must not be negative")
        if self.collective_timeout < 1:
            raise ConfigError(f"--collective-timeout: must be at least 1 second, not {self.collective_timeout:g}")
        if self.block_size < 0 or (self.block_size and 256 % self.block_size):
            raise ConfigError(f"--block-size: must be a power of two up to 256, not {self.block_size}")
        if self.isa != "auto" and self.backend in ("reference", "cuda"):
            raise ConfigError(f"--isa: {self.isa} is for the cpu kernels, and --backend says {self.backend}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"--gpu-memory-utilization: must be in (0, 1], not {self.gpu_memory_utilization:g}")

    @property
    def name(self) -> str:
        return self.served_model_name or self.model.resolve().name

    @property
    def id(self) -> str:
        return self.worker_id or f"{socket.gethostname()}-{os.getpid()}"
