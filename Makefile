.PHONY: help run test test-full test-compile lint bench image lock
PY := .venv/bin/python
# A file's tests stay in one process, which shares what it has compiled. Three, also on two cores: many wait for processes they started.
TOGETHER := -n 3 --dist loadfile
export JAX_PLATFORMS ?= cpu
# Where it is set, each process of the tests would rewrite and compile all of them anew in every run.
unexport PYTHONDONTWRITEBYTECODE

help: ## what you can type
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: ## set up, then run the quickstart job on this machine: two processes, a kill and a resume
	@./setup.sh train
	@$(PY) docs/quickstart.py

test: ## set up, then all tests that need no cluster
	@./setup.sh dev
	@$(PY) -m pytest $(TOGETHER) -m "not full"

test-full: ## the wide grids too
	@./setup.sh dev
	@$(PY) -m pytest $(TOGETHER)

test-compile: ## compile the matrix of tests/compile for TPUs that are not here; an hour on 2 cores
	@./setup.sh dev
	@$(PY) -m tests.compile

lint: ## ruff, ruff format, pyright
	@./setup.sh dev
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m pyright

bench: ## the measurements of docs/performance.md
	@./setup.sh dev
	@$(PY) -m tests.bench

image: ## build the container image for CPU
	@./setup.sh train
	@.venv/bin/nnxlaunch image build --target cpu

lock: ## compile requirements/*.txt again (needs uv)
	@requirements/compile.sh
