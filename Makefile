# The two commands a newcomer needs are `make demo` and `make test`; each sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/demo
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all check bench clean setup lock format

demo: $(READY)  ## demonstrations, policy, evaluation and report of the lift task
	$(BIN)/vla-rl run configs/experiment/demo.yaml --out $(RUN)

test: $(READY)  ## fast suite
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(READY)  ## everything, slow tests included
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)  ## lint, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(READY)  ## speed of data reading, of policies, of simulation and of reinforcement learning
	$(BIN)/vla-rl bench data --json results/bench_data.json
	$(BIN)/vla-rl bench latency --json results/bench_latency_fresh.json
	$(BIN)/vla-rl bench sim --json results/bench_sim.json
	$(BIN)/vla-rl run configs/experiment/bench_train.yaml --out runs/bench
	$(BIN)/vla-rl bench train --policy runs/bench/pretrain --json results/bench_train.json

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(READY)

$(READY): requirements.lock pyproject.toml scripts/setup.sh
	PYTHON=$(PYTHON) VENV=$(VENV) bash scripts/setup.sh
	touch $(READY)

lock: $(READY)  ## write requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --extra dev --generate-hashes --no-header --no-annotate --no-emit-index-url -o requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
