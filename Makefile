# Every target makes the environment it needs; PYTHON is the interpreter it is made from.
PYTHON ?= python3
VENV4 := .venv
VENV5 := .venv-transformers5

.PHONY: demo test test-transformers5 test-distributed test-slow quality clean

demo: $(VENV4)/.installed
	$(VENV4)/bin/python examples/train.py --output_dir runs/demo --overwrite

# CPU tests gain nothing from threads, and one thread makes them repeatable to the last bit.
test: export OMP_NUM_THREADS = 1
test: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest

test-transformers5: export OMP_NUM_THREADS = 1
test-transformers5: $(VENV5)/.installed
	$(VENV5)/bin/python -m pytest

test-distributed: export OMP_NUM_THREADS = 1
test-distributed: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest -m 'distributed and not slow'

test-slow: export OMP_NUM_THREADS = 1
test-slow: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest -m slow

quality: $(VENV4)/.installed
	$(VENV4)/bin/ruff check .
	$(VENV4)/bin/ruff format --check .
	$(VENV4)/bin/mypy

$(VENV4)/.installed: pyproject.toml .ci/constraints-transformers4.txt
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/pip install --quiet --constraint .ci/constraints-transformers4.txt torch
	$(VENV4)/bin/pip install --quiet --constraint .ci/constraints-transformers4.txt --editable '.[attack,dev]'
	touch $@

$(VENV5)/.installed: pyproject.toml .ci/constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/pip install --quiet --constraint .ci/constraints-transformers5.txt torch
	$(VENV5)/bin/pip install --quiet --constraint .ci/constraints-transformers5.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV4) $(VENV5) runs
