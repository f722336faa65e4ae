# Needs make and Python >= 3.10 with venv; on Windows use the pip lines of the README.
PYTHON ?= python3
VENV ?= .venv
# What to install as torch, for example TORCH=torch==2.13.0 where pip is told of a CPU wheel
TORCH ?= torch
# More options for the commands: make train ARGS="--env Pendulum-v1", make test ARGS="-k zoo"
ARGS ?=
BIN := $(VENV)/bin
PROJECTS := pyproject.toml $(wildcard rewards/pyproject.toml)
# The reward pack is a distribution of its own
REWARDS := $(if $(wildcard rewards/pyproject.toml),-e rewards)

.PHONY: help train test format lint type bench build clean

help:
	@echo "make train    install into $(VENV) and train GRPO on CartPole-v1 with RL Zoo"
	@echo "make test     install into $(VENV) and run the tests"
	@echo "make format   format the code;  make lint, make type: check it"
	@echo "make bench    measure what the package adds to the start of an interpreter"
	@echo "make build    build the wheel and the source archive;  make clean: remove $(VENV) and builds"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python $(PROJECTS)
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[box2d]" $(REWARDS)
	@touch $@

$(VENV)/installed-test: $(BIN)/python $(PROJECTS)
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[box2d,mujoco,ray,api,postgres,test]" $(REWARDS)
	@touch $@ $(VENV)/installed

train: $(VENV)/installed
	$(BIN)/python -m rl_zoo3.train --algo grpo --env CartPole-v1 $(ARGS)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

format: $(VENV)/installed-test
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/installed-test
	$(BIN)/mypy

bench: $(VENV)/installed-test
	$(BIN)/python benchmarks/startup.py $(ARGS)

build: $(VENV)/installed-test
	$(BIN)/python -m hatchling build

clean:
	rm -rf $(VENV) build dist
