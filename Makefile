# The project's tasks. `make` alone lists them. Needs GNU make 4 and Python 3.11 or newer.

PYTHON ?= python3
EXTRAS ?= experiments,test,metrics,notebooks,zoo
WORKERS ?= 2
CORE_TESTS ?= $(filter-out tests/test_notebooks.py,$(wildcard tests/test_*.py)) \
  $(wildcard $(addprefix tests/,adapters analysis arithmetic methods transform variants decoding training \
  models/gpt2 models/llama models/parts models/test_zoo.py))
PEERS_TESTS ?= tests/interop tests/models tests/decoding/test_beam.py tests/docs/test_parity.py \
  tests/docs/test_variants.py \
  tests/experiments/test_finetune.py
PEERS_EXTRAS = $(EXTRAS),peers
LLAMA_CPP := 3.22.1
NIGHTLY_INDEX ?=

# The libraries that follow JAX's releases: `make test-newest` takes the newest of each and the
# others as constraints.txt has them.
MOVES_WITH_JAX := jax jaxlib flax optax orbax-checkpoint equinox dm-haiku keras numpy scipy \
  ml_dtypes

PYTEST := pytest --no-header -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.ONESHELL:
.SHELLFLAGS := -ec
.SILENT:
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

pythons = $(foreach minor,$(1),python3.$(minor) \
  $(wildcard $(HOME)/.pyenv/versions/3.$(minor).*/bin/python))

# $(call find_python,MINOR,COMMANDS): sets $python to the first of the commands that runs Python
# 3.MINOR or newer, and to nothing if none does. From inside a virtual environment it is the
# interpreter beneath, since the environment may be about to be replaced.
define find_python
python=
for command in $(2); do
  python=$$("$$command" -c 'import sys; sys.version_info < (3, $(1)) and sys.exit(1); \
    print(sys._base_executable)' 2>/dev/null) && break
  python=
done
endef

find_newest_python = $(call find_python,12,$(call pythons,14 13 12) $(PYTHON))

# $(call environment,NAME): makes the virtual environment NAME with $python, or brings it up to
# date. It is made anew if its interpreter is broken or of another version, or if it was moved.
define environment
version=$$("$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
expected="$$version $(CURDIR)"
present=$$($(1)/bin/python -c 'import pip, sys; print("%d.%d" % sys.version_info[:2], \
  open("$(1)/.made").read().strip())' 2>/dev/null) || present=
if [ "$$present" != "$$expected" ]; then
  rm -rf $(1)
  "$$python" -m venv $(1) || {
    rm -rf $(1)
    echo "make: $$python cannot make virtual environments; install its venv module" \
      "(Debian, Ubuntu: apt-get install python$$version-venv)" >&2
    exit 1
  }
  echo "$(CURDIR)" > $(1)/.made
fi
[ "$$(cat $(1)/.stamp 2>/dev/null)" = "$(EXTRAS)" ] || rm -f $(1)/.stamp
$(MAKE) $(1)/.stamp
endef

# $(call pip_install,NAME,ARGUMENTS): says what goes wrong and nothing else.
pip_install = $(1)/bin/python -m pip install -qq $(2)

.PHONY: help
help:  ## list the tasks
	echo "make e2e and make test set up everything they need. The tasks:"
	awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

.PHONY: venv
venv:  ## set up .venv, or bring it up to date
	$(call find_python,11,$(PYTHON) $(call pythons,13 12 11))
	if [ -z "$$python" ]; then
	  echo "make: Python 3.11 or newer is needed, and '$(PYTHON)' is not one" \
	    "($$("$(PYTHON)" --version 2>&1 | head -n 1)); install it, or name it:" \
	    "make PYTHON=/path/to/python3.11" >&2
	  exit 1
	fi
	$(call environment,.venv)

.venv/.stamp: pyproject.toml constraints.txt
	echo "Installing the requirements into .venv (minutes the first time) ..."
	$(call pip_install,.venv,-c constraints.txt -e '.[$(EXTRAS)]')
	echo "$(EXTRAS)" > $@

.PHONY: e2e
e2e: venv  ## the main job: GPT-2 adapted to E2E with LoRA, from the data to the scores
	.venv/bin/python -m experiments.gpt2_e2e

.PHONY: smollm2
smollm2: venv  ## fetch SmolLM2-135M-Instruct (98 MB) into the cache, for --model=smollm2
	.venv/bin/python -m lora_jax.models.checkpoints.pretrained smollm2

# Types are checked on one core while the tests run.
.PHONY: test
test: lint  ## lint, types, tests and doctests
	$(MAKE) -j2 types tests-only

.PHONY: tests-only
tests-only: venv
	.venv/bin/python -m $(PYTEST)

.PHONY: test-all
test-all: test-newest lint types  ## the same with the long tests, after test-newest
	.venv/bin/python -m $(PYTEST) -m ""

.PHONY: lint
lint: venv  ## style and format (ruff)
	failed=
	.venv/bin/python -m ruff check --quiet . || failed=1
	output=$$(.venv/bin/python -m ruff format --check --output-format concise . 2>&1) || {
	  printf '%s\n' "$$output"
	  failed=1
	}
	[ -z "$$failed" ]

.PHONY: types
types: venv  ## types (pyright)
	output=$$(.venv/bin/python -m pyright --pythonpath .venv/bin/python 2>&1) || {
	  printf '%s\n' "$$output"
	  exit 1
	}

.PHONY: format
format: venv  ## put the sources into the project's format, fix what ruff can fix
	.venv/bin/python -m ruff check --fix-only --quiet .
	.venv/bin/python -m ruff format --quiet .

.PHONY: coverage
coverage: venv  ## which lines the tests run
	.venv/bin/python -m $(PYTEST) --cov --cov-report=term

.PHONY: newest-python
newest-python:
	$(find_newest_python)
	echo "$$python"

.PHONY: venv-newest
venv-newest:
	$(find_newest_python)
	[ -n "$$python" ] || { echo "make: no Python 3.12 or newer found" >&2; exit 1; }
	$(call environment,.venv-newest)

.venv-newest/.stamp: pyproject.toml constraints.txt
	echo "Installing the newest JAX into .venv-newest (minutes the first time) ..."
	grep -v $(MOVES_WITH_JAX:%=-e '^%==') constraints.txt > .venv-newest/constraints.txt
	$(call pip_install,.venv-newest,-U -c .venv-newest/constraints.txt \
	  $(MOVES_WITH_JAX) -e '.[$(EXTRAS)]')
	echo "$(EXTRAS)" > $@

.PHONY: test-newest
test-newest:  ## the core's tests on the newest JAX, if there is a Python 3.12 or newer
	$(find_newest_python)
	if [ -z "$$python" ]; then
	  echo "test-newest: nothing tested, no Python 3.12 or newer found for the newest JAX"
	  exit 0
	fi
	$(MAKE) venv-newest
	$(call run_core_tests,.venv-newest)

.PHONY: test-peers
test-peers:  ## models and adapters compared with the installed transformers and PEFT
	$(call find_python,11,$(PYTHON) $(call pythons,13 12 11))
	$(call environment,.venv-peers)
	.venv-peers/bin/python -m $(PYTEST) $(PEERS_TESTS)

.venv-peers/.stamp: pyproject.toml constraints.txt
	echo "Installing the requirements and the peers into .venv-peers (minutes the first time) ..."
	$(call pip_install,.venv-peers,-c constraints.txt -e '.[$(PEERS_EXTRAS)]')
	echo "$(EXTRAS)" > $@

.PHONY: test-served
test-served:  ## GGUF models and adapters in llama.cpp itself, if there is node
	if ! node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>/dev/null \
	  || ! npm --version >/dev/null 2>&1; then
	  echo "test-served: nothing tested, node 20 or newer with npm is needed for llama.cpp"
	  exit 0
	fi
	$(MAKE) venv .served/$(LLAMA_CPP)
	.venv/bin/python -m pytest --no-header -m served tests/served

# On Linux the packages for GPUs, 640 MB, are left out.
.served/$(LLAMA_CPP):
	echo "Installing llama.cpp (node-llama-cpp $(LLAMA_CPP)) into .served ..."
	rm -rf .served
	mkdir .served
	platform=$$(node -p 'process.platform + "-" + process.arch')
	case "$$platform" in
	  linux-*) packages="--omit=optional @node-llama-cpp/$$platform@$(LLAMA_CPP)" ;;
	  *) packages=
	esac
	npm install --prefix .served --ignore-scripts --no-audit --no-fund --loglevel=error --save-exact \
	  node-llama-cpp@$(LLAMA_CPP) $$packages >/dev/null
	touch $@

