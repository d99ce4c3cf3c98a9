PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: fuzz install demo test test-oldest test-gpu gpu gpu-cache test-installed test-kernels test-machine-code test-ptx sanitize bench lint format \
	wheel docs clean

install: $(VENV)/installed

# torch first: the extension is built against the installed one.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy ninja setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation \
		-e '.[train,test,models,torchdistill,integrations,examples,bench,docs,lint]'
	touch $@

# SEEDS=2 makes it short.
demo: install
	rm -rf runs/demo
	$(BIN)/gkd-train compare --config configs/demo.yaml $(if $(SEEDS),--seeds $(SEEDS))

test: install
	$(BIN)/python -m pytest -n $(WORKERS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels

# Every kernel's default configuration, compiled for every architecture, or CASES='sm_90 and bfloat16' of them; needs no GPU.
test-kernels: install
	GKD_FAST_COMPILE_ALL=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/test_compile.py $(if $(CASES),-k '$(CASES)')

# The oldest PyTorch and Triton, in an environment and a copy of the sources of their own, since the extension is built
# for one PyTorch: the tests of the ops and of the loss; of the interpreted kernels the types of every op, how it divides
# its columns, column sets, the second order, strips, small batches and the public functions, or with INTERPRETED= all;
# Hopper's, compiled.
OLDEST := .venv-oldest
OLDEST_TREE := build/oldest
INTERPRETED ?= test_types or divi or column_sets or agrees_with_the_reference or test_strips or test_small_batches \
	or test_public
$(OLDEST)/installed: constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt \
		torch triton numpy ninja 'setuptools>=77' wheel networkx psutil 'pytest>=8' pytest-xdist rich
	touch $@

test-oldest: $(OLDEST)/installed
	mkdir -p $(OLDEST_TREE) && rm -rf $(OLDEST_TREE)/tests
	tar c --exclude='*.so' --exclude='__pycache__' --exclude=gkd_fast/_C.torch-version.txt \
		bench configs csrc gkd_fast kernels pyproject.toml README.md setup.py tests | tar x -C $(OLDEST_TREE)
	cd $(OLDEST_TREE) && PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" python setup.py -q build_ext --inplace
	cd $(OLDEST_TREE) && $(CURDIR)/$(OLDEST)/bin/python -m pytest -n $(WORKERS) $(OP_TESTS) $(addprefix tests/,\
		test_functional.py test_gradcheck.py test_loss.py test_relations.py test_rkd_angle.py test_info_nce.py test_tokens.py)
	cd $(OLDEST_TREE) && TRITON_INTERPRET=1 $(CURDIR)/$(OLDEST)/bin/python -m pytest -n $(WORKERS) tests/kernels/interpreted \
		-k '$(INTERPRETED)'
	cd $(OLDEST_TREE) && $(CURDIR)/$(OLDEST)/bin/python -m pytest -n $(WORKERS) tests/kernels/test_compile.py \
		-k 'exemptions or (bfloat16 and sm_90)'

# On a machine with a GPU.
test-gpu: install
	$(BIN)/python -m pytest -n 4 tests/gpu

# A GPU's few minutes: its tests, times beside predictions and peers, tile sizes. `make gpu-cache` first, where there may be
# no GPU: what is in this cache is not compiled then.
GPU_CACHE := $(CURDIR)/build/gpu
gpu: install
	TRITON_CACHE_DIR=$(GPU_CACHE) $(BIN)/python -m bench gpu --json runs/gpu.json --markdown docs/developers/gpu.md

gpu-cache: install
	TRITON_CACHE_DIR=$(GPU_CACHE) $(BIN)/python -m bench gpu --fill

# Hopper's machine code of every kernel, at all tile configurations and pairs of widths; about an hour.
test-machine-code: install
	GKD_FAST_MACHINE_CODE_ALL=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/test_machine_code.py

# Hopper's PTX of every kernel and type, run on numpy against the reference; some minutes.
test-ptx: install
	GKD_FAST_PTX_ALL=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/test_ptx.py

OP_TESTS := $(addprefix tests/,test_ops.py test_unit_rows.py test_relation_kl.py test_node_contrast.py \
	test_graph_conv.py test_neighbor_conv.py test_affinities.py test_bfloat16.py test_second_order.py)

# The site, in build/site; what does not fit together is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The package for others: a wheel for any machine, without the C++ kernels, one with them for this Python and this PyTorch,
# and the sources.
wheel: install
	rm -rf dist build/lib build/bdist*
	GKD_FAST_NO_EXTENSION=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	$(BIN)/python setup.py -q sdist
	@ls -l dist

# The package as users get it, and its tests in a folder where the checkout is not found. Its dependencies are .venv's.
INSTALLED := build/installed
test-installed: install
	rm -rf $(INSTALLED) && mkdir -p $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -w $(INSTALLED) .
	$(BIN)/python -m venv $(INSTALLED)/venv
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' \
		> $$($(INSTALLED)/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/dependencies.pth
	$(INSTALLED)/venv/bin/python -m pip install --quiet --no-deps --ignore-installed $(INSTALLED)/*.whl
	cp -r tests $(INSTALLED)
	cd $(INSTALLED) && venv/bin/python -c 'import gkd_fast, sys; assert gkd_fast.__file__.startswith(sys.prefix)'
	cd $(INSTALLED) && venv/bin/python -m pytest $(OP_TESTS)

# Random calls against the reference: the C++ kernels, then the interpreted Triton kernels. A failure prints its case.
FUZZ_SECONDS ?= 150
FUZZ_SEED ?= 0
fuzz: install
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)
	TRITON_INTERPRET=1 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

# The C++ kernels under the address and undefined-behaviour sanitizers, in a build of their own; without the tests that
# start processes.
SANITIZED := build/sanitize/lib
sanitize: install
	PATH="$(CURDIR)/$(BIN):$$PATH" GKD_FAST_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib $(SANITIZED)
	rm -rf $(SANITIZED)/tests && cp -r tests $(SANITIZED)
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc \
		$(CURDIR)/$(BIN)/python -m pytest $(OP_TESTS) -k 'not compiled and not compilation and not package'

# Measures what runs/bench.json has not; remove it to measure all again.
bench: install
	$(BIN)/python -m bench targets --json runs/bench.json --plot docs/developers/performance.png --markdown docs/developers/performance.md

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --fix --quiet .

clean:
	rm -rf build dist runs *.egg-info $(VENV) $(OLDEST)
