# Two commands to start with; each works on a fresh clone with Python 3.11 or newer:
#   make demo    install into .venv, build glyphs without stars, print where the report is
#   make test    install into .venv, run the tests
# And for the documents: make docs writes the parts that come from the code, and builds the site into build/site.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Waiting threads sleep instead of spinning: spinning slows small models down.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test lint docs install install-dev clean

demo: install
	$(BIN)/erasec build glyphs --erase star --target onnx
	@echo "The report, with pictures before and after: $(CURDIR)/glyphs-without-star/report.html"

test: install-dev
	$(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy examples
	$(BIN)/lint-imports

docs: install-dev
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict
	@echo "The site: $(CURDIR)/build/site/index.html"

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

clean:
	rm -rf $(VENV) build *.egg-info

INSTALL = $(BIN)/python -m pip install --constraint constraints.txt

$(VENV)/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "erasec needs Python 3.11 or newer, and '$(PYTHON)' is not: make ... PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml
	$(INSTALL) --editable '.[onnx]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/torch pyproject.toml
	$(INSTALL) --editable '.[onnx,openvino,trt-rtx,dev]'
	@touch $(VENV)/installed $@
