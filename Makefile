# make grid: environment, demo corpus, the whole grid on this machine, a table.   make test: everything the tests need, and the tests.
# make chaos: a grid on a real Slurm whose nodes, steps, controllers and slurmctld are killed at random, for ten minutes.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed

.PHONY: setup grid test test-speech test-jobs chaos lint format clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# torch first and alone, so that nothing chooses another; fairseq is built against it, hence no build isolation.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel cython numpy
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -r requirements.txt -r requirements-dev.txt
	touch $@

grid: setup
	$(RUN) launch.py grid demo

# Two halves at the same time: the tests of the job system wait for Slurm and for processes to start more than they compute.
test: setup
	bash tests/install_packages.sh
	$(MAKE) --no-print-directory --jobs=2 --output-sync=none --keep-going test-speech test-jobs

test-speech: setup
	$(RUN) -m pytest tests/ser_core tests/simulation

test-jobs: setup
	$(RUN) -m pytest --ignore=tests/ser_core --ignore=tests/simulation

chaos: setup
	bash tests/install_packages.sh
	$(RUN) -m tests.chaos --minutes 10

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
