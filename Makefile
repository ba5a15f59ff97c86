# `make run` answers a question, `make test` runs the tests; both make the environment first if it is not there.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CLIENTS := build/clients
MINDSPORE := build/mindspore
PYTHON311 ?= $(shell command -v python3.11 || echo $(PYTHON))

MODEL  ?= demo/glm4-demo
PROMPT ?= 请介绍一下北京
CONFIG ?= configs/glm4/predict_glm4.yaml
# As they were written: a $ in a prompt is a dollar sign.
override MODEL  := $(value MODEL)
override PROMPT := $(value PROMPT)
override CONFIG := $(value CONFIG)
export MODEL PROMPT CONFIG

.PHONY: help run test test-mindspore fuzz clients serve-demo bench-cpu lint format env demo clean

help:
	@echo "make run                      answer one question with the demo model"
	@echo "make run PROMPT='…' MODEL=DIR answer another question with another folder"
	@echo "make test                     run all tests"
	@echo "make serve-demo               serve the demo model on http://127.0.0.1:8000"
	@echo "make test-mindspore           the tests of the MindSpore backend, in an environment of its own"
	@echo "make fuzz                     two minutes of requests that schemathesis makes up"
	@echo "make bench-cpu                compare with llama.cpp: LAYERS=8 ROUNDS=5 PAIRS='int4:Q4_0 int4:openvino-int4'"
	@echo "make clients                  an environment with litellm and lm-eval, for their tests"
	@echo "make lint                     ruff, mypy --strict and the import contract"
	@echo "make format                   let ruff format the code"
	@echo "make demo                     train the demo model again (up to 40 minutes)"
	@echo "make env                      only make the environment ($(VENV))"
	@echo "make clean                    remove the environment and caches"

run: $(READY)
	@$(BIN)/python run_mindformer.py --config "$$CONFIG" --run_mode predict --use_parallel False \
		--pretrained_model_dir="$$MODEL" --predict_data="$$PROMPT"

test: $(READY)
	$(BIN)/python -m pytest -n 2

# MindSpore has wheels for Python 3.11 at most, and wants an older NumPy.
test-mindspore: $(MINDSPORE)/.ready
	$(MINDSPORE)/bin/python -m pytest -n 2 tests/mindspore_backend

$(MINDSPORE)/.ready: requirements-mindspore.lock pyproject.toml $(wildcard csrc/*)
	$(PYTHON311) -m venv $(MINDSPORE)
	$(MINDSPORE)/bin/pip install --quiet --disable-pip-version-check -r requirements-mindspore.lock
	$(MINDSPORE)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Clients of the server that cannot live in one environment with it: GLM4_CLIENTS_PYTHON=$(CLIENTS)/bin/python make test
clients: $(CLIENTS)/.ready

$(CLIENTS)/.ready: requirements-clients.lock
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -r requirements-clients.lock
	@touch $@

serve-demo: $(READY)
	$(BIN)/glm4 serve -m demo/glm4-demo

fuzz: $(READY)
	@$(BIN)/glm4 serve -m demo/glm4-demo --port 8089 --max-answer-tokens 8 2>/dev/null & server=$$!; \
	trap "kill $$server" EXIT; \
	$(BIN)/schemathesis run http://127.0.0.1:8089/openapi.json --wait-for-schema 60 --checks not_a_server_error \
		--phases fuzzing --max-examples 1000000 --max-time 120 --request-timeout 20

bench-cpu: $(READY)
	$(BIN)/python benchmarks/cpu/compare.py --layers $(or $(LAYERS),8) --rounds $(or $(ROUNDS),5) \
		$(addprefix --pair ,$(or $(PAIRS),int4:Q4_0))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)
	$(BIN)/python tools/build_corpus.py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tools/train_demo.py

env: $(READY)

$(READY): requirements.lock pyproject.toml $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "error: $(PYTHON) has no venv module; install it: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache output
