PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install demo test test-kernels bench clean

install: $(VENV)/installed

# torch first: the extension is built against the installed one.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy ninja setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[train,test,bench]'
	touch $@

demo: install
	rm -rf runs/demo
	$(BIN)/gkd-train compare --config configs/demo.yaml

test: install
	$(BIN)/python -m pytest -n $(WORKERS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels

# Every kernel's default configuration, compiled for every architecture; needs no GPU.
test-kernels: install
	GKD_FAST_COMPILE_ALL=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/test_compile.py

# Measures what runs/bench.json has not; remove it to measure all again.
bench: install
	$(BIN)/python -m bench targets --json runs/bench.json --plot docs/performance.png --markdown docs/performance.md

clean:
	rm -rf build runs *.egg-info $(VENV)
