# Bare `make` lists the targets. Everything runs in .venv, made on first use.
PYTHON ?= python3
# For a CPU-only torch from another index: make demo TORCH_ARGS="--index-url URL"
TORCH_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
# Processes of tests beside each other; each computes on one thread.
BESIDE := -n auto --maxprocesses 4
READY := $(VENV)/.ready
# Isolated builds obey the same pins.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow faults sanitize sanitize-run test-gpu check format bench bench-report golden clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON); install Python 3.10 or newer, or set PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: $$($(PYTHON) -V) is too old; 3.10 or newer is needed"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "error: Python's venv module is missing; on Debian: apt install python3-venv"; exit 2; }
	@command -v g++ >/dev/null || echo "note: no g++; the data loader will run on NumPy, which is slower"
	@echo "installing into $(VENV) (once; about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip download -q --no-deps -d $(VENV)/probe tqdm >/dev/null 2>&1 || { echo "error: no package index answers; check the network and 'pip config list'"; exit 2; }
	@$(BIN)/pip install -q $(TORCH_ARGS) torch
	@$(BIN)/pip install -q -e '.[offline,plot,test]'
	@touch $@

demo: $(READY)  ## train a small GPT on Python's own sources, plot it, let it write
	@test ! -d checkpoints/demo || echo "checkpoints/demo is there already: starting anew"
	@rm -rf checkpoints/demo checkpoints/.demo.* checkpoints/demo_gold checkpoints/demo_fp16 logs/train/demo_eval.jsonl loss.png
	$(BIN)/mypt-fast prepare --demo --tokenization char --out_dir data/demo_char --overwrite
	$(BIN)/mypt-fast train --config configs/tiny_char.json --dataset_dir data/demo_char --model_name demo \
	  --max_iters 1400 --learning_rate 3e-3 --warmup_iters 100 --dropout 0 \
	  --eval_interval 200 --eval_iters 10
	$(BIN)/mypt-fast plot logs/train/demo_eval.jsonl --out loss.png
	$(BIN)/mypt-fast generate --model_name demo_gold --prompt "class " --max_new_tokens 500 \
	  --temperature 0.9 --repeat_window 0 --seed 1

test: $(READY)  ## the default tests: under 5 minutes, no GPU, no network
	$(BIN)/python -m pytest -q $(BESIDE) -m "not slow and not gpu"

test-slow: $(READY)  ## the tests marked slow, and every Triton kernel in Triton's interpreter
	$(BIN)/python -m pytest -q -m "slow and not gpu"
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(BESIDE) -m "not gpu" tests/kernels tests/test_model_kernels.py

SANITIZED := tests/data/test_native.py tests/data/test_loader.py tests/data/test_prefetch.py \
  tests/data/test_order.py tests/data/test_mixture.py tests/data/test_fuzz_formats.py \
  tests/data/test_format_many.py
sanitize: $(READY)  ## the loader's tests under the address, undefined and thread sanitizers
	@$(MAKE) -s sanitize-run KIND=address,undefined LIBRARY=libasan.so
	@$(MAKE) -s sanitize-run KIND=thread LIBRARY=libtsan.so

faults: $(READY)  ## the whole fault suite: deaths, full disks, flipped bits, hostile files, bad configs
	MYPT_FAULTS=10000 $(BIN)/python -m pytest -q -s tests/faults

sanitize-run:
	MYPT_SANITIZE=$(KIND) MYPT_REQUIRE_NATIVE=1 $(BIN)/python setup.py -q build \
	  --build-lib build/$(LIBRARY) --build-temp build/$(LIBRARY).o
	LD_PRELOAD="$$(g++ -print-file-name=$(LIBRARY)) $$(g++ -print-file-name=libstdc++.so)" \
	  PYTHONPATH=build/$(LIBRARY):$(CURDIR) OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 \
	  TSAN_OPTIONS=exitcode=66:suppressions=$(CURDIR)/tests/thread_sanitizer.supp \
	  $(BIN)/pytest -q -p no:cacheprovider $(SANITIZED)

test-gpu: $(READY)  ## the same kernel tests, compiled, on a GPU
	$(BIN)/python -m pytest -q -m gpu

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## all benchmarks (about 10 minutes on 2 cores)
	$(BIN)/python -m pytest bench/ --benchmark-only

bench-report: $(READY)  ## docs/performance.md and the README's tables from bench/results
	$(BIN)/python bench/report.py

golden: $(READY)  ## rewrite the frozen --help texts
	MYPT_UPDATE_GOLDEN=1 $(BIN)/python -m pytest -q tests/cli

clean:  ## remove what was built; runs, logs and data stay
	rm -rf $(VENV) build dist *.egg-info mypt_fast/_native*.so .pytest_cache .mypy_cache .ruff_cache
