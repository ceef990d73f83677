# Every target makes the environment it needs; PYTHON is the interpreter it is made from, and each has its own.
PYTHON ?= python3
OF_PYTHON := $(addprefix -,$(filter-out python3,$(notdir $(PYTHON))))
VENV4 := .venv$(OF_PYTHON)
VENV5 := .venv-transformers5$(OF_PYTHON)
VENV_DOCS := .venv-docs$(OF_PYTHON)
VENV_PACKAGE := .venv-package$(OF_PYTHON)

unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-transformers5 test-distributed test-slow quality docs package clean

demo: $(VENV4)/.examples
	$(VENV4)/bin/python examples/train.py --output_dir runs/demo --overwrite

# CPU tests gain nothing from threads, and one thread makes them repeatable to the last bit. Processes do help; tests of
# one file stay together, for they share fixtures.
AT_ONCE := -n logical --maxprocesses 4 --dist loadfile

test: export OMP_NUM_THREADS = 1
test: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest $(AT_ONCE)

test-transformers5: export OMP_NUM_THREADS = 1
test-transformers5: $(VENV5)/.installed
	$(VENV5)/bin/python -m pytest $(AT_ONCE)

test-distributed: export OMP_NUM_THREADS = 1
test-distributed: $(VENV4)/.deepspeed
	$(VENV4)/bin/python -m pytest -m 'distributed and not slow'

test-slow: export OMP_NUM_THREADS = 1
test-slow: $(VENV4)/.installed
	$(VENV4)/bin/python -m pytest -m slow

quality: $(VENV4)/.installed
	$(VENV4)/bin/ruff check .
	$(VENV4)/bin/ruff format --check .
	$(VENV4)/bin/mypy

# mkdocstrings reads the sources, so neither torch nor the package need to be installed.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV_DOCS)/.installed
	$(VENV_DOCS)/bin/mkdocs build --strict --quiet

# What is published is built, checked, and used in an environment that has nothing else.
package: $(VENV_PACKAGE)/.installed
	rm -rf build/package build/empty
	$(VENV_PACKAGE)/bin/python -m build --quiet --outdir build/package .
	$(VENV_PACKAGE)/bin/twine check --strict build/package/*
	.ci/use-wheel $(PYTHON) build/package/*.whl build/empty
	rm -rf build/empty

# pip compiles every module in one process, which doubles the time that an environment takes: the demo compiles what it
# imports, and the tests' environments are compiled on all cores (some packages hold files for other Pythons).
COMPILE := -m compileall -q -j 0

# The demo does not wait for what only tests and attacks need.
$(VENV4)/.examples: pyproject.toml .ci/constraints-transformers4.txt
	$(PYTHON) -m venv $(VENV4)
	$(VENV4)/bin/pip install --quiet --no-compile --constraint .ci/constraints-transformers4.txt torch
	$(VENV4)/bin/pip install --quiet --no-compile --constraint .ci/constraints-transformers4.txt --editable '.[examples]'
	touch $@

$(VENV4)/.installed: $(VENV4)/.examples
	$(VENV4)/bin/pip install --quiet --no-compile --constraint .ci/constraints-transformers4.txt --editable '.[attack,dev,quantized]'
	-$(VENV4)/bin/python $(COMPILE) $(VENV4)/lib > /dev/null
	touch $@

# Only what starts several processes needs DeepSpeed, which is built at its installation.
$(VENV4)/.deepspeed: $(VENV4)/.installed
	$(VENV4)/bin/pip install --quiet --no-compile --constraint .ci/constraints-transformers4.txt --editable '.[deepspeed]'
	touch $@

$(VENV5)/.installed: pyproject.toml .ci/constraints-transformers5.txt
	$(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/pip install --quiet --no-compile --constraint .ci/constraints-transformers5.txt torch
	$(VENV5)/bin/pip install --quiet --no-compile --constraint .ci/constraints-transformers5.txt --editable '.[dev]'
	-$(VENV5)/bin/python $(COMPILE) $(VENV5)/lib > /dev/null
	touch $@

$(VENV_DOCS)/.installed: .ci/constraints-docs.txt
	$(PYTHON) -m venv $(VENV_DOCS)
	$(VENV_DOCS)/bin/pip install --quiet --no-compile --constraint .ci/constraints-docs.txt mkdocs-material 'mkdocstrings[python]'
	touch $@

$(VENV_PACKAGE)/.installed: .ci/constraints-docs.txt
	$(PYTHON) -m venv $(VENV_PACKAGE)
	$(VENV_PACKAGE)/bin/pip install --quiet --no-compile --constraint .ci/constraints-docs.txt build twine
	touch $@

clean:
	rm -rf .venv .venv-* build runs
