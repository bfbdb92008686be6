# make demo | quick | test | test-all | lint | docs | wheel | bench | clean; everything happens inside $(VENV).
# make gpu uses the environment of $(PYTHON) as it is.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= 2.14.1
BIN    := $(VENV)/bin
# One process a core, a file at a time: fixtures of a module are made once.
PYTEST := -m pytest --numprocesses auto --dist loadfile
# The build environment that pip makes for the extension is pinned too.
PIP    := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt \
          PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
NATIVE := pyproject.toml setup.py CMakeLists.txt constraints.txt $(shell find cmake csrc -type f)

.PHONY: demo quick test test-all lint docs ptx wheel release-wheel wheel-test bench benchmark guard gpu gpu-wheels gpu-dry-run clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/imbsam-fast train digits --preset released --seeds 3 --save demo/runs --resume
	$(BIN)/imbsam-fast report demo/runs --out demo/report.html

# A few tests of every module, in a minute on two cores.
quick: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m quick

# Every test, in so many cases that any two values of its parameters meet in one; test-all: in all.
test: $(VENV)/.installed
	$(BIN)/python $(PYTEST) -m pairs

test-all: $(VENV)/.installed
	$(BIN)/python $(PYTEST)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of the documentation, in build/site; a warning is an error. Its search needs a server:
# `python -m http.server --directory build/site`.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --config-file site/mkdocs.yml

