# make demo [TARGET=tiny]   the whole job on this machine, with a report
# make test                 everything that this machine can run
# make soak                 the campaigns at full size: kills, damage, memory
PYTHON ?= python3
TARGET ?= smollm2
VENV := .venv
PIP := $(VENV)/bin/pip install --quiet --constraint constraints.txt

.PHONY: demo test soak lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/eagle3-offline demo --target $(TARGET)

test: $(VENV)/.installed-test
	$(VENV)/bin/pytest

soak: $(VENV)/.installed-test
	EAGLE3_SOAK=1 $(VENV)/bin/pytest -s -m campaign --timeout 7200

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/pip
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@
