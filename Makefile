# Everything a person types. `make help` lists the targets.

VENV := .venv
PY := $(VENV)/bin/python
TORCHRUN := OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone
TORCH := torch==2.13.0+cpu
PYTHON ?= python3
SEED ?= 0

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench demo-checkpoints demo-controls methods-table clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(VENV)/.ready ## create .venv with locked CPU packages and this package

# The CPU build of torch comes from wherever pip already finds it, else from PyTorch's own index.
$(VENV)/.ready: requirements/cpu.txt setup.py $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name 'native_build.py')
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch; assert torch.__version__ == "$(TORCH)".split("==")[1]' 2>/dev/null \
	  || $(PY) -m pip install --quiet --no-deps "$(TORCH)" \
	  || $(PY) -m pip install --quiet --no-deps "$(TORCH)" --index-url https://download.pytorch.org/whl/cpu
	$(PY) -m pip install --quiet --no-deps -r requirements/cpu.txt
	$(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup ## the whole job on this machine: rollouts, distillation, weight transfer, report
	$(TORCHRUN) --nproc-per-node 2 tools/train_sod.py --config configs/demo_cpu.yaml \
	  seed=$(SEED) name=demo-seed$(SEED) train.resume=never

test: setup ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not gpu and not slow"

test-slow: setup ## the long ones: soaks, fuzzing, full sizes
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "slow and not gpu"

check: setup ## formatter, linter, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: setup ## the op and the sandbox against their alternatives, written to docs/benchmarks/
	$(PY) kernels/bench/run.py

demo-checkpoints: setup ## make the demo's cold-start checkpoints again (about five minutes)
	$(PY) -m megatron_sod.data.tiny_models runs/demo_init
	$(TORCHRUN) --nproc-per-node 2 tools/train_sft.py --config configs/demo/sft_student.yaml
	$(TORCHRUN) --nproc-per-node 2 tools/train_sft.py --config configs/demo/sft_teacher.yaml

methods-table: setup ## every method on the demo's world, one seed, into docs/methods_results.md (2 hours)
	$(PY) tools/demo_table.py --table methods eval.teacher=false train.eval_interval=40

demo-controls: setup ## the README's table: seeds 0 1 2 and the controls, same budget (about an hour)
	$(PY) tools/demo_table.py

clean: ## remove the environment and build products; runs/ stays
	rm -rf $(VENV) build *.egg-info
