# Everything runs from the repository root in a private environment, .venv; nothing is installed outside it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
INSTALLED := $(VENV)/requirements.installed
PYTEST := $(PYTHON) -m pytest
# Two files of tests at a time, where no clock is watched and no Ray is started.
TWO := --numprocesses=2 --dist=loadfile
NO_RAY := tests/unit tests/deploy

# Where `ray dashboard cluster.yaml` or `kubectl port-forward` brings a cluster's dashboard.
ADDRESS ?= http://127.0.0.1:8265
SUBMIT = RAY_AUTH_MODE=token $(VENV)/bin/ray job submit --address $(ADDRESS) --working-dir . -- python -m ray_jobs

MODEL := runs/demo/model

.PHONY: help install demo pictures gpu-report serve dashboard test test-unit test-cluster test-serve test-nodes test-chaos fuzz-store soak soak-serve chromium lint type requirements clean \
	submit-extract submit-train submit-finetune submit-tune submit-evaluate submit-caption submit-serve

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' \
		| while IFS=$$'\t' read -r name text; do printf '  make %-15s %s\n' "$$name" "$$text"; done

install: $(INSTALLED) ## Create .venv with the pinned requirements (also done by the targets below)

# uv comes from pip where it is missing (pip's --target works without the venv module and on distributions whose Python
# is marked as externally managed), finds a Python of a fitting version, and brings one where there is none. Compiled at
# once, for a job is many processes that import much: where Python may not write bytecode, each would compile it all
# again and take two to four times as long to start. TORCH=cpu leaves out what only GPUs use, most of the size.
$(INSTALLED): requirements.txt pyproject.toml
	@works() { "$$@" >/dev/null 2>&1; }; \
	right="import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))"; \
	uv=uv; \
	if ! works uv --version; then \
		uv=$(VENV)/uv/bin/uv; \
		works "$$uv" --version || python3 -m pip install --quiet --upgrade --target $(VENV)/uv uv \
			|| { echo "uv is needed, or a python3 with pip, which brings it" >&2; exit 2; }; \
	fi; \
	works $(PYTHON) -c "$$right" \
		|| "$$uv" venv --quiet --allow-existing --python '>=3.11,<3.15' $(VENV); \
	$(if $(filter cpu,$(TORCH)),grep -Ev '^(nvidia|cuda|triton)' requirements.txt | "$$uv" pip install --torch-backend cpu \
		--compile-bytecode --python $(PYTHON) -r -,"$$uv" pip install --compile-bytecode --python $(PYTHON) -r requirements.txt); \
	"$$uv" pip install --quiet --no-deps --no-build-isolation --python $(PYTHON) --editable .; \
	touch $@

demo: $(INSTALLED) ## Extract, train, evaluate and caption generated pictures; results in runs/demo
	$(PYTHON) -m ray_jobs.demo

# With a GPU under ten minutes; ARGS=--smoke only sees that it runs, without one too. Where there is no package index, the
# same without make: python -m ray_jobs.benchmark gpu
gpu-report: $(INSTALLED) ## Measure all that a GPU does: figures in runs/gpu_report, make gpu-report ARGS=--smoke
	$(PYTHON) -m ray_jobs.benchmark gpu --csv runs/gpu_report/report.csv $(ARGS)

serve: $(INSTALLED) ## Serve a model over HTTP on this machine: make serve MODEL=runs/flickr8k/model
	$(PYTHON) -m ray_jobs.serve --model $(MODEL)

pictures: $(INSTALLED) chromium ## Draw README's pictures again, after make demo
	$(PYTHON) docs/draw.py

submit-extract: $(INSTALLED) ## Run a job on the cluster at ADDRESS and follow it: ARGS="--source ... --output ..."
	$(SUBMIT).extract_features $(ARGS)

submit-train: $(INSTALLED) ## The same for training
	$(SUBMIT).train $(ARGS)

submit-finetune: $(INSTALLED) ## The same for finetuning
	$(SUBMIT).finetune $(ARGS)

