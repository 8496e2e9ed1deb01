# What a person or CI runs. Everything lives in .venv and portal/assets; nothing is installed outside this folder.
#
#   make setup    .venv with the `miss` command and its tools, and the viewer's assets (again only when they changed)
#   make demo     a whole region on this machine; ARGS="--wards 2 --load FOLDER" passes options on
#   make test     every test, in JOBS processes beside each other; ARGS="tests/archive -x" narrows it
#   make lint     ruff and mypy --strict

PYTHON ?= python3
ARGS   ?=
JOBS   ?= 3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: setup demo test lint clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed $(VENV)/.assets

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make setup: no $(PYTHON) found; set PYTHON=/path/to/python3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make setup: MISS needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Set PYTHON=/path/to/a/newer/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make setup: $(PYTHON) could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(VENV)/.assets: portal/assets.py $(VENV)/.installed
	$(BIN)/python -m portal.assets
	@touch $@

demo: setup
	$(BIN)/miss demo $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
