# Settings are passed on: make train DATA=folder RUN=folder ARGS="--epochs 5"
# Packages that are installed already (Colab, conda, a cluster): make train PYTHON=python3
PYTHON ?= .venv/bin/python
VENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
KNEEOA = $(PYTHON) kneeoa.py $@ $(if $(DATA),--data "$(DATA)") $(if $(RUN),--run "$(RUN)") $(ARGS)
# glibc then keeps freed memory for the next step, in place of asking the system to clear new pages.
export MALLOC_TRIM_THRESHOLD_ = 2147483647
export MALLOC_MMAP_MAX_ = 0

.PHONY: help split train evaluate plot predict tune phantoms test

help: ## print these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

split: $(VENV) ## split the patients: train, val, test (split.csv)
	$(KNEEOA)

train: $(VENV) ## train a network, keep its best epoch, evaluate it once (metrics.json)
	$(KNEEOA)

evaluate: $(VENV) ## evaluate again, or other data: ARGS="--external folder"
	$(KNEEOA)

plot: $(VENV) ## draw the run: curves, confusion matrix, heat maps (report.png)
	$(KNEEOA)

predict: $(VENV) ## grade pictures: make predict ARGS="knee.png folder"
	$(KNEEOA)

tune: $(VENV) ## compare settings: make tune ARGS="--lr 1e-3 3e-3 --dropout 0 0.3"
	$(KNEEOA)

phantoms: $(VENV) ## draw 1000 knees of known grade into the folder phantoms
	$(KNEEOA)

test: $(VENV) ## check what this project promises (pytest, about a minute)
	$(PYTHON) -m pytest -q test_kneeoa.py

# .venv/ready tells that all is installed: .venv/bin/python is only a link to the system's Python.
.venv/ready: requirements.txt
	@python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kneeoa: error: python3 is too old, have 3.10 or newer in the PATH")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@
