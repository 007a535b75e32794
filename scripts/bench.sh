#!/usr/bin/env bash
# Trains the same model on the same data with PyTorch FSDP2 + Gloo and with fsdp-launch, in turns, two ranks of one
# thread each, and compares tokens/s, peak RSS, start-up and bandwidth. Arguments go to bench/compare.py (--help).
# BENCH_PYTHON names a Python that has torch and transformers; else one is made in target/py-bench.
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/setup.sh
# rustup writes its env file without changing running shells
# shellcheck disable=SC1091
command -v cargo >/dev/null || . "$HOME/.cargo/env"
cargo build --release --quiet -p fsdp-launch -p fsdp-train
cargo build --release --quiet -p fsdp-comm --example bandwidth

python=${BENCH_PYTHON:-target/py-bench/bin/python}
if [ -z "${BENCH_PYTHON:-}" ] && [ ! -f target/py-bench/ready ]; then
    rm -rf target/py-bench
    python3 -m venv target/py-bench ||
        { echo "bench: python3 -m venv fails: apt-get install python3-venv" >&2; exit 1; }
    target/py-bench/bin/pip install --quiet --disable-pip-version-check \
        torch==2.11.0 transformers==5.3.0 numpy==2.4.6 safetensors==0.8.0
    touch target/py-bench/ready
fi
exec "$python" scripts/bench/compare.py "$@"
