"""The light client of the service's benchmark reads real streams."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmarks.stream_client import Load, stream_client
from tests.helpers.stacks import running_stack, write_tiny_model


def test_rates_of_streams_and_none_of_one_that_fails(tmp_path: Path) -> None:
    with running_stack(write_tiny_model(tmp_path / "tiny"), "tiny") as stack, stream_client(stack.address) as client:
        for seed in range(2):
            begun = time.perf_counter()
            rate = client.rate(Load(4, 8, 1000, 256, seed))  # so many that they don't come all at once
            # Most tokens came while all streams decoded, in less time than has passed by now.
            assert rate > 4 * 500 / (time.perf_counter() - begun)
        with pytest.raises(RuntimeError, match="failed"):
            client.rate(Load(4, 8, 64, 2**31, 2))  # ids that the model doesn't have
