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

test: $(VENV)/.installed-test $(VENV)/.installed-sglang
	$(VENV)/bin/pytest

soak: $(VENV)/.installed-test
	EAGLE3_SOAK=1 $(VENV)/bin/pytest -s -m campaign --timeout 7200

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The real SGLang, on a CPU. Where it cannot be installed, the tests that need it skip with that reason, or fail in CI.
$(VENV)/.installed-sglang: $(VENV)/.installed-test tests/sglang/cpu/install.sh tests/sglang/cpu/*.txt
	tests/sglang/cpu/install.sh $(VENV) && touch $@ || echo "SGLang could not be installed here: its tests will be skipped"

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
