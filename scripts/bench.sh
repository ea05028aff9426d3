#!/usr/bin/env bash
# Speed of vitq beside PyTorch and ONNX Runtime, on this machine's CPU, into bench/results.
# Arguments go to scripts/yardsticks.py: --models, --methods, --bits, --batches, --rounds, …
set -euo pipefail
cd "$(dirname "$0")/.."

# Cargo names the program after a hash; its own messages tell the name.
forward=$(cargo build --release --locked --bench forward --message-format json-render-diagnostics |
  python3 -c 'import json, sys
artifacts = [json.loads(line) for line in sys.stdin]
print(*[a["executable"] for a in artifacts if a.get("target", {}).get("name") == "forward"])')

exec python3 scripts/yardsticks.py --vitq target/release/vitq --forward "$forward" \
  --python .venv-bench/bin/python --work bench/out/checkpoints --out bench/results "$@"
