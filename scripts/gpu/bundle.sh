#!/usr/bin/env bash
# Puts what gpu_check.sh needs into target/gpu-check/, and into target/gpu-check.tar.gz (with --no-tar: not), for a machine
# with GPUs that can build nothing. There: tar xf gpu-check.tar.gz && gpu-check/scripts/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/../.."

scripts/setup.sh
# rustup writes its env file without changing running shells
# shellcheck disable=SC1091
command -v cargo >/dev/null || . "$HOME/.cargo/env"

cargo build --release --quiet --locked -p fsdp-launch -p fsdp-train
cargo build --release --quiet --locked -p fsdp-comm --example bandwidth
cargo build --release --quiet --locked -p fsdp-torch-ext --example gpu_kernels
tests=$(cargo test --release --quiet --locked -p fsdp-tests-parity --no-run --message-format=json | python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message["reason"] == "compiler-artifact" and message["executable"] and "test" in message["target"]["kind"]:
        print(message["target"]["name"], message["executable"])
')

bundle=target/gpu-check
rm -rf "$bundle"
mkdir -p "$bundle/bin" "$bundle/scripts/bench"
for program in fsdp-launch fsdp-train examples/bandwidth examples/gpu_kernels; do
    strip -o "$bundle/bin/$(basename "$program")" "target/release/$program"
done
while read -r name file; do strip -o "$bundle/bin/parity-$name" "$file"; done <<<"$tests"
cp -r tests/parity/goldens "$bundle/goldens"
mkdir "$bundle/scripts/gpu"
cp scripts/gpu/*.py scripts/gpu/*.sh "$bundle/scripts/gpu/"
cp scripts/gpu_check.sh "$bundle/scripts/"
cp scripts/bench/bandwidth.py "$bundle/scripts/bench/"
git describe --always --dirty > "$bundle/VERSION" 2>/dev/null || echo unknown > "$bundle/VERSION"

[ "${1:-}" = --no-tar ] && exit 0
tar -C target -czf "$bundle.tar.gz" gpu-check
bytes=$(stat -c %s "$bundle.tar.gz")
[ "$bytes" -lt $((64 << 20)) ] || { echo "bundle: $bundle.tar.gz has $bytes bytes, more than 64 MiB" >&2; exit 1; }
# A machine with an older C library cannot run it.
glibc=$(for file in "$bundle"/bin/*; do objdump -T "$file"; done | grep -o 'GLIBC_2\.[0-9]*' | sort -Vu | tail -1)
echo "bundle: $bundle.tar.gz, $((bytes >> 20)) MiB, needs $glibc and torch 2.11.0"
