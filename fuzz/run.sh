#!/usr/bin/env bash
# Runs a fuzz target: fuzz/run.sh TARGET [SECONDS [libFuzzer's options]]. Without seconds, ten minutes.
# What it learns is kept in fuzz/corpus/TARGET, what it breaks in fuzz/artifacts/TARGET.
set -euo pipefail
cd "$(dirname "$0")"
target="${1:?usage: fuzz/run.sh TARGET [SECONDS]}" seconds="${2:-600}"
shift; shift || true

export LIBTORCH="${LIBTORCH:-$(cd .. && pwd)/.venv/torch}" OMP_NUM_THREADS=1
export LD_LIBRARY_PATH="$LIBTORCH/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# The versions are those that the program is built with; only libFuzzer comes on top.
cp ../Cargo.lock Cargo.lock
RUSTC_WRAPPER="$PWD/instrument.sh" cargo build --bin "$target"

corpus="corpus/$target" seeds="../tests/fixtures/fuzz/$target" broken="artifacts/$target/"
mkdir -p "$corpus" "$seeds" "$broken"
"${CARGO_TARGET_DIR:-target}/debug/$target" "$corpus" "$seeds" -artifact_prefix="$broken" \
  -max_total_time="$seconds" -max_len=16384 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 "$@"