submit-tune: $(INSTALLED) ## The same for tuning
	$(SUBMIT).tune $(ARGS)

submit-evaluate: $(INSTALLED) ## The same for evaluation
	$(SUBMIT).evaluate $(ARGS)

submit-caption: $(INSTALLED) ## The same for captioning
	$(SUBMIT).caption $(ARGS)

submit-serve: $(INSTALLED) ## The same for the service, which stays when its job has ended
	$(SUBMIT).serve $(ARGS)

# RUN is a model, a search, or any folder of them.
dashboard: $(INSTALLED) ## TensorBoard on this machine: make dashboard RUN=runs/flickr8k/search
	$(PYTHON) -m tensorboard.main --logdir $(or $(RUN),runs) --host 127.0.0.1

# K is an expression of pytest's -k: what matches runs, wherever it is and however long it takes, and nothing else.
test: $(if $(K),$(INSTALLED),lint type $(if $(ALL),test-serve)) ## Check style and types, then run the quick tests; every test with ALL=1, the matching ones with K=expression
ifdef K
	$(PYTEST) --durations=5 -k "$(K)" tests
else
	$(PYTEST) $(TWO) --durations=5 $(NO_RAY)
	$(PYTEST) --durations=10 $(if $(ALL),,-m "not chaos and not long") tests/cluster tests/jobs $(if $(ALL),tests/nodes)
endif

test-chaos: $(INSTALLED) ## Run the tests that kill drivers, workers and nodes, and others that take minutes
	$(PYTEST) --durations=10 -m "chaos or long" tests

test-unit: $(INSTALLED) ## Run the tests that need no Ray
	$(PYTEST) $(TWO) --durations=5 $(NO_RAY)

test-cluster: $(INSTALLED) ## Run the tests that start a local Ray, those that kill its processes too
	$(PYTEST) --durations=10 tests/cluster

test-nodes: $(INSTALLED) ## Kill a node of three in the middle of every job, and print what it cost
	$(PYTEST) --durations=10 tests/nodes

fuzz-store: $(INSTALLED) ## Stop a job at every change of its store and run it again: make fuzz-store JOB=extract STORE=s3
	$(PYTHON) -m tests.cluster.store_fuzz --job $(or $(JOB),extract) --store $(or $(STORE),local) $(ARGS)

soak: $(INSTALLED) ## A hundred faults in extraction, captioning, training and tuning; goes on where it was stopped; some two hours
	$(PYTHON) -m tests.nodes.soak $(ARGS)

test-serve: $(INSTALLED) chromium ## Run the tests that talk to a running service
	$(PYTEST) --durations=10 $(if $(ALL),,-m "not chaos") tests/serve

# As long as MINUTES says; kills replicas and proxies of a service of its own.
soak-serve: $(INSTALLED) ## Twenty minutes of floods, kills, poison and slow clients on a service: make soak-serve MINUTES=20
	$(PYTHON) -m tests.serve.soak --minutes $(or $(MINUTES),20) --csv benchmarks/results/soak_serve.csv

# The page is tested in Debian's Chromium. Where it can be neither found nor installed, only those tests are skipped.
chromium: ## Install Chromium for the tests of the page, where that is allowed
	@command -v chromium >/dev/null || { \
		[[ $$(id -u) == 0 ]] && command -v apt-get >/dev/null \
			&& apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	} || echo "chromium is missing and could not be installed: the tests of the page will be skipped" >&2

lint: $(INSTALLED) ## Check style and formatting with ruff
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

type: $(INSTALLED) ## Check types with mypy
	$(PYTHON) -m mypy

requirements: $(INSTALLED) ## Pin the newest versions that pyproject.toml allows
	uv="$$(command -v uv || echo $(VENV)/uv/bin/uv)"; \
	"$$uv" pip compile --upgrade --universal --python-version 3.11 --no-header --no-annotate \
		--no-emit-index-url --group dev pyproject.toml -o requirements.txt

clean: ## Remove caches; .venv and runs stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
