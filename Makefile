PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

.PHONY: help setup search smoke leaderboard mlflow test lint bench gpu-check clean

help: ## these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(INSTALLED) ## the virtual environment, with everything installed

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

search: setup ## the main job: a small As-ViT search with growth, to a printed leaderboard
	$(BIN)/python search/run.py as_vit --trials 60 --img-size 224 --proxy-img-size 64 --max-params-m 12

smoke: setup ## a study of seconds, to try the installation
	$(BIN)/python search/run.py smoke

leaderboard: setup ## the leaderboard of the main job
	$(BIN)/python -m results.leaderboard as_vit

mlflow: setup ## MLflow on the default store, in the browser
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db --port 5000

test: setup ## the whole test suite
	$(BIN)/python -m pytest

lint: setup ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: setup ## the micro-benchmarks, one after the other
	for bench in tests/benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

gpu-check: setup ## what needs a CUDA device: its tests and the profile of the catalogue
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python search/run.py evaluate deit_small --evaluators profile --gpus 1

clean: ## the virtual environment; results under runs/ stay
	rm -rf $(VENV)
