# make demo    draw a toy catalogue, train on it, answer queries, show the result (a few minutes on two cores)
# make test    format, lint, types and tests
# make gpu     on a machine with a CUDA GPU: its tests, then every path measured; writes benchmarks/gpu.md
# All install into .venv first where it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
TOY := $(DEMO)/toy/products240_queries120_seed7_256px
export NO_ALBUMENTATIONS_UPDATE = 1
export WANDB_MODE = offline
export HF_HUB_OFFLINE = 1

.PHONY: demo test gpu format clean

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %d.%d; type make PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed
	@rm -rf $(DEMO)/train $(DEMO)/frozen $(DEMO)/trained $(DEMO)/features $(DEMO)/shop
	$(BIN)/python -m beauty_bafe.data.toy --root $(DEMO)/toy --products 240 --queries 120 --seed 7
	$(BIN)/python train.py experiment=demo data.root=$(TOY)/gallery output_dir=$(DEMO)/train
	$(BIN)/python retrieve.py model=efficientnet_lite0 pooling=spoc report=false rehearsal.views=0 \
	  gallery=$(TOY)/gallery queries=$(TOY)/queries truth=$(TOY)/truth.csv masks=$(TOY)/masks features=$(DEMO)/features output_dir=$(DEMO)/frozen
	$(BIN)/python retrieve.py checkpoints='[$(DEMO)/train/checkpoints/best.ckpt]' \
	  gallery=$(TOY)/gallery queries=$(TOY)/queries truth=$(TOY)/truth.csv masks=$(TOY)/masks features=$(DEMO)/features rehearsal.views=120 output_dir=$(DEMO)/trained
	@$(BIN)/python -m beauty_bafe.evaluation.table $(DEMO)/frozen $(DEMO)/trained --against $(DEMO)/frozen
	@echo "submission  $(DEMO)/trained/submission.csv"
	@echo "report      $(DEMO)/trained/report.html"
	@echo "in a browser, with the pictures of $(TOY)/queries:"
	@echo "  $(BIN)/python -m beauty_bafe serve index_dir=$(DEMO)/shop checkpoints='[$(DEMO)/train/checkpoints/best.ckpt]' gallery=$(TOY)/gallery"

test: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

gpu: .venv/installed
	@$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("error: make gpu needs a CUDA GPU, and PyTorch sees none here")'
	$(BIN)/python -m pytest -n 0 -m gpu
	$(BIN)/python benchmarks/gpu.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv runs toy
