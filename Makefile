PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install demo test test-installed sanitize bench clean

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

OP_TESTS := $(addprefix tests/,test_ops.py test_unit_rows.py test_relation_kl.py test_node_contrast.py test_graph_conv.py)

# The package as users get it, built anew, and its tests in a folder that does not hold the checkout.
test-installed: install
	rm -rf build/installed && mkdir -p build/installed/source
	git ls-files -z | xargs -0 cp --parents -t build/installed/source
	$(BIN)/python -m venv build/installed/venv
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > build/installed/dependencies.pth
	cp build/installed/dependencies.pth $$(build/installed/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
	cd build/installed/source && ../venv/bin/python -m pip install --quiet --no-build-isolation --no-deps --ignore-installed .
	mv build/installed/source/tests build/installed/tests && rm -rf build/installed/source
	cd build/installed && venv/bin/python -c 'import gkd_fast, sys; assert gkd_fast.__file__.startswith(sys.prefix), gkd_fast.__file__'
	cd build/installed && venv/bin/python -m pytest $(OP_TESTS)

# The C++ kernels under the address and undefined-behaviour sanitizers, in a build of their own. PyTorch's compiler is
# not the subject: it starts processes of its own.
SANITIZED := build/sanitize/lib
sanitize: install
	PATH="$(CURDIR)/$(BIN):$$PATH" GKD_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests && cp -r tests $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
		$(CURDIR)/$(BIN)/python -m pytest $(OP_TESTS) -k 'not compile and not package'

# Measures what runs/bench.json has not; remove it to measure all again.
bench: install
	$(BIN)/python -m bench targets --json runs/bench.json --plot docs/performance.png --markdown docs/performance.md

clean:
	rm -rf build runs *.egg-info $(VENV)
