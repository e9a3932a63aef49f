#!/usr/bin/env bash
# Makes .venv: Python 3.11, torch for CPUs or what TORCH_BACKEND names (cu130), everything in requirements.lock, and this
# package in place.
# Finished work is not done again: a stamp holds the digest of all that went in.
set -euo pipefail
cd "$(dirname "$0")/.."
backend=${TORCH_BACKEND:-cpu}
stamp=$(cat <(echo "$backend") requirements.lock pyproject.toml setup.py scripts/setup.sh worker/kernels/cpu/native/* | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/qwire ] && [ "$(cat .venv/stamp 2>/dev/null)" = "$stamp" ]; then exit; fi
uv=$(scripts/uv.sh)
[ -x .venv/bin/python ] || "$uv" venv --quiet --python 3.11 .venv
# torch is not in the lock: the package index holds only its CUDA builds, gigabytes of them. Where pip is told of a
# folder of wheels, the CPU build is taken from there, elsewhere from PyTorch's own index of CPU builds.
links=$(scripts/wheels.sh)
if [ "$backend" = cpu ] && [ -n "$links" ]; then
  "$uv" pip install --quiet --python .venv/bin/python --find-links "$links" torch==2.13.0
else
  # Another backend's build of the same version would do, in uv's eyes.
  "$uv" pip install --quiet --python .venv/bin/python --reinstall-package torch --torch-backend="$backend" torch==2.13.0
fi
"$uv" pip install --quiet --python .venv/bin/python --requirement requirements.lock
"$uv" pip install --quiet --python .venv/bin/python --no-deps --editable .
# Importing torch takes more than twice as long where Python has to compile its modules first, and it does so at every start
# of a process that may not write bytecode. Some packages hold files in the syntax of other Pythons: those stay as they are.
.venv/bin/python -m compileall -qq -j 0 .venv/lib qwire router tokenizer_svc worker || true
echo "$stamp" > .venv/stamp
