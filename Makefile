# Every target does its own set-up; `make demo` and `make test` work on a fresh clone.
.PHONY: help setup build demo test bench accuracy fmt lint

help:
	@echo "make setup     compiler, Rust and libtorch (VITQ_CUDA=1: with CUDA); instant when done"
	@echo "make build     target/release/vitq"
	@echo "make demo      quantize and serve the demo models"
	@echo "make test      format, lints, tests, documentation, licences"
	@echo "make bench     speed beside PyTorch and ONNX Runtime into bench/results"
	@echo "make accuracy  methods x models x bits into bench/out"
	@echo "make fmt       format the code"
	@echo "make lint      clippy, warnings as errors"

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
	@scripts/setup.sh bench
	@scripts/bench.sh

accuracy: build
	@scripts/accuracy.sh

fmt: setup
	cargo fmt

lint: setup
	cargo clippy --locked --all-targets -- -D warnings
