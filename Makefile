# Every target installs what it needs on first use. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# of test-latest; the newest on PyPI brings CUDA, several GB: TORCH_INDEX names an index of CPU wheels
TORCH_LATEST ?= torch
TORCH_INDEX ?=
WORKERS ?= 2
ARGS ?=
BROWSER ?= chromium
SCREENSHOTS ?= index install quickstart guide/index guide/tasks choosing migrating faq custom api \
  generated/sklearn_maml.MAMLRegressor methods diagnostics defaults engine results

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Threads that wait must not spin: on a busy machine that takes many times as long.
export OMP_WAIT_POLICY ?= PASSIVE
# Workers share the cores: torch threads on top of them only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=10

# $(call install,venv,constraints file or nothing,torch requirement,extra,pip flags)
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "sklearn_maml needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
  echo "Name another interpreter, for example: make PYTHON=python3.12 $(or $(MAKECMDGOALS),test)" >&2; \
  exit 1; }
@echo "[1/3] $(1): creating the environment"
@$(PYTHON) -m venv $(1)
@echo "[2/3] $(1): installing $(3) (a large download the first time)"
@$(1)/bin/python -m pip install -qq --disable-pip-version-check $(5) $(if $(2),-c $(2)) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(3)'
@echo "[3/3] $(1): installing sklearn_maml with its $(4) dependencies"
@$(1)/bin/python -m pip install -qq --disable-pip-version-check $(5) $(if $(2),-c $(2)) '$(3)' -e '.[$(4)]'
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  make %-21s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(STAMP) ## install everything into .venv

