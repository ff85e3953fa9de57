#!/usr/bin/env bash
# Runs the Rust and the Python tests, prints their closing lines, and ends with `N passed, N failed, N skipped`.
# Arguments go to cargo test, e.g. `tests/run.sh --workspace --lib`.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

status=0
if [ "$#" -gt 0 ]; then
    cargo test --no-fail-fast "$@" 2>&1 | tee "$log" || status=1
else
    cargo test --workspace --no-fail-fast 2>&1 | tee "$log" || status=1
    .chart/bin/python -m pytest -q tests/chart 2>&1 | tee -a "$log" || status=1
    (cd deploy/export && ../../.venv/bin/python -m pytest -q) 2>&1 | tee -a "$log" || status=1
fi

# "test result: ok. 3 passed; 0 failed; 1 ignored; ..." of cargo; "2 failed, 5 passed, 1 skipped in 3.4s" of pytest.
awk -v status="$status" '
    /^test result:/ || /^(=+ )?[0-9]+ (passed|failed|error|errors|skipped)[, ].*in [0-9.]+s/ {
        gsub(/[;,]/, " ")
        for (i = 2; i <= NF; i++) {
            if ($i == "passed") passed += $(i - 1)
            if ($i == "failed" || $i ~ /^errors?$/) failed += $(i - 1)
            if ($i == "ignored" || $i == "skipped") skipped += $(i - 1)
        }
    }
    END {
        # A test binary that does not build or dies leaves no closing line: that is a failure too.
        if (status != 0 && failed == 0) failed = 1
        printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
        exit failed > 0 || status != 0
    }' "$log"
