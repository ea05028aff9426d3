#!/usr/bin/env bash
# Every check of a change. Runs all of them even when one fails, and ends with one line,
# `N passed, N failed`, which is also left in target/test-summary.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

failures=()
check() {
  printf '\n== %s\n' "$*"
  "$@" || failures+=("$*")
}

# Tests run side by side: libtorch threads of their own would only fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

mkdir -p target
log=target/test-output.txt
rm -f target/test-summary.txt
tests() { cargo test --locked --all-features --no-fail-fast 2>&1 | tee "$log"; }

check cargo fmt --check
check cargo clippy --locked --all-targets -- -D warnings
# What the first one does not see: the code behind features, and the tests of it.
check cargo clippy --locked --all-features --lib --bins --test program -- -D warnings
check tests
check cargo run --locked --all-features --example schedules
check env RUSTDOCFLAGS="-D warnings" cargo doc --locked --all-features --no-deps
if cargo deny --version >/dev/null 2>&1; then
  check cargo deny check
else
  printf '\n== cargo deny is not installed: licences and advisories were not checked\n'
fi

# Adds up "test result: ok. 12 passed; 0 failed; ..." of every test binary.
summary=$(awk '/^test result:/ { for (i = 1; i < NF; i++) {
    if ($(i + 1) ~ /^passed/) passed += $i
    if ($(i + 1) ~ /^failed/) failed += $i } }
  END { printf "%d passed, %d failed", passed, failed }' "$log")
printf '\n'
for failure in "${failures[@]}"; do printf 'FAILED: %s\n' "$failure"; done
echo "$summary" | tee target/test-summary.txt
[ "${#failures[@]}" -eq 0 ]
