# Settings are passed on: make train DATA=folder RUN=folder ARGS="--epochs 5"
# Packages that are installed already (Colab, Kaggle, conda): make train PYTHON=python3
PYTHON ?= .venv/bin/python
VENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
DATA ?= $(if $(wildcard data),data,phantoms)
KNEEOA = $(PYTHON) kneeoa.py $@ --data "$(DATA)" $(if $(RUN),--run "$(RUN)") $(ARGS)
# A notebook names its own plotting backend, which a new environment does not have.
unexport MPLBACKEND
# After an upgrade of the system, .venv may be there and its Python gone.
$(if $(VENV),$(shell .venv/bin/python -c "" 2> /dev/null || rm -rf .venv))

.PHONY: help split train evaluate plot predict tune test

help: ## print these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile
	@echo 'with DATA=folder RUN=folder PYTHON=python3 ARGS="--epochs 5", where wanted'

split: $(VENV) $(filter phantoms,$(DATA)) ## split the patients: train, val, test (split.csv)
	$(KNEEOA)

train: $(VENV) $(filter phantoms,$(DATA)) ## train a network, keep its best epoch, test it (metrics.json)
	$(KNEEOA)

evaluate: $(VENV) ## test again, or on other data: ARGS="--external folder"
	$(KNEEOA)

plot: $(VENV) ## draw the run: curves, confusion matrix, heat maps (report.png)
	$(KNEEOA)

predict: $(VENV) ## grade images: make predict ARGS="knee.png folder"
	$(KNEEOA)

tune: $(VENV) $(filter phantoms,$(DATA)) ## compare settings: make tune ARGS="--lr 1e-3 3e-3 --dropout 0 0.3"
	$(KNEEOA)

phantoms: | $(VENV) ## draw 1,000 knees of known grade into the folder phantoms
	$(PYTHON) phantoms.py phantoms

test: $(VENV) ## check what this project promises (pytest, about a minute)
	$(PYTHON) -m pytest -q test_kneeoa.py

.venv/ready: requirements.txt
	@python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kneeoa: error: python3 is too old, have 3.10 or newer in the PATH")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@
