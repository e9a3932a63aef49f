.PHONY: setup demo test soak lint format protos lock docs bench test-gpu bench-gpu clean
SHELL := bash
# UV fetches the demo model: .venv has no pip. PROMPT is exported, so that no shell reads it a second time: a prompt may hold quotes.
export PROMPT = What is the capital of France?

setup:  ## .venv with everything
	@scripts/setup.sh

demo: setup  ## a real model answers PROMPT through router, tokenizer service and worker
	@UV=$$(scripts/uv.sh) .venv/bin/qwire demo --prompt "$$PROMPT"

test: setup  ## all tests, two files at a time: most of them wait for processes
	@UV=$$(scripts/uv.sh) .venv/bin/pytest -n 2 --dist loadfile $(ARGS)

soak: setup  ## everything at once for 20 minutes, with a process killed or stopped every 20 seconds
	@.venv/bin/python -m tests.faults.soak $(ARGS)

lint: setup  ## formatting, types, folder rules, contracts, stubs, floors, containers
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@.venv/bin/buf lint protos
	@.venv/bin/buf breaking protos --against protos/released.binpb
	@scripts/check-stubs.sh
	@scripts/check-floors.sh
	@.venv/bin/check-jsonschema --builtin-schema vendor.compose-spec compose.yaml
	@.venv/bin/hadolint deploy/Dockerfile

format: setup
	@.venv/bin/ruff format .
	@.venv/bin/ruff check --fix .

protos:  ## stubs under qwire/v1
	@scripts/protos.sh .

lock:  ## requirements.lock anew
	@scripts/lock.sh

docs: setup  ## docs/settings.md
	@.venv/bin/python -m scripts.settings > docs/settings.md

bench: setup  ## the engine on the demo model, against transformers
	@UV=$$(scripts/uv.sh) .venv/bin/python -m benchmarks.engine

test-gpu:  ## the cuda backend against the reference, on this machine's first GPU
	@scripts/gpu.sh benchmarks.gpu_check $(ARGS)

bench-gpu:  ## the engine on this machine's first GPU, beside its limits, and vLLM where it is installed
	@scripts/gpu.sh benchmarks.gpu_bench $(ARGS)

clean:
	rm -rf .venv .venv-protos .venv-floors .uv
