#!/usr/bin/env bash
# Trains the same model on the same data with PyTorch FSDP2 + Gloo and with fsdp-launch, in turns, two ranks of one
# thread each, and compares tokens/s, peak RSS, start-up and bandwidth. Arguments go to bench/compare.py (--help).
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
# rustup writes its env file without changing running shells
# shellcheck disable=SC1091
command -v cargo >/dev/null || . "$HOME/.cargo/env"
cargo build --release --quiet -p fsdp-launch -p fsdp-train
cargo build --release --quiet -p fsdp-comm --example bandwidth

python=$(scripts/peer-python.sh)
exec "$python" scripts/bench/compare.py "$@"
