# The environment lives in .venv. `make demo` and `make test` set up what they need; the second time they just run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint format clean help

help:
	@echo "make demo       train a DNC on the copy task (about 3 minutes on two CPU cores); ARGS='--help' shows what it takes"
	@echo "make test       the tests (under 10 minutes on two CPU cores)"
	@echo "make test-slow  the tests that take longer: trainings"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff format the code"
	@echo "make clean      remove .venv and what tools leave behind"

demo: .venv/.train
	$(BIN)/python -m dnc_triton train copy $(ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest $(ARGS)

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# One stamp per set of extras: .venv/.train for users, .venv/.dev for the tests and linters on top.
.venv/.train .venv/.dev: .venv/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@
