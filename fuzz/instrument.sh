#!/usr/bin/env bash
# The compiler, with coverage for the crates whose code takes bytes apart. Only these: their branches are
# what the fuzzer is to learn, and not those of the hundreds of crates around them. All of it is stable.
# `--cfg fuzzing` makes `png` ignore checksums, which no mutation survives.
set -euo pipefail
case " $* " in
*" --crate-name vitq "* | *" --crate-name png "* | *" --crate-name image_webp "* | *" --crate-name safetensors "*)
  exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
  ;;
*) exec "$@" ;;
esac
