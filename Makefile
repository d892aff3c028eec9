# make grid: environment, demo corpus, the whole grid on this machine, a table.
# make test: everything the tests need, and all tests.   make test-fast: those without Slurm and whole grids, and none that takes long.   make lint: style, types.
# make explore: the state machine of the controller with fresh random examples; MINUTES=20, SEED=n repeats a run.
# make gpu-check: what only a GPU can prove, and how fast it is there, in 8 minutes; ARGS=--cpu runs what needs none.
# make chaos: a grid on a real Slurm under 300 random faults of processes, nodes, slurmctld and file system; MINUTES, FAULTS, SEED=n (docs/chaos.md).
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TORCH ?= torch==2.13.0
STAMP := $(VENV)/.installed
WORKERS ?= 5# test processes: those of Slurm mostly wait, so more than there are cores
PARALLEL = --dist loadfile --no-loadscope-reorder
ONE_A_CORE = --numprocesses logical --maxprocesses 4
MINUTES ?= 20
FAULTS ?= 300
unexport PYTHONDONTWRITEBYTECODE  # the tests start hundreds of processes: each would compile every module again

.PHONY: setup grid test test-fast explore chaos gpu-check lint format clean
.DELETE_ON_ERROR:

setup: $(STAMP)

# torch first and alone, so that nothing chooses another; fairseq is built against it, hence no build isolation. It also installs torchaudio,
# which nothing here needs; where it was built for another torch, models of transformers that import it fail, and it is removed.
$(STAMP): requirements.txt requirements-dev.txt constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel cython numpy
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -r requirements.txt -r requirements-dev.txt
	$(RUN) -c 'from transformers import Wav2Vec2ForPreTraining' 2>/dev/null || $(RUN) -m pip uninstall --quiet --yes torchaudio
	touch $@

grid: setup
	$(RUN) launch.py grid demo

test: setup
	bash tests/install_packages.sh
	$(RUN) -m pytest $(PARALLEL) --numprocesses $(WORKERS)

test-fast: setup
	$(RUN) -m pytest $(PARALLEL) $(ONE_A_CORE) -m "not slurm and not end_to_end and not slow"

explore: setup
	$(RUN) -m tests.simulation.explore --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

chaos: setup
	bash tests/install_packages.sh
	$(RUN) -m tests.chaos --minutes $(MINUTES) --faults $(FAULTS) $(if $(SEED),--seed $(SEED))

# Without `setup`: PYTHON names an environment with CUDA torch and what docs/gpu-check.md lists.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(RUN) tools/structure.py --check

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
