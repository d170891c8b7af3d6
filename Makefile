# `make demo` shows the networks at work, `make test` runs every check, `make report` writes docs/report.html anew.
# Each sets up its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real series, of which only files are read; without them what needs them is left out.
SERIES = $(BIN)/python -m pip install --quiet --no-deps "aeon>=1.6"

.PHONY: demo report test lint clean

demo: $(VENV)/demo.installed
	$(BIN)/smpconv-zoo demo --out demo

# The picture needs Chromium, and is left as it is without one.
report: $(VENV)/demo.installed
	$(BIN)/smpconv-zoo report --out docs/report.html
	-$(BIN)/python eval/photograph.py docs/report.html docs/report.png --only accuracy kernels-smpconv_tcn_mnist-smnist5k

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps hang on pyproject.toml: changed dependencies are installed again, nothing else is.
$(VENV)/demo.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[data,report]"
	-$(SERIES)
	@touch $@

$(VENV)/test.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	-$(SERIES)
	@touch $@

clean:
	rm -rf $(VENV) build dist demo *.egg-info
