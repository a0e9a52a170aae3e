# make demo: fresh machine -> trained tiny GranViT, table, pictures. make test: fresh machine -> the whole test suite.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test clean
demo: $(READY)
	$(VENV)/bin/python scripts/demo.py

test: $(READY)
	$(VENV)/bin/python -m pytest

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v != (3, 11) and f"Python 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}; name one with make PYTHON=/path/to/python3.11")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) runs
