# The commands of this project; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
LOCK := requirements.lock
LOCKS := $(LOCK) requirements-detectron2.lock requirements-tools.lock
# uv links files out of its cache; where that lies on another file system it copies them.
LINK_MODE := cache=$$($(BIN)/uv cache dir) && mkdir -p "$$cache" && \
  ln -f Makefile "$$cache/link" 2>/dev/null && rm "$$cache/link" && echo hardlink || echo copy
INSTALL := UV_LINK_MODE=$${UV_LINK_MODE:-$$($(LINK_MODE))} \
  $(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation
COMPILE := --quiet --upgrade --universal --python-version 3.11 --fork-strategy fewest \
  --generate-hashes --no-annotate --custom-compile-command "make lock"
CONFIG ?= configs/scenes/semask_scenes.yaml
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train camvid nuclei benchmark quick lowest test lint format docs lock clean

help: ## list the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1|/' | \
	  while IFS='|' read -r name text; do printf '  make %-9s %s\n' "$$name" "$$text"; done

setup: $(READY) ## create the locked environment in .venv, with Detectron2
	@echo "Ready. Next: make train; or . $(VENV)/bin/activate, then semask --help"

train: $(READY) ## train and evaluate a small SeMask-FPN (CONFIG=..., ARGS="KEY VALUE ...")
	$(BIN)/python train_net.py --config-file $(CONFIG) $(ARGS)

camvid: $(READY) ## SeMask, then plain Swin, on CamVid (in DETECTRON2_DATASETS)
	$(BIN)/python train_net.py camvid/semask_camvid $(ARGS)
	$(BIN)/python train_net.py camvid/swin_camvid $(ARGS)

nuclei: $(READY) ## Mask R-CNN with SeMask on cell nuclei (in DETECTRON2_DATASETS)
	$(BIN)/python train_net.py nuclei/semask_mask_rcnn $(ARGS)

benchmark: $(READY) ## time and memory against the plain form, over half an hour (ARGS=--help)
	$(BIN)/python benchmarks/run.py --output output/benchmark $(ARGS)

quick: $(READY) ## the fast tests, between edits (ARGS="tests/test_x.py" for some of them)
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

lowest: ## the fast tests with the lowest versions that setup.cfg allows, in .venv-lowest
	$(MAKE) quick VENV=.venv-lowest LOCK=requirements-lowest.lock

test: lint ## all static checks and all tests
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(READY) ## check formatting, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY) ## format the code, and fix what can be fixed automatically
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## build docs/ and the docstrings as a site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site"

lock: $(READY) ## update the lock files to the newest versions
	$(BIN)/uv pip compile $(COMPILE) --all-extras setup.cfg requirements.in -o requirements.lock
	$(BIN)/uv pip compile $(COMPILE) --resolution lowest-direct --extra bands --extra dev --extra onnx --extra timm --extra hub \
	  setup.cfg requirements-lowest.in -o requirements-lowest.lock
	printf 'setuptools\nuv\nwheel\n' | \
	  $(BIN)/uv pip compile $(COMPILE) -c requirements.lock - -o requirements-tools.lock
	printf 'pb1-detectron2==0.6\n' | \
	  $(BIN)/uv pip compile $(COMPILE) --no-deps - -o requirements-detectron2.lock

clean: ## remove the environment and every cache
	rm -rf .venv .venv-lowest build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	rm -rf projects/SeMask/*.egg-info

# Always from an empty folder, so that an interrupted or outdated environment leaves nothing
# behind; what was downloaded before comes from uv's cache. Packages without a wheel (all of them
# pure Python) are built with the locked setuptools, and of Detectron2 only the Python files, so no
# compiler is needed.
$(READY): $(LOCKS) setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "'$(PYTHON)' is missing or older than Python 3.11. Name another: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make environments (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@echo "Making the environment in $(VENV) (about 3 GB to download the first time, 7 GB on disk):"
	@echo "some minutes, in which nothing is printed."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements-tools.lock
	@$(INSTALL) --require-hashes -r $(LOCK)
	@$(INSTALL) --require-hashes --no-deps -r requirements-detectron2.lock \
	  --config-settings-package "pb1-detectron2:--global-option=build_py" \
	  --config-settings-package "pb1-detectron2:--build-option=--skip-build"
	@$(INSTALL) --no-deps --editable .
	@touch $@
