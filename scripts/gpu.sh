#!/usr/bin/env bash
# Runs a Python module in a .venv with PyTorch for CUDA, on a machine that has an NVIDIA GPU: scripts/gpu.sh MODULE ARGS
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e /dev/nvidiactl ] && ! command -v nvidia-smi > /dev/null; then
  echo "nothing was run: this machine has no NVIDIA GPU that CUDA could reach (neither /dev/nvidiactl nor nvidia-smi)" >&2
  exit 2
fi
export TORCH_BACKEND=${TORCH_BACKEND:-cu130}
scripts/setup.sh
UV=$(scripts/uv.sh)
export UV
exec .venv/bin/python -m "$@"