.PHONY: test-nightly
test-nightly:  ## the core's tests on a JAX nightly, where pip finds one
	$(find_newest_python)
	if [ -z "$$python" ]; then
	  echo "test-nightly: a JAX nightly needs Python 3.12 or newer, and none was found" >&2
	  exit 1
	fi
	rm -f .venv-nightly/.stamp  # each run looks for that day's nightly
	$(call environment,.venv-nightly)
	$(call run_core_tests,.venv-nightly)

.venv-nightly/.stamp: pyproject.toml constraints.txt
	nightly='$(if $(NIGHTLY_INDEX),--extra-index-url $(NIGHTLY_INDEX)) --pre -U jax jaxlib'
	found=$$(.venv-nightly/bin/python -m pip install --dry-run --no-deps --ignore-installed \
	  $$nightly 2>&1 | grep -e '^Would install' -e ERROR | tail -n 1)
	case "$$found" in
	  *jax-*dev*) ;;
	  *)
	    echo "test-nightly: nothing tested, pip finds no JAX nightly ($$found); name a package" \
	      "index that has one: make test-nightly NIGHTLY_INDEX=..." >&2
	    exit 1
	esac
	echo "Installing a JAX nightly into .venv-nightly (minutes the first time) ..."
	grep -v $(MOVES_WITH_JAX:%=-e '^%==') constraints.txt > .venv-nightly/constraints.txt
	$(call pip_install,.venv-nightly,-c .venv-nightly/constraints.txt -e '.[$(EXTRAS)]')
	$(call pip_install,.venv-nightly,$$nightly)
	echo "$(EXTRAS)" > $@

define run_core_tests
$(1)/bin/python -c 'import jax, platform; \
  print("JAX", jax.__version__, "on Python", platform.python_version())'
$(1)/bin/python -m $(PYTEST) -m "not long" $(CORE_TESTS)
endef

.PHONY: clean
clean:  ## remove caches and build outputs
	rm -rf build dist *.egg-info .coverage .coverage.* .pytest_cache .ruff_cache
	find . \( -path './.venv*' -o -path ./.git \) -prune -o \
	  -name __pycache__ -prune -exec rm -rf {} +

.PHONY: clean-venvs
clean-venvs:  ## remove the virtual environments; .venv-newest then gets that day's newest JAX
	rm -rf .venv .venv-newest .venv-nightly .venv-peers .served
