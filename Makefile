# Everything a fresh machine needs: `make demo` and `make test`. Each installs into .venv once, then works offline.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help setup demo test lint docs reliability release-check clean bench-setup

help:  ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED)  ## Create .venv and install everything into it, pinned by constraints.txt.

$(INSTALLED): pyproject.toml constraints.txt
	@[[ -n "$(PYTHON)" ]] || { echo "error: no Python >= 3.11 found. Install one (Debian: apt-get install python3" \
		"python3-venv) or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot create virtual" \
		"environments: ensurepip is missing. Debian keeps it in a package of its own: apt-get install" \
		"python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hf]'
	@touch $@

# Every line is shown before it runs and is what a user would type. The last one prints the figures and its page.
demo: export PATH := $(CURDIR)/$(BIN):$(PATH)
demo: $(INSTALLED)  ## From a made-up catalogue to recall figures and a page with pictures, in demo/.
	rm -rf demo
	python -m datamodules.samples --output demo/raw
	python -m datamodules.prepare demo/raw/products.csv --queries demo/raw/queries.csv --qrels demo/raw/qrels.csv \
		--output demo/catalogue
	python train.py fit --config configs/demo.yaml --run demo/fused
	python train.py fit --config configs/demo_single.yaml --run demo/text --then_test true \
		--model.product.image null --model.product.attribute null
	python train.py fit --config configs/demo_single.yaml --run demo/image --then_test true \
		--model.product.text null --model.product.attribute null
	python train.py fit --config configs/demo_single.yaml --run demo/attribute --then_test true \
		--model.product.text null --model.product.image null
	python index.py embed --model demo/fused/model --catalogue demo/catalogue --output demo/embeddings
	python index.py build --embeddings demo/embeddings/products --output demo/index \
		--factory "IVF64,PQ32x4fsr,Refine(SQ8)"
	python index.py evaluate --index demo/index --embeddings demo/embeddings --oracle demo/raw/oracle.json \
		--output demo/report
	python index.py search --index demo/index --text "brown striped mug" --html demo/search.html
	python -m benchmarks.demo demo

# Two processes halve the time; threads of one must not spin on the core that the other one needs.
test: $(INSTALLED) lint  ## Format check, lint, types and all tests; skipped ones say why.
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q -rs --durations=15 --numprocesses=2 --dist=worksteal

lint: $(INSTALLED)  ## Format check, lint and types only.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

docs: $(INSTALLED)  ## The documentation as a site, in site/.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

# What `python -m benchmarks.index` compares with, each where nothing else needs it; a library that has no wheel here and
# cannot be compiled is left out, and its row of the tables says so. autofaiss needs the older NumPy, and that one
# an older Arrow.
bench-setup:  ## Install the libraries that the index benchmark compares with, into environments of their own.
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet numpy
	for package in 'usearch>=2.16' 'scann>=1.3' 'hnswlib>=0.8'; do \
		.venv-peers/bin/python -m pip install --quiet "$$package" \
			|| echo "skipped: $$package has no wheel for this Python and could not be compiled (needs g++)" >&2; \
	done
	$(PYTHON) -m venv .venv-autofaiss
	.venv-autofaiss/bin/python -m pip install --quiet 'autofaiss>=2.18' 'numpy<2' 'pyarrow<20' \
		|| echo "skipped: autofaiss could not be installed" >&2

reliability: $(INSTALLED)  ## Kill, starve and damage index folders at length (about 20 minutes), with a table at the end.
	TRITOWER_RELIABILITY=full TRITOWER_RELIABILITY_REPORT=reliability.json OMP_NUM_THREADS=1 $(BIN)/pytest -q -rs \
		-o faulthandler_timeout=0 \
		tests/reliability tests/test_storage.py tests/test_versions.py tests/test_workspace.py tests/test_update.py

release-check: export PATH := $(CURDIR)/dist/venv/bin:$(PATH)
release-check: $(INSTALLED)  ## Build wheel and sdist, install the wheel into a new environment, run every program there.
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	unzip -l dist/tritower-*.whl | grep licenses/LICENSE
	tar -tzf dist/tritower-*.tar.gz | grep /LICENSE
	$(PYTHON) -m venv dist/venv
	dist/venv/bin/python -m pip install --quiet --constraint constraints.txt dist/tritower-*.whl
	cd dist && tritower-samples --output raw --products 240 --image-size 32
	cd dist && tritower-prepare raw/products.csv --queries raw/queries.csv --qrels raw/qrels.csv --output catalogue
	cd dist && tritower-train fit --config configs/tiny.yaml --data.catalogue catalogue --run run
	cd dist && tritower-index embed --model run/model --catalogue catalogue --output embeddings
	cd dist && tritower-index build --embeddings embeddings/products --output index
	cd dist && tritower-index evaluate --index index --embeddings embeddings --output report
	cd dist && tritower-index search --index index --text "red mug" --html hits.html
	cd dist && tritower-index verify --index index

clean:  ## Remove the demo, caches and build leftovers; .venv stays.
	rm -rf demo build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
