# `make demo` and `make test` need gcc and Python 3.11 or later; everything lands in .venv.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# An empty value means "write byte code": without it every Ray worker would compile torch anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo smoke test test-all test-gpu check format image clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with every pinned dependency

demo: $(STAMP) ## the whole chain on real data, and two real requests (7 to 15 minutes on 2 cores)
	@$(BIN)/rc-ray demo

smoke: $(STAMP) ## the same chain with a handful of users and steps, to see that it runs
	@$(BIN)/rc-ray demo --set name=smoke --set data.max_users=60 \
	  --set train.num_steps=4 --set tune.num_steps=4 --set merge.num_prompts=8 \
	  --set merge.num_epochs=1 --set merge.guard.num_valid_users=8 \
	  --set evaluate.num_test_users=8 --set evaluate.num_valid_users=8

test: $(STAMP) ## every test but those marked gpu, slow and network
	@$(BIN)/python -m pytest -q

test-all: $(STAMP) ## those marked slow and network too
	@$(BIN)/python -m pytest -q -m "not gpu"

test-gpu: $(STAMP) ## the tests marked gpu
	@$(BIN)/python -m pytest -q -m gpu

check: $(STAMP) ## ruff (lint and format) and mypy strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

image: ## the container image of cluster/
	docker build --file cluster/Dockerfile --tag rc-ray:latest .

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info

$(STAMP): pyproject.toml constraints.txt .ci/install
	@bash .ci/install $(VENV)
	@touch $@
