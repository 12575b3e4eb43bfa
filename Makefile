# Every target sets up what it needs: a virtual environment in .venv, the pinned packages, the native build.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# Without ninja on the path PyTorch compiles one file after the other.
export PATH := $(CURDIR)/$(BIN):$(PATH)
SOURCES := $(wildcard csrc/*.* csrc/cpu/*.* csrc/cuda/*.*)

.PHONY: demo test lint bench bench-cpu wheel clean

demo: .venv/built  ## quantize a small model, fine-tune it on real text, print a table
	$(BIN)/python -m qlora.demo

test: .venv/built  ## every test, the slow ones too
	$(BIN)/python -m pytest -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

bench: .venv/built  ## ops, a whole model and the formats' errors on this CPU, about 15 minutes; tables, plots
	$(BIN)/python -m bench run --device cpu
	$(BIN)/python -m bench model --device cpu
	$(BIN)/python -m bench quality
	$(BIN)/python -m bench report

bench-cpu: bench

wheel: .venv/built  ## sdist and wheel, in dist/
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf .venv build dist *.egg-info quantlib/*.so

.venv/installed: constraints.txt pyproject.toml
	@echo "Setting up .venv: PyTorch, the packages of constraints.txt and the native kernels, about 3 minutes"
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(PIP) setuptools ninja torch
	@$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

# Compiler output is kept for the case of an error. The object files of the installation are used again.
.venv/built: .venv/installed setup.py $(SOURCES)
	@echo "Compiling what changed in csrc/"
	@mkdir -p build
	@$(BIN)/python setup.py -q build_ext --inplace > build/log || { cat build/log; exit 1; }
	@touch $@
