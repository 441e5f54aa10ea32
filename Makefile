# make demo      train, quantize and fine-tune a small network on real images; results and picture in outputs/demo
# make test      check style, run the fast tests
# make test-all  run every test that this machine can run
# make lint      check style only
# make clean     remove the virtual environment, caches and outputs
#
# Everything runs in a virtual environment of its own, .venv, made on first use.
# Options: PYTHON=python3.9 (3.8 to 3.11), ARGS="..." more arguments of the recipe or of pytest.

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# An inherited PYTHONPATH could hide the pinned versions.
unexport PYTHONPATH
export GLUONQUANT_SHARED ?= $(realpath ../shared)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-all lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/python recipes/image_classification.py --save-dir outputs/demo --overwrite $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(VENV)/test.stamp
	$(BIN)/ruff check

# Another PYTHON than the environment was made with makes it anew.
ifneq ($(PYTHON),)
ifneq ($(PYTHON),$(shell cat $(VENV)/venv.stamp 2>/dev/null))
.PHONY: $(VENV)/venv.stamp
endif
endif

$(VENV)/venv.stamp: tools/find_python.sh
	@python=$$(tools/find_python.sh "$(PYTHON)") && echo "making $(VENV) with $$python" \
	    && "$$python" -m venv --clear $(VENV)
	@# As `pip install --editable .` would, without a build: the environment finds the package in this checkout.
	@$(BIN)/python -c "import pathlib, sysconfig; \
	    pathlib.Path(sysconfig.get_path('purelib'), 'gluonquant.pth').write_text('$(CURDIR)')"
	@echo "$(PYTHON)" > $@

$(VENV)/demo.stamp: $(VENV)/venv.stamp requirements/demo.txt requirements/gluoncv.txt
	$(BIN)/python -m pip install --quiet -r requirements/demo.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/gluoncv.txt
	@# Compiles the operators now, not at the first import; says so if it cannot, and then all runs without them.
	@$(BIN)/python -c "import gluonquant.ops"
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp requirements/test.txt requirements/deploy.txt
	$(BIN)/python -m pip install --quiet -r requirements/test.txt
	@touch $@

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