# The source distribution, and the wheel that is built from it: on Linux repaired, which names the
# oldest glibc it runs with. torch's libgomp is used, so that a process has one.
wheel: $(VENV)/.installed
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt \
		IMBSAM_CUDA_ARCHITECTURES=$${IMBSAM_CUDA_ARCHITECTURES:-wheel} \
		$(BIN)/python -m build --outdir dist
	set -e; for wheel in dist/*-linux_*.whl; do test -f $$wheel || continue; \
		PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude libgomp.so.1 \
			--wheel-dir dist $$wheel; \
		rm $$wheel; $(BIN)/auditwheel show dist/*.whl; done
	ls -l dist

# nvcc's PTX of three architectures and Triton's of one run on the CPU, and all mutants of nvcc's
# (minutes); `make test` runs that of one, and some mutants. Needs nvcc.
ptx: $(VENV)/.installed
	IMBSAM_PTX=all $(BIN)/python $(PYTEST) tests/ops/test_cuda_on_host.py \
		tests/ops/test_cuda_losses_on_host.py tests/ops/test_triton_ptx.py
	cd tests && $(CURDIR)/$(BIN)/python -m cuda_on_host.mutants

# The wheel with CUDA kernels, in an image with CUDA 12.8: a module built with 12.x runs under every
# driver from 12.1 on, one built with 13 only under 13 (docs/building.md). Needs docker.
RELEASE_IMAGE ?= nvidia/cuda:12.8.1-devel-rockylinux8
RELEASE_ARCHITECTURES := 75-real;80-real;90-real;100-real;120-real;75-virtual
RELEASE_PYTHON ?= python3.11
release-wheel:
	docker run --rm --volume $(CURDIR):/source --workdir /source \
		--env IMBSAM_CUDA=ON --env 'IMBSAM_CUDA_ARCHITECTURES=$(RELEASE_ARCHITECTURES)' \
		--env PIP_BUILD_CONSTRAINT=/source/constraints.txt $(RELEASE_IMAGE) bash -ec \
		'dnf install -y gcc-c++ $(RELEASE_PYTHON)-devel $(RELEASE_PYTHON)-pip && \
		$(RELEASE_PYTHON) -m pip wheel --no-deps --wheel-dir dist .'

# The tests against the installed wheel, under another torch than `make test` has: of each test as
# many cases as bring every value of its parameters once. Their combinations are what the compiled
# code does with bits, and that is one for every torch. What is not in the wheel is left out. -P keeps
# the checkout from being imported in its place. Of the recipes' packages torchvision is left out, each of
# whose builds goes with one build of torch: the tests that need it are skipped.
WHEEL_RECIPES := jinja2 matplotlib numpy pyyaml scikit-learn
# What is tested there is the checkout: benchmarks/, documents, imports, csrc/.
NOT_IN_WHEEL := bench/test_bench_anomaly.py bench/test_bench_report.py bench/test_gpu_day.py \
	ops/test_cuda_mutants.py ops/test_cuda_on_host.py ops/test_cuda_losses_on_host.py \
	ops/test_triton_ptx.py ops/test_cuda_drivers.py test_documents.py test_imports.py
WHEEL_VENV  ?= .venv-wheel
WHEEL_TORCH ?= 2.13.0
wheel-test: wheel
	rm -rf $(WHEEL_VENV)
	$(PYTHON) -m venv $(WHEEL_VENV)
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(WHEEL_VENV)/bin/python -m pip install --quiet torch==$(WHEEL_TORCH) pytest pytest-xdist \
		$(WHEEL_RECIPES) dist/*.whl
	$(WHEEL_VENV)/bin/python -P $(PYTEST) -m each $(addprefix --ignore=tests/,$(NOT_IN_WHEEL)) tests

# Everything at full size, for a quiet machine; `imbsam-fast bench` is the short form. Recorded
# results are replaced at the end, all from one commit.
BENCHMARKS := bench_optimizer bench_split_cross_entropy bench_step bench_growth bench_memory \
	bench_host bench_input bench_distributed bench_anomaly
bench: $(VENV)/.installed
	rm -rf build/results
	set -e; for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name --json build/results/$$name.json; done
	mkdir -p benchmarks/results
	cp build/results/*.json benchmarks/results
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.anomaly_report

# Small sizes under pytest-benchmark, kept in .benchmarks/ by commit; ARGS=--benchmark-compare.
benchmark: $(VENV)/.installed
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-autosave \
		--benchmark-columns=median,iqr,ops,rounds --benchmark-group-by=group $(ARGS)

# Fails where ours lost more than a quarter of what it was ahead of its peers.
guard: $(VENV)/.installed
	$(BIN)/python -m benchmarks.guard

# For a machine with an NVIDIA GPU, also without a network: `make gpu PIECE=a` to e, each within
# eight minutes, again where it says that time was up; without PIECE all of them, one after the
# other. benchmarks/gpu_day.py says what they do. It takes the torch, setuptools, cmake, ninja,
# pybind11 and nvcc that $(PYTHON) has, and what `make gpu-wheels PYTHON_VERSION=3.12` fetched before
# into build/gpu_wheels, where there was a network. DATA: the packed CIFAR-100 of piece e.
GPU_PIECES := a b c d e
PIECE ?= $(GPU_PIECES)
DATA  ?= data
gpu:
	failed=0; for piece in $(PIECE); do \
		code=75; while [ $$code -eq 75 ]; do \
			code=0; $(PYTHON) -m benchmarks.gpu_day $$piece --data $(DATA) || code=$$?; \
			[ "$(PIECE)" = "$(GPU_PIECES)" ] || break; done; \
		[ $$code -eq 0 ] || failed=$$code; done; \
	$(PYTHON) -m benchmarks.report && exit $$failed

PYTHON_VERSION ?= 3.12
gpu-wheels: $(VENV)/.installed
	$(BIN)/python -m pip download --quiet --only-binary :all: --python-version $(PYTHON_VERSION) \
		--dest build/gpu_wheels rich pytest hypothesis
	du -sh build/gpu_wheels

# What of `make gpu` a machine without a GPU can run: every piece, small and on the CPU, with the
# build by nvcc (for one architecture, unless told otherwise), the quick tests of every file, and a
# training on images that are noise. Not the sanitizer itself. It measures nothing.
gpu-dry-run: $(VENV)/.installed
	rm -rf build/gpu_dry_run
	set -e; for piece in $(PIECE); do \
		IMBSAM_CUDA_ARCHITECTURES=$${IMBSAM_CUDA_ARCHITECTURES:-90-real} \
			$(BIN)/python -m benchmarks.gpu_day $$piece --dry-run --minutes 60; done

$(VENV)/.installed: $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==$(TORCH) --editable '.[dev]'
	touch $@

clean:
	rm -rf build demo dist *.egg-info $(VENV) $(WHEEL_VENV)
