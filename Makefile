# make plan   plan Llama-3-8B for 256 TPU v5e chips and have XLA's TPU compiler verify it
# make test   run the tests
# Both create .venv first, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PLANNING := $(VENV)/.installed-planning
TESTING := $(VENV)/.installed-testing

.PHONY: plan test setup lock clean

plan: $(PLANNING)
	$(BIN)/meshwright plan model=llama3_8b cluster=v5e:16x16 train.global_batch=256 \
	  train.seq_len=8192 verify=true baselines=true out=out/plan.json report=out/report.html

test: $(TESTING)
	$(BIN)/python -m pytest -n 2 --dist worksteal -rs

setup: $(TESTING)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(PLANNING): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[tpu]'
	$(BIN)/python -m placement.solver.warm
	touch $@

$(TESTING): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[tpu,gpu,train,sweep,dev]'
	$(BIN)/python -m placement.solver.warm
	touch $@ $(PLANNING)

lock: $(TESTING)
	{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist out *.egg-info
