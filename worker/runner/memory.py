"""How many KV blocks a GPU has room for, beside weights and what a step takes at most."""

from __future__ import annotations

from worker.kernels.cuda.device import Memory

GRAPH_BYTES = 256 * 2**20
"""What recorded graphs take besides the logits that they leave: nodes, and the largest rung's activations."""


class NoRoom(Exception):
    """Not even one block fits; says what is in the way."""


def blocks_that_fit(after: Memory, share: float, *, borrowed: int, graph_logits: int, block_bytes: int) -> int:
    """KV blocks of `block_bytes` each.

    Args:
        after: the GPU's memory behind a step of the largest size; `peak` is what weights and that step took.
        share: of the GPU's memory that this process may use in all, in (0, 1].
        borrowed: bytes of `peak` that only that step's stand-in for the cache took.
        graph_logits: bytes that graphs will keep for logits; 0 where there are no graphs.

    Raises NoRoom.
    """
    others = after.total - after.free - after.reserved  # other processes, and CUDA itself
    own = after.peak - borrowed
    graphs = GRAPH_BYTES + graph_logits if graph_logits else 0
    left = int(after.total * share) - others - own - graphs
    if left < block_bytes:
        mib = 2**20
        raise NoRoom(
            f"{share:g} of {after.total // mib} MiB leaves {max(left, 0) // mib} MiB for keys and values, and "
            f"one block takes {block_bytes} bytes: {others // mib} MiB are others' and CUDA's, {own // mib} MiB are "
            f"weights and the largest step's, {graphs // mib} MiB are for graphs"
        )
    return left // block_bytes
