# make demo and make test need only Python >= 3.11; everything they install goes into .venv
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all benchmark-quick speed chaos lint types docs look format clean

demo: .venv/installed
	$(BIN)/clusterguard demo

test: .venv/installed
	$(BIN)/pytest -q -n 2 --dist worksteal

test-all: .venv/installed
	CLUSTERGUARD_TESTS=thorough $(BIN)/pytest -q -n 2 --dist worksteal -m "not gpu and not network"

# every MNIST experiment on a tiny network and few images: wiring, not numbers
benchmark-quick: .venv/installed
	$(BIN)/python -m benchmarks run mnist --profile quick --device cpu
	$(BIN)/python -m benchmarks report --profile quick --pages runs/quick/pages

speed: .venv/installed
	$(BIN)/python -m benchmarks.studies.speed run --device cpu
	$(BIN)/python -m benchmarks.studies.speed profile --device cpu
	$(BIN)/python -m benchmarks.studies.speed memory --device cpu
	$(BIN)/python -m benchmarks.studies.speed harm --device cpu
	$(BIN)/python -m benchmarks.studies.speed table

# damages files, kills writers, shares guards between threads and attacks the service; fails if anything goes unnoticed
chaos: .venv/installed
	$(BIN)/python -m benchmarks.studies.chaos

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# not --quiet: that drops warnings before they are counted, so nothing would ever be an error
docs: .venv/installed
	@log=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict 2>&1) || { echo "$$log"; exit 1; }

# opens every page in a Chromium; needs `.venv/bin/pip install playwright` besides
look: docs
	$(BIN)/python docs/look.py site

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt tests/peers.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs,plots]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement tests/peers.txt
	touch $@
