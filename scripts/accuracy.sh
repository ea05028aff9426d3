#!/usr/bin/env bash
# Accuracy and speed of every method on the demo models, into bench/out; resumes where it stopped.
# Extra arguments go to `vitq bench`.
set -euo pipefail
cd "$(dirname "$0")/.."

exec target/release/vitq bench \
  --checkpoint demo/checkpoints/digits-vit --checkpoint demo/checkpoints/digits-swin \
  --calib demo/datasets/digits/calib --val demo/datasets/digits/val \
  --methods float,minmax,ubb --bits 4,6,8 --out bench/out "$@"
