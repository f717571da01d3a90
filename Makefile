PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

# results/reports/ablations_cifar10_202611.md: four trials share a GPU
CIFAR_FLAGS = --seeds 9 --epochs 30 --robustness --gpus 0.25

# results/reports/vit_resnas_cifar_slice_202611.md: the full run on CIFAR-10, two budgets and one supernet
RESNAS = $(BIN)/python search/run.py vit_resnas --data $(CIFAR) --space vit_resnas/cifar --mixing patch_tokens --batch-size 256 \
  --epochs 120 --retrain-epochs 200 --set inherited.num_images=2500 --seeds 3 --gpus 0.25

# of different kinds, all at home at 32 px
SMALL_NETWORKS = vit_digits,reduced:evit,keep=0.7:vit_digits,as_vit_seed,timm:test_vit,timm:test_convnext,timm:test_mambaout,timm:test_byobnet,timm:test_efficientnet

# the catalogue and 40 Vision Transformers of timm
GPU_MODELS = *,timm:vit_*_patch16_224,timm:vit_*_patch32_224,timm:deit3_*_patch16_224,timm:swin_*_patch4_window7_224,timm:cait_*_224,$\
	timm:pit_?_224,timm:pit_??_224,timm:xcit_*_12_p16_224,timm:tiny_vit_*_224,timm:pvt_v2_b?

# two processes, each with whole files of tests, the files with slow tests first
IN_PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help setup search benchmark ablations reduce vit-resnas smoke leaderboard mlflow check test lint bench gpu-check clean

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

benchmark: setup ## which of eight small networks for digits on this CPU: speed, accuracy, a winner per budget; five minutes on two idle cores
	$(BIN)/python search/run.py benchmark --models $(SMALL_NETWORKS) --data digits --epochs 27 --max latency_ms=2 --max params_m=0.2

ablations: setup ## which pooling pays off on digits: seven poolings, three paired seeds, effects with intervals; some 7 minutes
	$(BIN)/python search/run.py ablations --factor pooling --data digits --seeds 3

reduce: setup ## which token reduction pays off without retraining, on networks trained on digits, beside two trivial baselines
	$(BIN)/python search/run.py reduce --data digits --seeds 3 --epochs 30

vit-resnas: setup ## a supernet on digits, searched by evolution, and the best trained beside hand-made and random networks; five minutes
	$(BIN)/python search/run.py vit_resnas --epochs 40 --retrain-epochs 30 --trials 200 --top 1 --random 1 --seeds 2

smoke: setup ## a study of seconds, to try the installation
	$(BIN)/python search/run.py smoke

leaderboard: setup ## the leaderboard of the main job
	$(BIN)/python -m results.leaderboard as_vit

mlflow: setup ## MLflow on the default store; prints the addresses of the leaderboards
	$(BIN)/python -m results.browse sqlite:///$(CURDIR)/runs/mlflow.db
	$(BIN)/mlflow server --backend-store-uri sqlite:///$(CURDIR)/runs/mlflow.db --port 5000

check: lint ## while developing: lint, types, all tests but the slow ones; within 3 minutes on two cores
	$(BIN)/python -m pytest -m 'not slow' $(IN_PARALLEL)

test: setup ## the whole test suite; within 15 minutes on two cores
	$(BIN)/python -m pytest $(IN_PARALLEL)

lint: setup ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

bench: setup ## the micro-benchmarks, one after the other
	for bench in tests/benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

gpu-check: setup ## what needs a CUDA device: its tests, profiles, training and mixing speed; with CIFAR=tar:TRAIN,TEST the CIFAR-10 studies
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python tests/benchmarks/bench_peak.py
	$(BIN)/python search/run.py profile --name profile_gpu --models '$(GPU_MODELS)' --precision fp32,bf16 --execution eager,compile --gpus 1
	$(BIN)/python tests/benchmarks/bench_training.py --images 8192 --batch-size 512
	$(BIN)/python tests/benchmarks/bench_mixing.py --batch-size 128
	$(if $(CIFAR),$(BIN)/python search/run.py ablations --name cifar10_vit --data $(CIFAR) $(CIFAR_FLAGS))
	$(if $(CIFAR),$(BIN)/python search/run.py ablations --name cifar10_cnn --data $(CIFAR) --model convnext_cifar --factor mixing $(CIFAR_FLAGS))
	$(if $(CIFAR),$(RESNAS) --name cifar10_resnas --max gmacs=0.018 --trust 24)
	$(if $(CIFAR),$(RESNAS) --name cifar10_resnas_small --max gmacs=0.012 --weights runs/work/cifar10_resnas/supernet/000000/model.pt)

clean: ## the virtual environment; results under runs/ stay
	rm -rf $(VENV)
