# relattn: `make demo` and `make test` need Python 3.11 or newer, pip, make and a C++ compiler; they set up the rest.

PYTHON    ?= python3
VENV      ?= .venv
TOOLKITS  ?= .venv-toolkits
PRESET    ?= quick
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
EMULATE_ARGS ?=
FUZZ_COUNT ?= 300
MINUTES   ?= 10
# Test processes: one per core, each with one thread (below); the cap keeps memory in bounds on large machines.
JOBS      ?= auto

BIN   := $(VENV)/bin
# Named after this folder: an editable install points to a place, and a copied or moved clone would run the old one's code.
HERE  := $(shell pwd | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.ready-$(HERE)
# relattn itself, with the native library of its C++ sources.
INSTALLED := $(VENV)/.installed-$(HERE)
NATIVE    := kernels/cpu/build.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

# A waiting OpenMP thread sleeps instead of spinning: on busy cores, spinning made small steps a hundred times slower.
# (Not for benchmarks, which want idle cores and what a user's program would get.)
demo test test-toolkits explore sanitize emulate: export OMP_WAIT_POLICY ?= PASSIVE
# Nothing is fetched from a model hub.
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-toolkits explore sanitize emulate bench figures resources docs docs-serve lint clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED) ## the chorale comparison (PRESET=quick|seed|tiny, DEMO_ARGS="--out DIR ...")
	$(BIN)/python -m examples.chorales.compare --preset $(PRESET) $(DEMO_ARGS)

test: $(INSTALLED) ## ruff and the test suite (TEST_ARGS="-k name ...")
	$(BIN)/python -m ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist loadgroup $(TEST_ARGS)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 tests/backends/test_triton.py $(TEST_ARGS) || [ $$? = 5 ] # 5: none selected

test-toolkits: $(TOOLKITS)/.ready ## relattn.toolkits on the layers of ESPnet, NeMo and SpeechBrain, in an environment of their own
	OMP_NUM_THREADS=1 $(TOOLKITS)/bin/python -m pytest tests/toolkits $(TEST_ARGS)

explore: $(INSTALLED) ## examples that no run had before, for MINUTES=10; what fails is kept for `make test`
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.explore --minutes $(MINUTES)

sanitize: $(INSTALLED) ## random calls of the native CPU kernels under GCC's sanitizers (FUZZ_COUNT=300)
	$(BIN)/python -m tests.sanitize --count $(FUZZ_COUNT)

emulate: $(INSTALLED) ## the GPU kernels' PTX on this CPU, with race detection (EMULATE_ARGS="'odd size' 7 --target sm_90 ...")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.ptx_emulator $(EMULATE_ARGS)

bench: $(INSTALLED) ## speed and memory against peers on this machine (BENCH_ARGS="--quick")
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

figures: $(INSTALLED) ## reports, pictures and the manual's parts of the committed benchmarks and study
	$(BIN)/python -m benchmarks.render $(wildcard benchmarks/results/cpu-*) --readme docs/benchmarks.md
	$(BIN)/python -m benchmarks.huggingface --render --out benchmarks/results/huggingface --readme docs/models.md
	$(BIN)/python -m examples.chorales.study report --readme docs/chorales.md
	$(BIN)/python docs/skew.py

resources: $(INSTALLED) ## what the GPU kernels take of each chip, by compiling them
	$(BIN)/python -m relattn.kernels.gpu.resources

docs: $(VENV)/.docs-ready $(INSTALLED) ## the manual, docs/_build/index.html; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

docs-serve: docs ## the manual at http://localhost:8000
	$(BIN)/python -m http.server --directory docs/_build --bind localhost 8000

lint: $(INSTALLED) ## ruff, mypy, clang-format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run --Werror kernels/cpu/*.h kernels/cpu/*.cpp

clean: ## delete builds and caches (not .venv: remove it yourself to set up anew)
	rm -rf build dist docs/_build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f kernels/cpu/*.so kernels/cpu/build_report.json $(VENV)/.installed-*
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# The stamp is written last. A set-up that did not finish leaves .unfinished behind, and the next run starts over:
# pip takes a half-copied package for an installed one.
$(STAMP): requirements-dev.txt constraints.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "relattn needs Python 3.11 or newer, and $(PYTHON) is %d.%d: try make PYTHON=python3.12" % sys.version_info[:2])'
	@if [ -e $(VENV)/.unfinished ]; then echo "The last set-up did not finish: starting over."; rm -rf $(VENV); fi
	@mkdir -p $(VENV) && rm -f $(VENV)/.ready-* $(VENV)/.installed-* && touch $(VENV)/.unfinished
	@echo "Setting up $(VENV): once, and again when the requirements change."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $$(grep '^torch==' requirements-dev.txt)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@rm $(VENV)/.unfinished && touch $@

$(VENV)/.docs-ready: requirements-docs.txt $(STAMP)
	$(BIN)/python -m pip install --quiet -r requirements-docs.txt
	touch $@

# torch from the pinned requirements, the toolkits without the torch that they ask for.
$(TOOLKITS)/.ready: requirements-toolkits.txt requirements-dev.txt constraints.txt pyproject.toml setup.py $(NATIVE)
	$(PYTHON) -m venv $(TOOLKITS)
	$(TOOLKITS)/bin/python -m pip install --quiet -c constraints.txt $$(grep -E '^(torch|numpy|pytest|ninja|setuptools|tqdm|packaging)==' requirements-dev.txt) requests pyyaml huggingface_hub
	$(TOOLKITS)/bin/python -m pip install --quiet --no-deps -r requirements-toolkits.txt
	$(TOOLKITS)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# A change of the C++ sources alone comes here: ninja compiles what it concerns.
$(INSTALLED): $(STAMP) $(NATIVE)
	@echo "Installing relattn and compiling its CPU kernels."
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@if grep -q '"library": true' kernels/cpu/build_report.json; then touch $@; \
	else echo "Without native CPU kernels, until a compiler is there:"; cat kernels/cpu/build_report.json; fi
