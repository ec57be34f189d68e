# `make help` lists what there is. Every target makes what it needs, once.
#
#   make test PYTHON=python3.12            the interpreter that makes the environment
#   make test VENV=/path                   the environment's folder
#   make test VENV= PYTHON=python3         no environment: that Python as it is, nothing installed
#   make demo TORCH="torch torchvision --index-url URL"      another torch, e.g. one without CUDA
#   make test ARGS="-k losses"             more arguments for pytest or dafl_fast.train

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
ARGS ?=

ifneq ($(strip $(VENV)),)
  BIN := $(abspath $(VENV))/bin/
  PY := $(BIN)python
  STAMPS := $(VENV)/stamps
  PIP := $(PY) -m pip install --disable-pip-version-check
  INSTALL := $(PIP) --quiet
  BUILD := $(PY) tools/build.py --install
else
  BIN :=
  PY := $(PYTHON)
  STAMPS := build/stamps
  PIP := @: nothing to install:
  INSTALL := $(PIP)
  BUILD := $(PY) tools/build.py
endif

# For what must run offline: the environment's Python if there is one already, else the machine's.
PY_AS_IS = $(if $(wildcard $(PY)),$(PY),$(PYTHON))

CXX_FILES := $(shell find csrc -type f -name '*.[chi]*')
BUILD_FILES := $(shell find csrc) setup.py pyproject.toml dafl_fast/_version.py

# What caps our kernels, PyTorch's own, oneDNN's and MKL's at one instruction set.
CAP_baseline := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
CAP_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
CAP_avx512 := ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512
ISA ?= avx2
CAPPED = DAFL_FAST_ISA=$(ISA) $(CAP_$(ISA)) TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-$(ISA)
# Tests whose results are no matter of the CPU's instructions, or that start other commands.
ANY_ISA := architecture arguments bench config containers cuda cuda_emulated cuda_layers_emulated \
    cuda_model data distributed docs emulation export faults files gpu_check hostile info \
    kill_check live make mutants networks notices onnx packaging progress report reproduce \
    schedule threads train_teacher

SECONDS ?= 60
KILLS ?= 100

.PHONY: help demo test test-isa bench lint format build cuda-check cuda-build-check gpu-check \
    sanitize sanitize-cpu hostile fuzz kill-check mutants arm-check arm-wheel dist dist-check clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

demo: $(STAMPS)/build ## distil a student from the bundled MNIST teacher, without data
	@$(PY) -m tools.demo
	$(PY) -m dafl_fast.train $(ARGS)

test: $(STAMPS)/test ## run the tests
	$(PY) -m pytest $(ARGS)

test-isa: $(STAMPS)/test ## run the tests that compute, capped at ISA=avx2, baseline or avx512
	$(if $(CAP_$(ISA)),,$(error ISA must be baseline, avx2 or avx512, got $(ISA)))
	$(CAPPED) $(PY) -m pytest -m 'not slow' \
	    $(ANY_ISA:%=--ignore=tests/test_%.py) $(ARGS)

# Capped only where ISA is asked for.
bench: $(STAMPS)/test ## run the benchmarks (5 to 15 minutes), if you say so capped at ISA=avx2
	@mkdir -p bench/out
	$(if $(filter command,$(origin ISA)),$(CAPPED)) $(PY) -m pytest bench --benchmark-only \
	    --benchmark-json=bench/out/latest.json $(ARGS)
	$(PY) bench/report.py bench/out/latest.json

lint: $(STAMPS)/lint ## check style and types, change nothing
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(BIN)clang-format --dry-run --Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(STAMPS)/lint ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(BIN)clang-format -i $(CXX_FILES)

build: $(STAMPS)/build ## compile the extension and say how it was built
	@$(PY) -c 'import dafl_fast; print(dafl_fast.build_info())'

cuda-check: ## compile every CUDA kernel, count its instructions and check them against budgets
	@echo '== Compiling the kernels for three architectures, no GPU needed (about 2 minutes)'
	@$(PY_AS_IS) tools/cuda_check.py $(ARGS)

gpu-check: ## build, test and measure on the visible GPU (8 minutes at most); without one a dry run
	$(PY_AS_IS) tools/gpu_check.py $(ARGS)

sanitize: ## compute-sanitizer (memory, races, barriers) over every kernel, on the visible GPU
	$(PY_AS_IS) tools/gpu_check.py --only build,sanitizer $(ARGS)

