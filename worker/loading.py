"""From a worker's settings to a rank's runner: backend, weights, KV cache, the group's connections."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable

import torch

from qwire.service.config import ConfigError
from worker.config import WorkerConfig
from worker.kernels import ChosenKernels, Kernels, NativeError, choose_kernels, usable_cpus
from worker.model import ModelConfig
from worker.parallel import Group, Place
from worker.runner.memory import NoRoom
from worker.runner.runner import TorchRunner, kv_bytes_per_position, resolve_dtype, resolve_kv_dtype

log = logging.getLogger(__name__)

CPU_CACHE_MIB = 1024
GATHER_AFTER_SECONDS = 10.0
GATHERED = "weights and KV cache have all their memory"
"""What is logged then: a CPU's steps are as fast as they get."""


def load(config: WorkerConfig, group: Group, on_reading: Callable[[], None] = lambda: None) -> TorchRunner:
    """Loads a rank's share of the model; its runner is of use after `connect`. Raises ModelError or ConfigError.

    Args:
        on_reading: as of `load_model`.
    """
    started = time.monotonic()
    model = ModelConfig.read(config.model)
    chosen = _choose(config, model, group)
    runner = _runner(config, model, group, chosen.kernels, on_reading)
    if chosen.kernels.name == "cpu":
        torch.set_num_threads(1)  # beside the kernels' own threads, torch's would only be in the way
    log.info(
        "rank %d of %d loaded %s in %.1f s: weights %s, KV %s, %d threads",
        group.index,
        group.size,
        config.name,
        time.monotonic() - started,
        runner.dtype if runner.quantization == "none" else f"{runner.quantization} and {runner.dtype}",
        runner.kv_dtype,
        threads_of(config, group),
    )
    return runner


def gather_pages_later(runner: TorchRunner) -> None:
    """Calls `gather_pages` in the background, once the first requests have had the start to themselves."""

    def gather() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread
        started = time.monotonic()
        if runner.gather_pages():
            log.info("%s after %.1f s", GATHERED, time.monotonic() - started)

    timer = threading.Timer(GATHER_AFTER_SECONDS, gather)
    timer.daemon = True
    timer.start()


def connect(config: WorkerConfig, group: Group, place: Place, runner: TorchRunner) -> None:
    """Meets the other ranks, and makes the runner ready to execute. Raises GroupError or ConfigError."""
    kernels = runner.kernels
    group.connect(
        place.meeting, timeout=config.collective_timeout, device=kernels.device, ordered=kernels.batch_invariant
    )
    try:
        runner.make_ready()
    except NoRoom as error:
        raise ConfigError(f"--gpu-memory-utilization: {error}") from error
    log.info(
        "rank %d of %d: %d KV blocks of %d (%d MiB)",
        group.index,
        group.size,
        runner.num_blocks,
        runner.block_size,
        runner.num_blocks * runner.block_size * runner.kv_bytes_per_position // 2**20,
    )


def threads_of(config: WorkerConfig, group: Group) -> int:
    """That a rank computes with on a CPU."""
    return config.threads or max(1, len(usable_cpus()) // group.size)


def _choose(config: WorkerConfig, model: ModelConfig, group: Group) -> ChosenKernels:
    """The backend, with this rank's threads. Raises ConfigError."""
    from worker.kernels.cuda import CudaOptions

    threads = threads_of(config, group)
    dtype = resolve_dtype(model, config.dtype)
    options = CudaOptions(
        index=group.index,
        deterministic=config.deterministic,
        attention=config.attention,
        dtype=dtype,
        kv_dtype=resolve_kv_dtype(model, config.kv_dtype, config.dtype),
        head_dim=model.head_dim,
    )
    try:
        chosen = choose_kernels(config.backend, config.isa, head_dim=model.head_dim, threads=threads, cuda=options)
    except NativeError as error:
        raise ConfigError(f"--{'backend' if config.isa == 'auto' else 'isa'}: {error}") from error
    on_gpu = chosen.kernels.name == "cuda"
    if options.kv_dtype == torch.float8_e4m3fn and not on_gpu:
        raise ConfigError(f"--kv-dtype: fp8 is for the cuda kernels; the {chosen.kernels.name} kernels have int8")
    if options.kv_dtype == torch.int16 and on_gpu:
        raise ConfigError("--kv-dtype: int16 is for the cpu and reference kernels; the cuda kernels have bfloat16")
    torch.set_num_threads(threads)
    log.info(
        "backend %s, instruction set %s (%s), torch %s",
        chosen.kernels.name,
        chosen.kernels.isa,
        chosen.why,
        torch.__version__,
    )
    return chosen


def _runner(
    config: WorkerConfig, model: ModelConfig, group: Group, kernels: Kernels, on_reading: Callable[[], None]
) -> TorchRunner:
    from worker.kernels.cuda import CudaKernels
    from worker.runner.cuda import CudaRunner, CudaSettings

    kv_dtype = resolve_kv_dtype(model, config.kv_dtype, config.dtype, kernels)
    block_size = config.block_size or kernels.default_block_size
    block_bytes = block_size * group.world * kv_bytes_per_position(model, kv_dtype, group.world)
    on_gpu = isinstance(kernels, CudaKernels)
    mib = config.kv_cache_mib or (0 if on_gpu else CPU_CACHE_MIB)
    num_blocks = config.kv_blocks or mib * 2**20 // block_bytes
    if num_blocks < 1 and mib:
        raise ConfigError(f"--kv-cache-mib: one block takes {block_bytes} bytes")
    if not isinstance(kernels, CudaKernels):
        return TorchRunner(
            config.model,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=config.dtype,
            kv_dtype=config.kv_dtype,
            quantize=config.quantize,
            kernels=kernels,
            group=group,
            on_reading=on_reading,
        )
    if block_size % kernels.block_multiple:
        raise ConfigError(
            f"--block-size: {kernels.attention} takes multiples of {kernels.block_multiple}, not {block_size}"
        )
    return CudaRunner(
        config.model,
        kernels=kernels,
        settings=CudaSettings(
            max_step_tokens=config.max_step_tokens,
            max_running=config.max_running,
            memory_share=config.gpu_memory_utilization,
            graphs=config.cuda_graphs,
        ),
        num_blocks=num_blocks or None,
        block_size=block_size,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        quantize=config.quantize,
        group=group,
    )
