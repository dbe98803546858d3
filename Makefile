# The first of demo, test, bench, style and types sets up .venv; the next ones reuse it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The peers of the benchmarks are many and want other versions, so they have a venv of their own.
BENCH := .cache/bench/venv
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# The build runs in .venv itself, so that setuptools is the pinned one, too.
INSTALL := $(PIP) install --constraint constraints.txt --no-build-isolation --editable

.PHONY: demo demo-cloud demo-video test soak bench style types venv clean

## demo: run the main job on real photographs and show some results
demo: $(VENV)/run out/demo/.built
	$(BIN)/evmp --config config/demo.yaml
	@$(BIN)/python config/demo.py tell out/demo/result.jsonl

## demo-cloud: run jobs against small servers of OSS and MaxCompute on this machine
demo-cloud: $(VENV)/run $(VENV)/test out/demo/.built
	@PYTHONPATH=tests:config $(BIN)/python -m democloud out/demo

## demo-video: classify the frames of real videos, and find their cuts
demo-video: $(VENV)/video out/demo/.built out/demo_video/.built
	$(BIN)/evmp --config config/demo_video.yaml
	$(BIN)/evmp --config config/demo_cuts.yaml
	@$(BIN)/python config/demo_video.py tell out/demo_video

## test: run the tests, some at once; make test ARGS="--slow -k ring" passes ARGS to pytest
test: $(VENV)/run $(VENV)/test
	$(BIN)/python -m pytest -n logical --maxprocesses=4 --dist worksteal $(ARGS)

## soak: kill 20,000 processes of workers over 1,000,000 rows (ARGS), and 300 of whole jobs
## (CHAOS_ARGS); goes on where it was stopped
soak: $(VENV)/run $(VENV)/test
	OPENBLAS_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzzing.soak $(ARGS)
	PYTHONPATH=tests:config $(BIN)/python -m chaos.soak $(CHAOS_ARGS)

## bench: run every benchmark beside its peers; without ARGS, write bench/README.md from it
bench: $(BENCH)/installed
	set -e; for script in bench/bench_*.py; do echo "== $$script"; \
	$(BENCH)/bin/python $$script --json out/bench/$$(basename $$script .py).json $(ARGS); done
	$(if $(ARGS),,$(BENCH)/bin/python bench/report.py out/bench > bench/README.md)

## style: check lint and format
style: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

## types: check the types
types: $(VENV)/dev
	$(BIN)/mypy

## venv: set up .venv with everything that the others need
venv: $(VENV)/dev

## clean: remove all that the others made, downloads included
clean:
	rm -rf .venv .cache .*_cache .hypothesis build dist out *.egg-info evmp/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# The files below say "this was done"; what they depend on says when to do it again.

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); the first time takes minutes, torch is large"
	$(PIP) install --constraint constraints.txt setuptools
	@touch $@

$(VENV)/run: $(VENV)/created $(SOURCES)
	$(INSTALL) .
	@touch $@

$(VENV)/video: pyproject.toml constraints.txt | $(VENV)/run
	$(INSTALL) '.[video]'
	@touch $@

$(VENV)/test: pyproject.toml constraints.txt | $(VENV)/run
	$(INSTALL) '.[test]'
	@touch $@

$(VENV)/dev: pyproject.toml constraints.txt | $(VENV)/run
	$(INSTALL) '.[dev]'
	@touch $@

out/demo/.built: config/demo.py config/demo.txt | $(VENV)/run
	rm -rf out/demo
	$(BIN)/python config/demo.py build out/demo
	@touch $@

out/demo_video/.built: config/demo_video.py config/demo_video.txt | $(VENV)/video
	rm -rf out/demo_video
	$(BIN)/python config/demo_video.py build out/demo_video
	@touch $@

$(BENCH)/installed: bench/requirements.txt $(SOURCES) $(wildcard evmp/*.py evmp/*/*.py)
	test -d $(BENCH) || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip -qq --disable-pip-version-check install -r bench/requirements.txt
	$(BENCH)/bin/python -m pip -qq --disable-pip-version-check install --no-build-isolation .
	@touch $@
