# Every target does its own set-up; `make demo` and `make test` work on a fresh clone.
.PHONY: help setup build demo test bench fmt lint

help:
	@echo "make setup   compiler, Rust and libtorch (VITQ_CUDA=1: with CUDA); instant when done"
	@echo "make build   target/release/vitq"
	@echo "make demo    quantize and serve the demo models"
	@echo "make test    format, lints, tests, documentation, licences"
	@echo "make bench   methods x models x bits into bench/out"
	@echo "make fmt     format the code"
	@echo "make lint    clippy, warnings as errors"

setup:
	@scripts/setup.sh

build: setup
	cargo build --release --locked

demo: build
	@scripts/demo.sh

test:
	@scripts/setup.sh test
	@scripts/test.sh

bench: build
	@scripts/bench.sh

fmt: setup
	cargo fmt

lint: setup
	cargo clippy --locked --all-targets -- -D warnings
