#!/usr/bin/env bash
# Fails where qwire/v1 is not what protos/ generates.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
scripts/protos.sh "$fresh" >/dev/null 2>&1 || { echo "protos don't compile" >&2; exit 1; }
touch "$fresh/qwire/v1/__init__.py"
diff --recursive --brief --exclude=__pycache__ "$fresh/qwire/v1" qwire/v1 || { echo "stubs are stale: make protos" >&2; exit 1; }