sanitize-cpu: $(STAMPS)/test ## AddressSanitizer, UndefinedBehaviorSanitizer over kernels and operators
	@echo '== Compiling the CPU kernels with sanitizers, and running them (1 to 2 minutes)'
	@$(MAKE) --no-print-directory -C tests/aarch64 sanitize
	@echo '== Compiling the extension with sanitizers, and testing its operators (about 10 minutes)'
	$(PY) tools/sanitize_cpu.py $(ARGS)

hostile: $(STAMPS)/test ## give all hostile files to all readers (some minutes)
	$(PY) -m tests.hostile $(ARGS)

fuzz: $(STAMPS)/test ## change good files at random for SECONDS=60, and read them
	$(PY) -m tests.hostile --fuzz $(SECONDS) $(ARGS)

kill-check: $(STAMPS)/test ## kill runs at KILLS=100 random moments, and compare how they end
	$(PY) tools/kill_check.py --kills $(KILLS) $(ARGS)

mutants: $(STAMPS)/test ## change the CUDA kernels in one place after the other: which test finds it?
	$(PY) tools/mutants.py $(ARGS)

cuda-build-check: $(STAMPS)/torch ## compile with CUDA in a throw-away folder, warnings are errors
	@echo '== Compiling with CUDA, warnings are errors (1 to 3 minutes)'
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	DAFL_FAST_CUDA=1 DAFL_FAST_WERROR=1 $(PY) setup.py --quiet build \
	    --build-lib "$$folder/lib" --build-temp "$$folder/temp" > "$$folder/log" 2>&1 \
	    || { cat "$$folder/log"; exit 1; } && \
	grep '^dafl_fast' "$$folder/log" && cd "$$folder/lib" && \
	$(PY) -c 'import dafl_fast; i = dafl_fast.build_info(); print(i); assert i["cuda"]'

arm-check: ## cross-compile the CPU kernels for ARM, and compare each with scalar code under qemu
	@echo '== Checking the kernels for ARM (1 to 3 minutes)'
	@$(MAKE) --no-print-directory -C tests/aarch64

arm-wheel: $(STAMPS)/python ## build a wheel for ARM with a cross-compiler, and run it under qemu
	@echo '== Building a wheel for ARM (about 5 minutes; the first time also 500 MB to fetch)'
	$(PY) tools/arm_wheel.py $(ARGS)

dist: $(STAMPS)/torch ## build the source distribution, and the wheel from it
	@echo '== Building the source distribution and the wheel (about 2 minutes)'
	rm -rf dist
	$(PY) setup.py --quiet sdist
	$(PY) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	@ls -sh dist

# The new environment sees torch and the rest where they are already installed; the wheel comes first.
dist-check: dist $(STAMPS)/build ## install the wheel into a new environment and use it there
	@echo '== Using the wheel in a new environment, away from the sources'
	@unset PYTHONPATH; set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(PY) -m venv "$$folder/venv"; new="$$folder/venv/bin/python"; \
	"$$new" -m pip install --quiet --disable-pip-version-check --no-deps dist/*.whl; \
	$(PY) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
	    > "$$("$$new" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"; \
	mkdir "$$folder/empty"; cd "$$folder/empty"; \
	"$$new" -c 'import dafl_fast, sys; assert dafl_fast.__file__.startswith(sys.prefix), dafl_fast'; \
	"$$new" -m dafl_fast.info; "$$new" -m dafl_fast.train --max-seconds 3

clean: ## remove what was built; the environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f dafl_fast/_C*.so $(STAMPS)/build

$(STAMPS)/python:
ifneq ($(strip $(VENV)),)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'Python 3.10 or newer is needed: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
endif
	@mkdir -p $(@D) && touch $@

$(STAMPS)/torch: $(STAMPS)/python
ifneq ($(strip $(VENV)),)
	@echo '== Installing torch and torchvision (up to 3 GB, some minutes; once)'
	@command -v nvidia-smi > /dev/null || echo '   One without CUDA has a tenth of that:' \
	    'make TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"'
endif
	$(PIP) 'setuptools>=77' ninja $(TORCH)
	@touch $@

$(STAMPS)/build: $(BUILD_FILES) | $(STAMPS)/torch
	@echo '== Compiling the extension (1 to 3 minutes; later only what changed)'
	$(BUILD)
	@touch $@

# With the package installed, this adds only what an extra asks for on top.
$(STAMPS)/test $(STAMPS)/lint: pyproject.toml | $(STAMPS)/build
	$(INSTALL) 'dafl_fast[$(@F)]'
	$(if $(filter test,$(@F)),$(INSTALL) --no-deps rapidocr) # for an ONNX file that is in it
	@touch $@
