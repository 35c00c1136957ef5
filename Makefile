# make setup | test | coverage | test-gpu | demo | lint | tracelens | clean. A fresh machine needs make, gcc and Python 3.11 or newer with venv
# (Debian: apt-get install make gcc python3-venv).

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
PYTEST_ARGS ?=
# One stamp per content of these files: nothing is installed again until one of them changes.
STAMP := .venv/.stamp-$(shell cat pyproject.toml requirements-lock.txt tools/setup_venv.sh | sha256sum | cut -c1-16)

.PHONY: setup test coverage test-gpu demo lint tracelens clean

setup: $(STAMP)

$(STAMP):
	tools/setup_venv.sh "$(PYTHON)"
	@rm -f .venv/.stamp-*
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Two files of tests at a time; three take as long on two cores. Tests that watch deadlines of tens of milliseconds fail
# now and then on a machine that others use too: what fails is tried twice more, and the end of the run names it.
CPU_TESTS := tests/unit tests/ranks tests/kernels --reruns 2 -r sR --durations 25
test: lint
	$(BIN)/python -m pytest $(CPU_TESTS) -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Tracing costs half as much again, in every process that a test starts.
coverage: setup
	$(BIN)/python -m pytest $(CPU_TESTS) --cov --cov-report=term $(PYTEST_ARGS)

# Needs a GPU; what needs two is skipped, with the reason, where there is one. First what may share a GPU, several at
# once, then what must have it alone.
test-gpu: setup
	$(BIN)/python -m pytest -m "gpu and not alone" tests/gpu -n 8 $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m "gpu and alone" tests/gpu $(PYTEST_ARGS)

demo: setup
	$(BIN)/yalis demo

# AMD's TraceLens is not on PyPI (a package of that name is another one), and has dependencies of its own.
TRACELENS ?= git+https://github.com/AMD-AGI/TraceLens.git
tracelens: setup
	test -d .venv-tracelens || $(PYTHON) -m venv .venv-tracelens
	.venv-tracelens/bin/pip install --quiet "$(TRACELENS)"
	YALIS_TRACELENS_PYTHON="$(CURDIR)/.venv-tracelens/bin/python" \
		$(BIN)/python -m pytest tests/ranks/study/test_study_traces.py

clean:
	rm -rf .venv .venv-tracelens .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis htmlcov build dist
	rm -f .coverage .coverage.* coverage.xml
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
