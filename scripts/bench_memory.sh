#!/usr/bin/env bash
# The largest model that one cap of memory per rank lets train on four CPU ranks: not sharded and fully sharded, with
# fsdp-launch and with PyTorch (DDP, FSDP2) beside it. Each is found by really training. Arguments go to
# bench/memory.py (--help).
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
# rustup writes its env file without changing running shells
# shellcheck disable=SC1091
command -v cargo >/dev/null || . "$HOME/.cargo/env"
cargo build --release --quiet -p fsdp-launch -p fsdp-train

python=$(scripts/peer-python.sh)
exec "$python" scripts/bench/memory.py "$@"
