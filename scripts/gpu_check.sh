#!/usr/bin/env bash
# Golden tests, accuracy and speed on a machine with a GPU, beside PyTorch in the same run. Needs this
# repository, a binary built elsewhere, and a Python 3 with torch of the binary's version; no network.
# Usage: [OUT=DIR] [TESTS=DIR] scripts/gpu_check.sh BINARY [DEVICE]; DEVICE is cuda:0 unless given.
# Prints one table; leaves h200.json, tests.txt and the benches' own files in $OUT, and fails if a test
# did. Four minutes on an H100 with BITS=4 LIMIT=200 BATCHES=1,64,256, without the tests.
#
# TESTS is a folder of test programs, built where Rust is and carried like BINARY, in target/golden say:
#   mkdir -p target/golden
#   cargo test --all-features --lib --test numerics --no-run 2>&1 |
#     sed -n 's/.*Executable.*(\(.*\))$/\1/p' |
#     while read -r file; do strip -o "target/golden/$(basename "$file")" "$file"; done
set -euo pipefail
cd "$(dirname "$0")/.."

vitq=${1:?usage: scripts/gpu_check.sh BINARY [DEVICE]}
device=${2:-cuda:0}
out=${OUT:-bench/gpu}
python=${PYTHON:-python3}
# Smaller values make a quick trial without a GPU possible.
models=${MODELS:-deit_small,deit_base}
batches=${BATCHES:-1,8,64,256}
images=${IMAGES:-256}
# What compares with the authors' code, timm, files of earlier versions and the simulation, by parts of
# the tests' names: these compute on the device that VITQ_TEST_DEVICE names.
golden=(the_released_code the_authors_ recorded_logits timm_logits equal_timms gives_its_logits
  integers_compute_what_is_simulated)
work=$(mktemp -d)
sampler= server=
finish() {
  for pid in $sampler $server; do kill "$pid" 2>/dev/null || true; done
  rm -rf "$work"
}
trap finish EXIT
mkdir -p "$out"
start=$SECONDS
say() { printf '\n== %3s s: %s\n' "$((SECONDS - start))" "$*"; }

if [ -z "${LIBTORCH_FOLDERS:-}" ]; then
  # torch's own libraries, and NVIDIA's beside them.
  LIBTORCH_FOLDERS=$("$python" -c '
import glob, os, torch
root = os.path.dirname(torch.__file__)
print(":".join([os.path.join(root, "lib")] + glob.glob(os.path.join(root, "../nvidia/*/lib"))))')
fi
export LD_LIBRARY_PATH="$LIBTORCH_FOLDERS${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

say "machine"
{
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null ||
    echo "no GPU"
} | tee "$work/machine"
"$vitq" --version
# Memory of the whole GPU, twice a second: the largest value counts.
if command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -lms 500 >"$work/memory" 2>/dev/null &
  sampler=$!
fi

tests=()
if [ -n "${TESTS:-}" ]; then
  say "golden tests on $device"
  for program in "$TESTS"/*; do
    if [ -f "$program" ] && [ -x "$program" ]; then
      echo "Running $(basename "$program")"
      # Their fixtures are here, not where they were built.
      VITQ_TEST_DEVICE=$device CARGO_MANIFEST_DIR=$PWD timeout "${TESTS_LIMIT:-180}" \
        "$program" --test-threads 4 "${golden[@]}" 2>&1 || echo "ended with status $?"
    fi
  done | tee "$out/tests.txt"
  tests=(--tests "$out/tests.txt")
fi

say "accuracy of the demo models on $device and cpu"
devices=$device
if [ "$device" != cpu ]; then devices=$device,cpu; fi
timeout 120 "$vitq" bench --checkpoint demo/checkpoints/digits-vit \
  --checkpoint demo/checkpoints/digits-swin --calib demo/datasets/digits/calib \
  --val demo/datasets/digits/val --methods "float,${METHODS:-minmax,ubb}" --bits "${BITS:-4,6}" \
  --executor simulated,integer --device "$devices" ${LIMIT:+--limit "$LIMIT"} --out "$out/accuracy" --json >/dev/null

say "forward and calibration of $models with generated weights"
checkpoints=()
for model in ${models//,/ }; do
  "$vitq" generate --architecture "$model" --out "$work/$model"
  checkpoints+=(--checkpoint "$work/$model")
done
timeout 180 "$vitq" bench "${checkpoints[@]}" --calib demo/datasets/digits/calib \
  --val demo/datasets/digits/val --limit "$images" --methods float,minmax,ubb --bits 4 \
  --executor simulated,integer --batch-size "$batches" --device "$device" --out "$out/forward" --json >/dev/null

say "the same forwards in PyTorch"
timeout 150 "$python" scripts/torch_forward.py --models "$models" --batches "$batches" --deadline 90 \
  --kinds "${KINDS:-float32,float16,compiled_float16}" --device "${device%%:*}" >"$out/torch.json"

say "a server on $device: the demo, and what it tells of GPUs"
VITQ_DEVICE=$device VITQ_EXECUTOR=integer timeout 60 scripts/demo.sh "$vitq"
"$vitq" serve --listen 127.0.0.1:0 --ops-listen 127.0.0.1:9187 --device "$device" --data-dir "$work/data" \
  >/dev/null 2>"$work/server.log" &
server=$!
timeout 60 "$python" - <<'PYTHON'
import time, urllib.request
while True:
    try:
        metrics = urllib.request.urlopen("http://127.0.0.1:9187/metrics").read().decode()
        break
    except OSError:
        time.sleep(0.2)
print("\n".join(line for line in metrics.splitlines() if line.startswith(("vitq_gpu_", "vitq_build_info"))))
PYTHON
kill "$server" && wait "$server"
server=

say "report"
"$python" scripts/gpu_report.py --machine "$work/machine" --memory "$work/memory" \
  --accuracy "$out/accuracy/results.json" --forward "$out/forward/results.json" \
  --torch "$out/torch.json" "${tests[@]}" --commit "$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
  --seconds "$((SECONDS - start))" --device "$device" --output "$out/h200.json"
