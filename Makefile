# Everything a newcomer types; each target makes what it needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: setup quickstart test check check-native check-neon format tables docs new
setup: $(STAMP)

$(STAMP): pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[test,dev]'
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart.py

test: setup
	$(BIN)/pytest -q -n 2

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/tables.py --check
	$(BIN)/mkdocs build -q --strict

check-native: setup  # the kernels with sanitizers, minutes
	$(BIN)/python scripts/check_native.py

check-neon: setup  # the kernels for ARM, in an emulator, minutes
	$(BIN)/python scripts/check_neon.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

tables: setup
	$(BIN)/python scripts/tables.py

docs: setup
	$(BIN)/mkdocs build --strict

new: setup  # make new FAMILY=weights NAME=foo
	$(BIN)/python scripts/new_method.py $(FAMILY) $(NAME)
