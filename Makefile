# make demo: installs into .venv, trains a tiny GranViT, prints its table and draws pictures.
# make data: installs into .venv, builds two stores from photographs, scans and drawn documents, writes their report (docs/data.md).
# make test: installs into .venv and runs the whole test suite.
# make lint: ruff over everything, mypy over the core.
# make test-torch PYTHON=python3.13: runs the tests without MindSpore in a separate environment, on a newer Python if you name one.
# make transformers5: installs a second environment, in which tests/test_transformers5.py loads exports; without it, that test is
# skipped.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
VENV5 := .venv-transformers5
VENV_TORCH := .venv-torch
# `make data` needs two photographs of scikit-learn. It lies beside the packages: transformers imports it where it is installed.
SCIKIT_LEARN := $(VENV)/scikit-learn
EXAMPLE := runs/data_example
# Two workers, a file of tests at a time, in the order of tests/conftest.py.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo data test lint test-torch transformers5 clean
demo: $(READY)
	$(VENV)/bin/python scripts/demo.py

data: $(READY) $(SCIKIT_LEARN)/.ready
	PYTHONPATH=$(SCIKIT_LEARN) $(VENV)/bin/python -m granvit.data.gran.example $(EXAMPLE)/sources
	$(VENV)/bin/python scripts/build_gran.py --config configs/gran_example.yaml
	$(VENV)/bin/python -m granvit.data.gran.example $(EXAMPLE)/sources --compare $(EXAMPLE)/ocr

$(SCIKIT_LEARN)/.ready: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(SCIKIT_LEARN) scikit-learn==1.9.1
	touch $@

test: $(READY)
	$(VENV)/bin/python -m pytest $(WORKERS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(READY): requirements.txt pyproject.toml setup.py $(wildcard granvit/native/*.cpp granvit/native/*.h)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and f"Python 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}; name one with make PYTHON=/path/to/python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

test-torch: $(VENV_TORCH)/.ready
	$(VENV_TORCH)/bin/python -m pytest $(WORKERS) -k "not mindspore"

$(VENV_TORCH)/.ready: pyproject.toml setup.py
	test -x $(VENV_TORCH)/bin/python || $(PYTHON) -m venv $(VENV_TORCH)
	$(VENV_TORCH)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[torch,test]'
	touch $@

transformers5: $(VENV5)/.ready
$(VENV5)/.ready:
	test -x $(VENV5)/bin/python || $(PYTHON) -m venv $(VENV5)
	$(VENV5)/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0 numpy==1.26.4 pillow==13.0.0
	touch $@

clean:
	rm -rf $(VENV) $(VENV5) $(VENV_TORCH) runs
