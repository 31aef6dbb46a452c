SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo check test ui clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

setup: .venv/.installed  ## Create .venv with everything pinned (PYTHON=..., TORCH=cuda|cpu to choose)

.venv/.installed: pyproject.toml constraints.txt infra/setup.sh
	@infra/setup.sh

demo: setup  ## Draw street scenes, train on them what keeps the meaning and plain CUT, compare, show where the pictures are
	@launch/demo.sh

check: setup  ## Lint, format, types and the fast tests: under a minute
	ruff check .
	ruff format --check .
	mypy
	OMP_NUM_THREADS=1 pytest --timeout 60 --numprocesses 2 -m "not slow"

test: setup  ## Lint, format, types and the whole test suite
	ruff check .
	ruff format --check .
	mypy
	OMP_NUM_THREADS=1 pytest --timeout 600 --numprocesses 2 --dist loadfile --max-worker-restart 0

ui: setup  ## Open the MLflow UI on the runs made from this folder
	mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}"

clean:  ## Remove .venv and caches; runs, data and the MLflow store stay
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
