# Every target makes what it needs. `make demo` and `make test` work on a fresh Debian machine with Python, git and make.
PYTHON ?= python3
UNSEEN ?= 31-40
SEED ?= 2048
OUT ?= work_dirs/orl_demo
PY := .venv/bin/python
# Debian's python3 may come without pip's venv support; say so in one line instead of a traceback.
CREATE_VENV = $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	{ echo "error: $(PYTHON) cannot make virtual environments; run: apt-get install python3-venv" >&2; exit 1; }; \
	$(PYTHON) -m venv

.PHONY: help setup demo demo-splits test test-oldest test-slow test-device soak gpu-check gpu-kernels bench lint format clean
help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# What `make demo` needs and no more: the download is part of its eight minutes.
.venv/.demo: pyproject.toml constraints.txt
	$(CREATE_VENV) .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu]'
	touch $@

.venv/.setup: .venv/.demo
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cpu,align,demo,export,int8,numba,openvino,parquet,search,visualdl,test]'
	touch $@

# The real mxnet, the oracle of the reader's tests. Its wheel needs an old numpy, so it lives by itself. On machines
# where it cannot be installed the reader's comparison tests skip and say why.
.venv-mxnet/.done:
	$(CREATE_VENV) .venv-mxnet
	.venv-mxnet/bin/python -m pip install --quiet --disable-pip-version-check \
		mxnet==1.9.1 numpy==1.23.5 'opencv-python-headless<4.12' \
		|| echo "WARNING: mxnet 1.9.1 could not be installed; tests against it will be skipped" >&2
	touch $@

# The oldest Paddle that must work; constraints.txt applies but for Paddle itself.
.venv-oldest/.done: pyproject.toml constraints.txt
	$(CREATE_VENV) .venv-oldest
	grep -v '^paddlepaddle==' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt \
		paddlepaddle==2.6.2 setuptools pytest pytest-xdist pytest-timeout hypothesis psutil -e .
	touch $@

setup: .venv/.setup .venv-mxnet/.done ## .venv with everything that demo, tests and benchmarks need

demo: .venv/.demo ## train on real faces and evaluate (UNSEEN=31-40 SEED=2048 OUT=work_dirs/orl_demo)
	$(PY) tools/demo.py --unseen $(UNSEEN) --seed $(SEED) --output $(OUT)

demo-splits: .venv/.demo ## the demo with each quarter of the people held out (about four times as long)
	$(PY) tools/demo.py --splits --seed $(SEED) --output work_dirs/orl_splits

test: setup ## the test suite on Paddle 3.3.1
	$(PY) -m pytest -n 2 -m 'not slow' $(PYTEST)

test-oldest: .venv-oldest/.done ## the core on Paddle 2.6.2
	.venv-oldest/bin/python -m pytest -n 2 -m 'oldest and not slow' $(PYTEST)

test-device: setup ## the test suite's part on a device that is not the CPU (tests/device)
	CUSTOM_DEVICE_ROOT=$$($(PY) tests/device/build.py) FLAGS_free_idle_chunk=1 GLOG_minloglevel=2 \
		$(PY) -m pytest -n 2 -m 'device and not slow' tests/device $(PYTEST)

test-slow: setup ## large networks and long runs
	$(PY) -m pytest -n 1 -m slow --timeout 3600 $(PYTEST)

soak: setup ## kill random ranks at random moments, fifty times
	$(PY) tools/soak.py --kills 50

gpu-check: ## for a machine with GPUs: right, how fast, how much memory; one JSON in 20 minutes
	$(PYTHON) tools/gpu_check.py

# What GPU users get from pip, in an environment of its own: 0.8 GB, no GPU needed.
.venv-gpu/.done: pyproject.toml constraints.txt
	$(CREATE_VENV) .venv-gpu
	grep -v '^paddlepaddle==' constraints.txt > .venv-gpu/constraints.txt
	.venv-gpu/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-gpu/constraints.txt \
		paddlepaddle-gpu==2.6.2 setuptools -e .
	touch $@

gpu-kernels: .venv-gpu/.done ## every kernel that training calls exists in the GPU build of Paddle 2.6.2
	.venv-gpu/bin/python -W ignore tools/gpu_kernels.py

# Each ends within ten minutes; search asks the network that `make demo` leaves.
BENCHMARKS = head reader eval embed train_step loop_overhead parity align "clean scale --images 580000 --identities 8574" \
	$(if $(wildcard $(OUT)/run),"search --model $(OUT)/run")
bench: setup ## every benchmark, one JSON each in work_dirs/bench
	mkdir -p work_dirs/bench
	@test -d $(OUT)/run || echo "WARNING: no $(OUT)/run; search is left out, run make demo" >&2
	set -e; for words in $(BENCHMARKS); do set -- $$words; name=$$1; shift; \
		$(PY) benchmarks/$$name.py "$$@" --json work_dirs/bench/$$name.json; done

lint: setup ## ruff, checks only
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: setup ## ruff, rewriting
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean: ## remove the environments and caches (keeps work_dirs and data)
	rm -rf .venv .venv-oldest .venv-mxnet .venv-gpu .pytest_cache .ruff_cache .hypothesis *.egg-info
