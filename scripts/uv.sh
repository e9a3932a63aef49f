#!/usr/bin/env bash
# Prints the path of a uv to use: the one on PATH, else one installed from the package index into .uv, once.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v uv; then exit; fi
if [ ! -x .uv/bin/uv ]; then
  python3 -m venv .uv >&2
  .uv/bin/python -m pip install --quiet --disable-pip-version-check uv >&2
fi
echo "$PWD/.uv/bin/uv"
