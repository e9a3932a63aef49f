#!/usr/bin/env bash
# Writes requirements.lock: the newest versions that pyproject.toml allows, for Python 3.11 on this platform.
set -euo pipefail
cd "$(dirname "$0")/.."
links=$(scripts/wheels.sh)
"$(scripts/uv.sh)" pip compile --quiet --upgrade --python-version 3.11 --extra serve --extra dev \
  ${links:+--find-links "$links"} --constraint <(echo torch==2.13.0) --no-emit-package torch --no-emit-find-links \
  --no-header --no-annotate pyproject.toml --output-file requirements.lock
