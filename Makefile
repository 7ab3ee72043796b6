# `make search` and `make test` do all their own set-up. An active virtual environment is used as it is; otherwise .venv is made.
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
PY := $(VENV)/bin/python
PYTHON3 ?= python3
TORCH ?= 2.13.0
STAMP := $(VENV)/.star-installed
SANITIZED := build/sanitize/.built
SECONDS ?= 600
WORKERS ?= 2
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find kernels -name '*.cpp' -o -name '*.h')
ARGS ?=

.PHONY: search test test-all lint bench docs gpu fuzz setup clean help

help:
	@echo "make search [ARGS='--preset smoke']   search architectures on this machine; opens nothing, prints where report.html is"
	@echo "make test [WORKERS=2]                 lint, types and the quick tests (CI runs this), so many at once"
	@echo "make test-all                         the slow tests too"
	@echo "make bench                            pytest bench/: kernels against ceilings and peers"
	@echo "make docs                             the documentation, in build/docs"
	@echo "make gpu [DRY=1]                      tests and benchmarks on a GPU; DRY=1 the same way through Triton's interpreter"
	@echo "make fuzz [SECONDS=600]               random calls of the compiled operators under sanitizers, for SECONDS"

search: setup
	$(PY) -m search.run $(ARGS)

# The second run takes the Triton kernels through Triton's interpreter, which has to be chosen before they are imported.
test: lint
	$(PY) -m pytest -n $(WORKERS)
	@if $(PY) -c 'import triton' 2>/dev/null; then TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/kernels -n $(WORKERS) && \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/star_core/test_graph_decoding.py -k triton -n $(WORKERS); \
	else echo "triton is not installed here: its kernels are not tested"; fi

test-all: lint
	$(PY) -m pytest -m 'slow or not slow'

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: setup
	$(PY) -m pytest bench/

docs: setup
	@$(PY) -c 'import latex2mathml, material, mkdocstrings_handlers.python' 2>/dev/null || $(PY) -m pip install -e '.[docs]'
	$(PY) -m mkdocs build --strict

# On a machine with a CUDA or ROCm device; the packages that are installed there are peers. DRY=1 goes the same way on a
# CPU, through Triton's interpreter, with the few cases that it is fast enough for.
gpu: setup
ifdef DRY
	TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels/test_norm.py tests/kernels/test_memoryless.py
	TRITON_INTERPRET=1 $(PY) -m pytest bench/ -k 'rms_norm and D100' --star-backend triton --star-seconds 0 --star-json build/dry.json
else
	STAR_TEST_DEVICE=cuda $(PY) -m pytest tests/kernels
	STAR_TEST_DEVICE=cuda $(PY) -m pytest tests/star_core/test_graph_decoding.py -k gpu
	$(PY) -m pytest bench/ --quick --star-device cuda --star-json "bench/results/$$($(PY) -m bench.hardware)-quick.json"
endif

fuzz: $(SANITIZED)
	$(PY) -m tests.fuzz --seconds $(SECONDS) --libraries build/sanitize/lib

# The best instruction set that this machine runs; an empty list, where nothing is compiled yet, means all of them.
$(SANITIZED): $(STAMP)
	$(PY) -m pip install --quiet 'cmake>=3.24' ninja
	export PATH="$(abspath $(VENV))/bin:$$PATH"; \
	isa=$$($(PY) -c 'from star_kernels import _native; print(_native.isa())') && \
	cmake -S . -B build/sanitize -G Ninja -DSTAR_SANITIZE=ON -DSTAR_ISAS=$$isa && \
	cmake --build build/sanitize
	@touch $@

setup: $(STAMP)

$(PY):
	$(PYTHON3) -m venv $(VENV)

# Linux on x86-64 without an NVIDIA or AMD GPU takes the CPU build of torch: the default build there brings gigabytes of CUDA libraries.
# pip finds "+cpu" where its configured indexes carry it; uv knows by itself where torch's CPU builds are.
$(STAMP): $(PY) $(SOURCES)
	@if $(PY) -c 'import torch' 2>/dev/null; then :; \
	elif [ "$$(uname -sm)" != "Linux x86_64" ] || command -v nvidia-smi >/dev/null 2>&1 || [ -e /dev/kfd ]; then \
	    $(PY) -m pip install "torch==$(TORCH)"; \
	else \
	    $(PY) -m pip install "torch==$(TORCH)+cpu" || \
	    { $(PY) -m pip install uv && $(PY) -m uv pip install --python $(PY) --torch-backend cpu "torch==$(TORCH)"; }; \
	fi
	$(PY) -m pip install -e '.[search,bench,test]'
	@$(PY) -c 'from star_kernels import backends; print("compiled operators:", backends()["cpp"].reason)'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
