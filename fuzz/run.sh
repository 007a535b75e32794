#!/usr/bin/env bash
# Fuzzes targets, one after the other: fuzz/run.sh [SECONDS [TARGET]...]. What leads further goes to found/, what breaks a
# promise to artifacts/. It needs a nightly toolchain, and `cargo install cargo-fuzz --locked`.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-60}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || mapfile -t targets < <(basename -s .rs fuzz_targets/*.rs)
for target in "${targets[@]}"; do
    mkdir -p "found/$target"
    echo "== $target"
    # The promises bound memory themselves, and exactly; the limits here are for what is outside of them.
    cargo +nightly fuzz run --sanitizer none "$target" "found/$target" "corpus/$target" -- \
        -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 -verbosity=0
done
