# The environment lives in .venv. `make demo` and `make test` set up what they need; the second time they just run.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-oldest test-newest emulate fuzz fuzz-layer bench gpu sanitize lint format clean help

help:
	@echo "make demo       train a DNC on the copy task (about a minute on two CPU cores); ARGS='--help' shows what it takes"
	@echo "make test       the tests (about 8 minutes on two CPU cores)"
	@echo "make test-slow  the tests that take longer: trainings, and every kernel for every target"
	@echo "make test-oldest  the tests with the oldest supported versions, in .venv-oldest"
	@echo "make test-newest  the tests with the newest versions that were tried, in .venv-newest, which takes 6 GB"
	@echo "make emulate    the kernels as compiled for an NVIDIA GPU, in an emulator on the CPU; some minutes"
	@echo "make fuzz       random small problems through the kernels; COUNT=1000000 says how many"
	@echo "make fuzz-layer  random calls of the layer, each against one row and one step at a time; ARGS='--count 10000'"
	@echo "make bench      the times beside those of others, on a CPU or a GPU; ARGS='--help' shows what it takes"
	@echo "make gpu        on a machine with a GPU: parity there, then all the times, under 9 minutes; installs nothing"
	@echo "make sanitize   on a machine with a GPU: a few of its tests under compute-sanitizer's four tools"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff format the code"
	@echo "make clean      remove .venv and what tools leave behind"

demo: .venv/.train
	$(BIN)/python -m dnc_triton train copy $(ARGS)

# A file of tests per process, each with one thread: two cores then take little more than half the time.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
test: export OMP_NUM_THREADS ?= 1
test: .venv/.dev
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: .venv/.dev
	$(BIN)/python -m pytest -m slow $(ARGS)

test-oldest: export OMP_NUM_THREADS ?= 1
test-oldest: .venv-oldest/.dev
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(ARGS)

test-newest: export OMP_NUM_THREADS ?= 1
test-newest: .venv-newest/.dev
	.venv-newest/bin/python -m pytest $(PARALLEL) $(ARGS)

# A process of its own: in that of the other tests the kernels are interpreted, not compiled.
emulate: export OMP_NUM_THREADS ?= 1
emulate: .venv/.dev
	$(BIN)/python -m pytest -m slow tests/emulated $(ARGS)

COUNT ?= 1000000
fuzz: .venv/.dev
	$(BIN)/python -m tests.fuzz --count $(COUNT) $(ARGS)

fuzz-layer: .venv/.dev
	$(BIN)/python -m tests.fuzz_layer $(ARGS)

# Here, on a CPU or a GPU.
bench: .venv/.dev
	$(BIN)/python -m benchmarks run $(ARGS)

# On a machine with a GPU, a PyTorch and a pytest of its own: nothing is installed. Under 9 minutes: parity, then the
# time of every layout, the memory of training, and the benchmark with its report.
gpu sanitize: export PYTHONPATH := .:reference$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	@$(PYTHON) -m benchmarks.on_gpu $(ARGS)

# What no test sees: reads and writes out of bounds, races, numbers that nobody wrote, barriers that not all threads
# reach. The allocator's cache would hide the first and the third from the tools; without it no graph can be captured.
# The tools run at once, since it is compiling that takes time, and every line says which tool wrote it.
TOOLS ?= memcheck racecheck initcheck synccheck
# Trainings by every kernel, and steps by the layouts of large memories.
SANITIZED := (test_the_layer and (plain or lstm_all)) or test_float32 or (test_limits and spread-activated) or (test_same_call and spread) or test_ranks
define sanitized
{ PYTORCH_NO_CUDA_MEMORY_CACHING=1 DNC_TRITON_GRAPHS=0 compute-sanitizer --tool "$$0" --error-exitcode 1 \
	--target-processes all \
	$(PYTHON) -m pytest -m gpu -v --color=no -p no:cacheprovider tests/gpu/test_gpu.py -k '$(SANITIZED)' $(ARGS) 2>&1 || \
	{ echo FAILED; exit 1; }; } | sed -u "s/^/$$0: /"
endef
# By xargs, since the jobs of a shell would outlive an interrupt.
sanitize: export SANITIZED_BY := $(sanitized)
sanitize:
	@command -v compute-sanitizer > /dev/null || \
		{ echo "compute-sanitizer is not on the path: it comes with the CUDA toolkit" >&2; exit 2; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || \
		{ echo "There is no GPU here: nothing was run" >&2; exit 2; }
	@printf '%s\n' $(TOOLS) | xargs -P 8 -n 1 bash -o pipefail -c "$$SANITIZED_BY"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest .venv-newest dist build .mypy_cache .pytest_cache .ruff_cache .hypothesis

# One stamp per set of extras: .venv/.train for users, .venv/.dev for the tests and linters on top.
.venv/.train .venv/.dev: .venv/.%: pyproject.toml constraints.txt
	$(call install,.venv,constraints.txt,$*)

.venv-oldest/.dev .venv-newest/.dev: .venv-%/.dev: pyproject.toml constraints-%.txt
	$(call install,.venv-$*,constraints-$*.txt,dev)

# The package that tests and benchmark compare with, without its dependencies, which they do not need; if it cannot be
# installed, they do without it.
peer = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps dnc==2.0.0b1 || true

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Try make PYTHON=python3.12"; exit 1; }
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --disable-pip-version-check -c $(2) -e '.[$(3)]'
$(if $(filter dev,$(3)),$(call peer,$(1)))
touch $(1)/.$(3)
endef
