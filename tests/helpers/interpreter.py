"""Kernels in Triton under its interpreter: import this before anything of `worker.kernels.cuda.triton`.

Triton reads the variable while it decorates kernels. Where a GPU is to be tested, the caller's environment says 0.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

TOLERANCE = {"torch.float32": 1e-5, "torch.bfloat16": 3e-2, "torch.float16": 3e-3}
"""By dtype, for results of size 1. The interpreter rounds to bfloat16 by cutting off, so two of its ulps."""
