# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One thread for each of the two test processes: more of either only makes them wait for each other.
PYTEST_ARGS ?= -n 2 --dist loadfile
PHOTOS ?= examples/photos/*.jpg
check_dirs := src tests examples benchmarks .ci

.PHONY: help demo test style quality dist clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# The stamp is named after the extra that it stands for, and is older than pyproject.toml when that changes.
$(VENV)/%.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV) with the extra '$*' (once; a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@

demo: $(VENV)/timm.installed ## Caption the bundled photos with the small checkpoint
	$(BIN)/mue-hf caption $(PHOTOS)

test: $(VENV)/dev.installed ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

style: $(VENV)/dev.installed ## Format the code, fix what can be fixed, renew the checkpoint's copies of it
	$(BIN)/ruff check --fix $(check_dirs)
	$(BIN)/ruff format $(check_dirs)
	@# a checkpoint carries the code that loads it where the package is not installed
	cp src/mue_hf/*_mue.py checkpoints/mue-flickr8k-small/

quality: $(VENV)/dev.installed ## Check format and lint without a change
	$(BIN)/ruff check $(check_dirs)
	$(BIN)/ruff format --check $(check_dirs)

dist: $(VENV)/dev.installed ## Build wheel and sdist, and check the wheel in a clean environment
	rm -rf build dist
	$(BIN)/python -m build
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet --upgrade pip
	build/venv/bin/python -m pip install --quiet dist/*.whl
	cd build && venv/bin/python -I ../.ci/check_wheel.py ../src/mue_hf

clean: ## Remove what the other targets made, the environment too
	rm -rf $(VENV) build dist mue-captions .pytest_cache .ruff_cache src/*.egg-info
