# Everything runs in .venv, made on first use and brought up to date when pyproject.toml or the constraints change.
# A machine needs Python 3.11 or newer and make, nothing else.

# The first interpreter that starts, is recent enough and can make environments; a pinned set exists for 3.11 to 3.13.
usable = $(shell for p in $(1); do "$$p" -c 'import sys, venv, ensurepip; sys.exit(not $(2))' >/dev/null 2>&1 \
	&& { command -v "$$p"; break; }; done)
TESTED  := (3, 11) <= sys.version_info[:2] <= (3, 13)
PYTHON  ?= $(or $(call usable,python3 python3.13 python3.12 python3.11 python,$(TESTED)),$\
	$(call usable,python3 python,sys.version_info >= (3, 11)))
PYTHON311 ?= $(call usable,python3.11 python3 python,sys.version_info[:2] == (3, 11))

VENV    := .venv
PY      := $(VENV)/bin/python
OLDEST  := .venv-oldest
ARGS    ?=
# Two tests at a time; those of a file follow each other in one process, since they share compiled programs.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What these environments install runs on the CPU; libtpu, which dev brings for compiling, would look for chips and complain.
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest lint format types imports proto tpu-compile-all golden clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

demo: $(VENV)/.installed-run ## start the server on the bundled model, ask it from several clients, show what the cache did
	@$(PY) tools/demo.py

test: $(VENV)/.installed-dev ## the whole test suite (ARGS="tests/kvcache -k name" for a part)
	$(PY) -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-oldest: $(OLDEST)/.installed ## the fast tests on the oldest supported versions (needs Python 3.11)
	$(OLDEST)/bin/python -m pytest -m "not slow" $(SIDE_BY_SIDE) $(ARGS)

lint: $(VENV)/.installed-dev ## ruff
	$(PY) -m ruff check .

format: $(VENV)/.installed-dev ## let ruff sort imports and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.installed-dev ## mypy
	$(PY) -m mypy

imports: $(VENV)/.installed-dev ## the import contracts of ARCHITECTURE.md
	$(VENV)/bin/lint-imports --no-logo

proto: $(VENV)/.installed-run ## generate the gRPC stubs again from the .proto file
	$(PY) tools/gen_proto.py

tpu-compile-all: $(VENV)/.installed-dev ## compile every TPU kernel for every chip, and whole steps (no TPU needed)
	@$(PY) tools/tpu_compile_all.py $(ARGS)

golden: $(VENV)/.installed-run ## make the reference outputs of the tests again (downloads torch and transformers)
	$(PY) tools/make_golden.py

clean: ## remove environments, caches and build output
	rm -rf $(VENV) $(OLDEST) .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info

# $(call install,environment,interpreter,constraints,extras)
# The build backend comes from the constraints too, hence no build isolation.
define install
	@test -n "$(2)" || { echo "no suitable Python found: 3.11 or newer with venv is needed (test-oldest: 3.11 itself); say PYTHON=/path/to/python or PYTHON311=..." >&2; exit 2; }
	@$(1)/bin/python -c 'import pip' >/dev/null 2>&1 || { echo "making $(1) with $(2)"; "$(2)" -m venv $(1); }
	@echo "installing hkv-jax[$(4)] into $(1)"
	@$(1)/bin/python -m pip install --quiet --constraint $(3) setuptools
	@$(1)/bin/python -m pip install --quiet --constraint $(3) --no-build-isolation --editable '.[$(4)]'
	@touch $@
endef

$(VENV)/.installed-run: pyproject.toml constraints.txt
	$(call install,$(VENV),$(PYTHON),constraints.txt,serving)

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,$(VENV),$(PYTHON),constraints.txt,serving$(comma)dev)
	@touch $(VENV)/.installed-run

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),$(PYTHON311),constraints-oldest.txt,serving$(comma)test)

comma := ,
