#!/usr/bin/env bash
# Compiles the CPU kernels anew, where their sources changed, into the working tree.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python setup.py --quiet build_ext --inplace
