#!/usr/bin/env bash
# The whole round on the demo model: quantize, classify, evaluate, restart, classify again.
# Fails if any step fails, and always stops the server. Usage: scripts/demo.sh [BINARY]
set -euo pipefail
cd "$(dirname "$0")/.."

vitq=${1:-target/release/vitq}
checkpoint=digits-vit
model=digits-vit-ubb-4bit
images=()
for digit in 0 3 7; do
  files=(demo/datasets/digits/val/"$digit"/*.png)
  images+=("${files[0]}")
done
work=$(mktemp -d)
server_pid=

stop_server() {
  [ -n "$server_pid" ] || return 0
  kill -TERM "$server_pid" 2>/dev/null || true
  wait "$server_pid"
  server_pid=
}

finish() {
  local code=$?
  stop_server || true
  if [ "$code" -ne 0 ]; then
    printf '\ndemo failed (exit code %s); the end of the server log:\n' "$code" >&2
    tail -n 20 "$work/server.log" >&2 || true
  fi
  rm -rf "$work"
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

start_server() {
  : >"$work/address"
  "$vitq" serve --listen 127.0.0.1:0 --ops-listen 127.0.0.1:0 --data-dir "$work/data" \
    --checkpoints demo/checkpoints --datasets demo/datasets \
    >"$work/address" 2>>"$work/server.log" &
  server_pid=$!
  for _ in $(seq 600); do
    VITQ_SERVER=$(sed -n 's/^listening on //p' "$work/address")
    if [ -n "$VITQ_SERVER" ]; then
      export VITQ_SERVER
      return
    fi
    kill -0 "$server_pid" 2>/dev/null || return 1
    sleep 0.1
  done
  echo "the server did not start within a minute" >&2
  return 1
}

step() { printf '\n== %s\n' "$*"; }

# The first value of a field in indented JSON.
field() { sed -n "s/^ *\"$1\": \"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}\$/\1/p" "$2" | head -n 1; }

step "start the server"
start_server
echo "$VITQ_SERVER"

step "quantize $checkpoint with ubb at 4 bits, 32 calibration images"
"$vitq" quantize --checkpoint "$checkpoint" --method ubb --bits 4 \
  --calib-dataset digits/calib --calib-images 32 --seed 0 --name "$model"

step "classify images of a 0, a 3 and a 7"
"$vitq" classify --model "$model" --top-k 2 "${images[@]}" | tee "$work/before"

step "evaluate on all validation images"
"$vitq" evaluate --model "$model" --dataset digits/val --json >"$work/evaluation"
"$vitq" models get "$model" --json >"$work/model"
echo "$(field images "$work/evaluation") images"

step "restart the server and classify from the stored artifact"
stop_server
start_server
"$vitq" classify --model "$model" --top-k 2 "${images[@]}" | tee "$work/after"
cmp "$work/before" "$work/after"
echo "the same answers"
stop_server

step "measure the float model"
"$vitq" bench --checkpoint "demo/checkpoints/$checkpoint" --val demo/datasets/digits/val \
  --methods float --out "$work/float" --json >"$work/float.json" 2>/dev/null

artifact=$(field artifact_bytes "$work/model")
source=$(field source_bytes "$work/model")
printf '\n%-24s %10s %10s\n' "" "float" "4 bits"
printf '%-24s %8.2f %% %8.2f %%\n' "top-1" \
  "$(field top1 "$work/float.json")" "$(field top1 "$work/evaluation")"
printf '%-24s %10s %8.2f %%\n' "agreement with float" "" "$(field agreement "$work/evaluation")"
printf '%-24s %10s %10s\n' "bytes on disk" "$source" "$artifact"
printf '%-24s %10s %8.1f %%\n' "share of the checkpoint" "" \
  "$(awk -v a="$artifact" -v s="$source" 'BEGIN { print 100 * a / s }')"