# what the kernels are built from: `pip install -e` builds them
KERNELS := setup.py $(wildcard sklearn_maml/native/*.cpp sklearn_maml/native/*.h)

$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	$(call install,$(VENV),constraints.txt,$(TORCH),dev,)
	@touch $@

.PHONY: demo
demo: $(STAMP) ## run the demo
	@$(BIN)/python examples/demo.py $(ARGS)

.PHONY: test
test: $(STAMP) ## run the fast tests and doctests, with coverage
	$(PYTEST) --cov --cov-report=term $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## run the tests marked slow
	$(PYTEST) -m slow $(ARGS)

.PHONY: test-integration
test-integration: $(VENV)/.integration-installed ## run the tests with clients of other projects
	$(PYTEST) -m integration $(ARGS)

$(VENV)/.integration-installed: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[integration]'
	@touch $@

.PHONY: fuzz
fuzz: $(STAMP) ## call everything with 20,000 odd arguments, and count what comes of it
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py $(ARGS)

.PHONY: test-min
test-min: ## run the fast tests on the oldest promised dependencies
	$(MAKE) --no-print-directory $(VENV)-min/.installed
	OMP_NUM_THREADS=1 $(VENV)-min/bin/python -m pytest -n $(WORKERS) --durations=10 $(ARGS)

$(VENV)-min/.installed: pyproject.toml constraints-min.txt $(KERNELS)
	$(call install,$(VENV)-min,constraints-min.txt,$(TORCH),test,)
	@touch $@

.PHONY: test-latest
test-latest: ## run the fast tests on the newest dependencies
	$(call install,$(VENV)-latest,,$(TORCH_LATEST),test,--upgrade --upgrade-strategy eager)
	OMP_NUM_THREADS=1 $(VENV)-latest/bin/python -m pytest -n $(WORKERS) --durations=10 $(ARGS)

.PHONY: lint
lint: $(STAMP) ## check style, types, the import order, the rules of the house and docstrings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/check_imports.py
	$(BIN)/python tools/check_house.py
	$(BIN)/python tools/check_docstrings.py

.PHONY: docs
docs: $(VENV)/.docs-installed ## build the documentation into docs/_build/html and check its links
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html
	$(BIN)/python tools/check_links.py docs/_build/html

# To look at the site without opening it. Needs a Chromium, of the system or named by BROWSER.
.PHONY: docs-screenshots
docs-screenshots: ## draw pages of the built documentation into docs/_build/screenshots
	@mkdir -p docs/_build/screenshots
	@for page in $(SCREENSHOTS); do \
	  $(BROWSER) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1400,2400 \
	    --screenshot=docs/_build/screenshots/$${page//\//-}.png \
	    file://$(CURDIR)/docs/_build/html/$$page.html 2>/dev/null && echo "$$page.html" || exit 1; \
	done

$(VENV)/.docs-installed: $(STAMP)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

.PHONY: bench
bench: $(STAMP) ## run the benchmarks, in about five minutes; ARGS go to benchmarks/run.py
	@$(BIN)/python benchmarks/run.py --seconds 30 $(ARGS)
	@$(BIN)/python benchmarks/cost.py --seconds 20 --turns 3
	@$(BIN)/python benchmarks/peers.py --seconds 7
	@$(BIN)/python benchmarks/whole_process.py --imports --turns 3
	@$(BIN)/python benchmarks/whole_process.py --cells W1:100,W1:1000 --turns 3

.PHONY: bench-gate
bench-gate: $(STAMP) ## compare the speed with that of another checkout: ARGS="--against FOLDER"
	@$(BIN)/python benchmarks/gate.py $(ARGS)

.PHONY: gpu
gpu: $(STAMP) ## measure a CUDA card, in under eight minutes; ARGS go to benchmarks/gpu.py
	@$(BIN)/python benchmarks/gpu.py $(ARGS)

.PHONY: bench-tabular
bench-tabular: $(STAMP) ## real collections against baselines (slow); ARGS="--data FOLDER" for all
	@$(BIN)/python benchmarks/tabular.py $(ARGS)

# The papers' tables, ours beside the published figures. Slow: half an hour each on two cores.
.PHONY: table-sinusoid
table-sinusoid: $(STAMP) ## sinusoid regression, every method (slow)
	@$(BIN)/python benchmarks/papers.py sinusoid $(ARGS)

.PHONY: table-omniglot-5w1s table-omniglot-5w5s table-omniglot-20w1s
table-omniglot-5w1s: $(STAMP) ## Omniglot, 5-way 1-shot, conv4 (slow)
	@$(BIN)/python benchmarks/papers.py omniglot --ways 5 --shots 1 $(ARGS)

table-omniglot-5w5s: $(STAMP) ## Omniglot, 5-way 5-shot, conv4 (slow)
	@$(BIN)/python benchmarks/papers.py omniglot --ways 5 --shots 5 $(ARGS)

table-omniglot-20w1s: $(STAMP) ## Omniglot, 20-way 1-shot, conv4 (slow)
	@$(BIN)/python benchmarks/papers.py omniglot --ways 20 --shots 1 $(ARGS)

# A copy of the package whose kernels check each access and each operation, under the tests of them.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
.PHONY: sanitize
sanitize: $(STAMP) ## run the tests of the kernels under ASan and UBSan
	CFLAGS="$(SANITIZERS)" CXXFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" $(BIN)/python \
	  setup.py -q build --build-lib $(SANITIZED) --build-temp $(SANITIZED)-objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=1 \
	  PYTHONPATH=$(SANITIZED) OMP_NUM_THREADS=1 $(BIN)/pytest -q -p no:cacheprovider tests/test_native.py \
	  tests/test_head_kernel.py tests/test_posterior_kernel.py $(ARGS)

.PHONY: arm
arm: ## run the tests of the kernels on 64-bit ARM, emulated (slow); needs packages of Debian
	@tools/arm.sh build/arm $(ARGS)

# Needs nothing of .venv: what is released is built from the sources alone.
.PHONY: dist
dist: ## build the source distribution and a wheel into dist, and check them
	@$(PYTHON) -m venv $(VENV)-dist
	@$(VENV)-dist/bin/python -m pip install -qq --disable-pip-version-check build twine auditwheel
	rm -rf dist
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/twine check --strict dist/*
	if [ "$$(uname)" = Linux ]; then $(VENV)-dist/bin/auditwheel show dist/*.whl; fi

.PHONY: clean
clean: ## remove caches, builds and environments
	rm -rf $(VENV) $(VENV)-min $(VENV)-latest $(VENV)-dist build dist *.egg-info sklearn_maml/native/*.so .coverage .coverage.* htmlcov \
	  .pytest_cache .ruff_cache .mypy_cache docs/_build docs/auto_examples docs/generated
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
