#!/usr/bin/env bash
# Generates the stubs under qwire/v1 from protos/, with the oldest tools whose output loads on every supported runtime
# (a stub refuses to load on a runtime older than its generator). Usage: scripts/protos.sh OUT_DIR
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/protos.sh OUT_DIR}
uv=$(scripts/uv.sh)
if [ ! -x .venv-protos/bin/python ]; then
  "$uv" venv --quiet --python 3.11 .venv-protos
fi
# setuptools: grpc_tools 1.76 still imports pkg_resources, which newer ones no longer ship.
"$uv" pip install --quiet --python .venv-protos/bin/python grpcio-tools==1.76.0 mypy-protobuf==5.1.0 'setuptools<81'
mkdir -p "$out/qwire/v1"
find "$out/qwire/v1" -name '*_pb2*' -delete
PATH=$PWD/.venv-protos/bin:$PATH .venv-protos/bin/python -m grpc_tools.protoc --proto_path=protos \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" protos/qwire/v1/*.proto
