# Each target sets .venv up by itself when it is missing or older than what it is made from.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.made
AT ?= websocket
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Other packages, each in a virtual environment of its own, as whoever takes that one alone would have it. RLax is beside
# SBX: both are on JAX, which nothing else needs.
PEERS := sb3 sbx tianshou
PEERS_sb3 := stable-baselines3 sb3-contrib
PEERS_sbx := sbx-rl rlax
PEERS_tianshou := tianshou

.PHONY: setup peers demo test test-all lint types bench bench-table docs clean

setup: $(STAMP)

# torch first and by pip: the pin has a CPU wheel, and whatever is installed after it finds it there.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "longrein needs Python 3.11 or newer; set PYTHON=")'
	@echo "set-up: .venv by $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv
	@echo "set-up: torch"
	@$(PIP) install -c constraints.txt torch
	@echo "set-up: longrein and what its tests need"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# Other packages that compute or train the same: for outside proof and for benchmarks, apart from ours. About 4 GB.
peers: $(PEERS:%=.venv-peers/%/.made)

.venv-peers/%/.made: constraints.txt
	@echo "set-up: .venv-peers/$*"
	@$(PYTHON) -m venv .venv-peers/$*
	@.venv-peers/$*/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt torch
	@.venv-peers/$*/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt $(PEERS_$*) ale-py
	@touch $@

demo: setup
	$(BIN)/longrein run --at $(AT)

test: setup
	$(BIN)/python -m pytest -q -m 'not slow'

test-all: setup peers
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy longrein

bench: setup
	$(BIN)/python benchmarks/link.py

# What is not in docs/benchmarks yet; stop it and start it again as you like.
bench-table: setup
	$(BIN)/python benchmarks/table.py

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .venv-peers site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
