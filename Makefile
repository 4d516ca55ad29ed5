# Targets: train, test, test-full, lint, docs, bench, test-dali, test-vllm. Each makes .venv if it is
# missing.
PYTHON ?= python3
BIN := .venv/bin
EMBEDDED := fastgrpo/recipes/shapes.yaml
RECIPE ?= $(EMBEDDED)
# The embedded world takes two CPU cores where there are two and no GPU. (nproc counts threads of OpenMP where it is told of them.)
CORES = $(shell OMP_NUM_THREADS= nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1)
ON_CPU = $(shell command -v nvidia-smi >/dev/null || echo yes)
NPROC ?= $(if $(and $(filter $(EMBEDDED),$(RECIPE)),$(filter-out 1,$(CORES)),$(ON_CPU)),2,1)
ARGS ?=
DALI ?= nvidia-dali-cuda130
# Two processes that spin on two cores are 10 to 40 times slower than two that wait.
export OMP_WAIT_POLICY := PASSIVE
# Seconds that torchrun gives a worker after a signal to finish its iteration and write a checkpoint; its default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT := 600

.PHONY: train test test-full test-dali test-vllm lint docs bench clean

train: .venv/ready
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) fastgrpo/train.py --config $(RECIPE) $(ARGS)

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-full: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m slow --timeout 1800 $(ARGS)

# DALI is large (200 MB to fetch, 700 MB installed): apart from the ordinary packages. The import fails where the tests would only skip.
test-dali: .venv/dali/ready
	PYTHONPATH=$(CURDIR)/.venv/dali $(BIN)/python -c "import nvidia.dali"
	PYTHONPATH=$(CURDIR)/.venv/dali OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dali $(ARGS)

.venv/dali/ready: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .venv/dali --upgrade $(DALI)
	touch $@

# vLLM in its own environment (3 GB), with what makes its CPU build start: tests/vllm/prepare.py.
test-vllm: .venv/vllm/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/vllm $(ARGS)

.venv/vllm/ready: .venv/ready tests/vllm/prepare.py
	$(BIN)/python tests/vllm/prepare.py .venv/vllm
	touch $@

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/ready
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: .venv/ready
	$(BIN)/python benchmarks/ops.py $(ARGS)

# torch first and without isolation: with it, torch is not importable where the extension is built.
.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[train,judge,analysis,docs,test]"
	touch .venv/ready

clean:
	rm -rf .venv build *.egg-info kernels/*.egg-info
