# Three commands do all: `make demo`, `make demo-photos` and `make test`. Both can be run again; nothing is installed twice.
PYTHON ?= python3
VENV := .venv
STREET := examples/lund_street
PHOTOS := outputs/demo-photos

.PHONY: demo demo-photos test test-fast lint hooks benchmarks clean

demo: $(VENV)/installed  ## set up, render the toy town, train on it, print the table
	$(VENV)/bin/python train.py

demo-photos: $(VENV)/installed  ## set up, localize photographs with the weights in the package; the last line says where the report is
	$(VENV)/bin/python evaluate.py weights=gnnet-small localizer=hybrid dataset=colmap dataset.root=$(STREET) \
	  queries=$(STREET)/queries.txt images=$(STREET)/queries truth=$(STREET)/truth.txt thresholds=outdoor hydra.run.dir=$(PHOTOS)
	@echo "the report: $(PHOTOS)/report.html"

# Two processes of one thread each: threads of one test would wait for those of the other.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

test: $(VENV)/installed-dev  ## set up, run the whole test suite: 7 minutes on two cores
	$(PYTEST)

test-fast: $(VENV)/installed-dev  ## the tests that are not marked slow: a minute on two cores
	$(PYTEST) -m "not slow"

lint: $(VENV)/installed-dev  ## style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

hooks: $(VENV)/installed-dev  ## check style and types before each commit
	$(VENV)/bin/pre-commit install

benchmarks: $(VENV)/installed  ## print every figure beside the limit it is held against
	for script in benchmarks/*.py; do $(VENV)/bin/python $$script || exit 1; done

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gnnet needs Python 3.11 or newer; found $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed pyproject.toml
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
