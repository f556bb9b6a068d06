PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEBIAN_PACKAGES := dcmtk dicom3tools ghostscript chromium orthanc orthanc-dicomweb postgresql

.PHONY: demo test bench lint clean

demo: $(VENV)/.local
	$(BIN)/cxr-triton demo -o build/demo

test: $(VENV)/.test debian
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

# Each stage by itself, beside what it replaces; takes minutes and belongs on a quiet machine.
bench: $(VENV)/.test
	mkdir -p build
	$(BIN)/python -m pytest tests/bench -o python_files='bench_*.py' -q --benchmark-json=build/bench.json
	$(BIN)/python tests/bench/ratios.py build/bench.json build/bench-ratios.json

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or later is needed, this is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.local: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[local,objects]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[local,test]'
	touch $(VENV)/.local $@

# Kills and breaks everything around the gateway; about ten minutes on two cores. GATEWAYS=2 shares a PostgreSQL queue.
GATEWAYS ?= 1
.PHONY: faults
faults: $(VENV)/.test debian
	$(BIN)/python tests/integration/gateway_faults.py --gateways $(GATEWAYS)

# Reference decoders and a browser that only the tests use; what is missing is skipped visibly when apt cannot install it.
.PHONY: debian
debian:
	@missing=$$(for p in $(DEBIAN_PACKAGES); do dpkg -s $$p >/dev/null 2>&1 || echo $$p; done); \
	if [ -n "$$missing" ]; then \
		sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
		$$sudo apt-get update -qq && $$sudo apt-get install -y -qq $$missing >/dev/null || echo "could not install: $$missing"; \
	fi

clean:
	rm -rf build dist *.egg-info
