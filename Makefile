# Every target works on a fresh Debian machine that has Rust, Python 3 and a C++ compiler.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup build demo demo-images test bench chaos sim fmt lint

export PATH := $(CURDIR)/.bin:$(PATH)

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

setup: ## Install what is missing (Debian packages, PyTorch 2.11.0 in a shared cache) and link it here.
	@deploy/setup.sh

build: setup ## Build the binaries thaw and thaw-worker.
	cargo build --workspace

demo: build ## Fine-tune a pretrained MiniLM on Debian's package descriptions, two workers.
	@deploy/demo/sections.sh

demo-images: build ## Train a small residual network on digits 0-4, then transfer it to 5-9 with few labels.
	@.venv/bin/python deploy/demo/images.py

test: build ## Run all tests and print their count.
	@tests/run.sh

bench: build ## Time Thaw beside PyTorch DDP and print the ratios; ONLY=NAME,... for some rows, QUICK=1 for fewer rounds.
	@PYTHONPATH=tests .venv/bin/python -m benches --only '$(ONLY)' $(if $(QUICK),--quick)

chaos: build ## Run Thaw under faults and print what they cost; ONLY=NAME,... for some rows, QUICK=1 for a tenth of the faults.
	@PYTHONPATH=tests .venv/bin/python -m chaos --only '$(ONLY)' $(if $(QUICK),--quick)

# Seeds of `make sim`, and how many of them may be spent on one planted bug.
SEEDS ?= 10000
MOST ?= 400

sim: setup ## Simulate 10,000 seeds of the cluster, then plant bugs that some seed must notice; SEEDS=n, or SEED=n for one with its log.
	@# Of the whole workspace, so that its dependencies are those of every other build.
	@cargo build --workspace --bin thaw-sim --features thaw-sim/mutants
	@target/debug/thaw-sim $(if $(SEED),--seed $(SEED) $(MUTANT),0 $(SEEDS) $(MOST))

fmt: setup ## Format the Rust code.
	cargo fmt --all

lint: setup ## Check formatting, lints and docs; warnings are errors.
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps
