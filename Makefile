# Pass on what you want to set: make train DATA=folder RUN=folder ARGS="--epochs 5"
# Packages that are installed already (Colab, conda, a cluster): make train PYTHON=python3
PYTHON ?= .venv/bin/python
VENV := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/ready)
KNEEOA = $(PYTHON) kneeoa.py $@ $(if $(DATA),--data "$(DATA)") $(if $(RUN),--run "$(RUN)") $(ARGS)

.PHONY: help split train plot tune predict phantoms test

help: ## print these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

split: $(VENV) ## share out the patients to training, validation and test
	$(KNEEOA)

train: $(VENV) ## train a network, keep its best epoch, test it once
	$(KNEEOA)

plot: $(VENV) ## draw the sheet of the run: curves, confusion matrix, heat maps
	$(KNEEOA)

tune: $(VENV) ## try settings: make tune ARGS="--lr 1e-3 3e-3 --dropout 0 0.3"
	$(KNEEOA)

predict: $(VENV) ## grade pictures: make predict ARGS="knee.png other.png"
	$(KNEEOA)

phantoms: $(VENV) ## draw 1000 knees of known grade into the folder phantoms
	$(KNEEOA)

test: $(VENV) ## check what this project promises (pytest)
	$(PYTHON) -m pytest -q test_kneeoa.py

# A file of its own says that all is installed: .venv/bin/python is but a link to the system's, which a user may not touch.
.venv/ready: requirements.txt
	@python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kneeoa: error: python3 is too old, have 3.10 or newer in the PATH")'
	python3 -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@
