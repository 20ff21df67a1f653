# make demo   set up and run the main job on the embedded network
# make test   set up and run the tests
# Everything is installed into .venv, pinned by constraints.txt. Needs only Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS := torch,onnx,onnxruntime,openvino,simplify,solver,digits,images,dev,docs
OUT ?= out/demo
SHARED := $(or $(TERSOR_SHARED),../shared)

.PHONY: demo test test-all check docs bench install clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile | head -n 3
	@echo 'also: make test-all | check | docs | bench | install | clean'

# torch comes first and alone, so that the build that this machine has (CPU or GPU) is taken as it is
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("tersor needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $(STAMP)

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/tersor demo --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --max-worker-restart=0

test-all: $(STAMP)
	$(BIN)/python -m pytest -m 'not gpu and not network'

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pyright --verifytypes tersor --ignoreexternal
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/tables.py
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
ifeq ($(wildcard $(SHARED)/workloads),)
	@echo 'skipped aa.py, agreement.py, all_runtimes.py, clustered_int8.py, decomposition.py, deep_compression.py, distillation.py, explain_int8.py, explain_slow.py, fusion.py, mixed_precision.py, oneshot.py, pruning_coverage.py, pruning_peers.py, quantization_peers.py, repair.py, slow_cases.py, sparse.py and unstructured.py: they need the shared data (set TERSOR_SHARED)'
else
	$(BIN)/python benchmarks/aa.py $(SHARED)/workloads/cifar.py:resnet20 --data $(SHARED)/workloads/cifar.py:data
	$(BIN)/python benchmarks/quantization_peers.py
	$(BIN)/python benchmarks/mixed_precision.py
	$(BIN)/python benchmarks/explain_int8.py
	$(BIN)/python benchmarks/agreement.py
	$(BIN)/python benchmarks/repair.py
	$(BIN)/python benchmarks/unstructured.py
	$(BIN)/python benchmarks/oneshot.py
	$(BIN)/python benchmarks/sparse.py
	$(BIN)/python benchmarks/pruning_coverage.py
	$(BIN)/python benchmarks/pruning_peers.py
	$(BIN)/python benchmarks/deep_compression.py
	$(BIN)/python benchmarks/clustered_int8.py
	$(BIN)/python benchmarks/distillation.py
	$(BIN)/python benchmarks/decomposition.py
	$(BIN)/python benchmarks/fusion.py
	$(BIN)/python benchmarks/slow_cases.py
	$(BIN)/python benchmarks/explain_slow.py
	$(BIN)/python benchmarks/all_runtimes.py
endif

clean:
	rm -rf $(VENV) build dist site out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
