"""Runs the engine's steps on a model: KV tensors, batch metadata, one forward pass a step."""

from worker.runner.parallel import ParallelRunner, follow
from worker.runner.runner import TorchRunner, kv_bytes_per_position

__all__ = ["ParallelRunner", "TorchRunner", "follow", "kv_bytes_per_position"]
