#!/usr/bin/env bash
# Imports the client on exactly the oldest dependencies that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=$(scripts/uv.sh)
[ -x .venv-floors/bin/python ] || "$uv" venv --quiet --python 3.11 .venv-floors
QWIRE_NATIVE=0 "$uv" pip install --quiet --python .venv-floors/bin/python --resolution lowest-direct .
(cd /tmp && "$OLDPWD/.venv-floors/bin/python" - <<'PY'
import google.protobuf, grpc, qwire
from qwire.v1 import admin_pb2_grpc, generation_pb2_grpc, models_pb2_grpc, tokenizer_pb2_grpc, worker_pb2_grpc
with qwire.Client("127.0.0.1:1"):
    print(f"client {qwire.__version__} loads on grpcio {grpc.__version__} and protobuf {google.protobuf.__version__}")
PY
)
