# make demo    real video to shards, training on two processes, evaluation, samples, export (minutes on a CPU)
# make test    the quick tests          make test-all   also the slow ones
# make check   linter, types and the direction of imports
# make env     the virtual environment .venv that all of them use (made when missing or out of date)

PYTHON ?= python3
BIN := .venv/bin
# Tests run beside each other and start processes of their own: one thread each. A file's tests stay together where
# they can, as they share trained runs.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --import-mode=importlib
# Type checkers and import-linter do not see an editable install of a namespace; they see these links.
NAMES := .venv/names
PACKAGES := pretrain parallel datasets launch

.PHONY: env demo test test-all check clean

env: .venv/installed

.venv/installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,autoencoders,text,onnx]'
	mkdir -p $(NAMES)/msc
	for package in $(PACKAGES); do ln -sfn $(CURDIR)/$$package $(NAMES)/msc/$$package; done
	touch $@

demo: env
	./demo.sh

test: env
	$(PYTEST) -m 'not slow'

test-all: env
	$(PYTEST)

check: env
	$(BIN)/ruff check .
	MYPYPATH=$(NAMES) $(BIN)/mypy $(PACKAGES:%=-p msc.%)
	MYPYPATH=$(NAMES):tests/bench $(BIN)/mypy tests/bench/*.py
	PYTHONPATH=$(NAMES) $(BIN)/lint-imports --no-cache --no-logo

clean:
	rm -rf .venv demo_run build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
