"""Every Triton kernel as it ships, compiled for every architecture, without a GPU: nothing spills, everything fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ARCHITECTURES = {80: 163, 90: 227, 100: 227}
"""And the kB of shared memory that a block may have there."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(arch: int) -> None:
    # A process of its own: in this one, kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scripts.triton_kernels", "--check", str(arch)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    made = [json.loads(line) for line in done.stdout.splitlines()]
    kernels = {one["kernel"] for one in made}
    assert {"decode", "ragged", "linear", "experts", "cuts", "scores", "mask", "rope_and_cache", "rms_norm"} <= kernels
    assert [one for one in made if one["spilled"]] == []
    assert [one for one in made if one["shared"] > ARCHITECTURES[arch] * 1024] == []
    # Registers of all threads of a block, of 65,536.
    assert all(one["registers"] * one["warps"] * 32 <= 65536 for one in made)
