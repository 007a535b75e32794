#!/usr/bin/env bash
# Prints the path of a Python with PyTorch and transformers, pinned, in an environment of its own (5 GB, made once): for
# the goldens and the benchmark, not for the tests. PEER_PYTHON in the environment is used instead.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=target/py-peer
if [ -n "${PEER_PYTHON:-}" ]; then
    echo "$PEER_PYTHON"
    exit 0
fi
if [ ! -f "$venv/ready" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv" >&2 || { echo "peer-python: python3 -m venv fails: apt-get install python3-venv" >&2; exit 1; }
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.11.0 transformers==5.3.0 numpy==2.4.6 safetensors==0.8.0 >&2
    touch "$venv/ready"
fi
echo "$PWD/$venv/bin/python"
