#!/usr/bin/env bash
# Makes tests/parity/goldens anew (see goldens.py), with pinned versions in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=target/py-goldens
python=${GOLDENS_PYTHON:-$venv/bin/python}
if [ -z "${GOLDENS_PYTHON:-}" ] && [ ! -f "$venv/ready" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv" || { echo "goldens: python3 -m venv fails: apt-get install python3-venv" >&2; exit 1; }
    "$venv/bin/pip" install --quiet --disable-pip-version-check \
        torch==2.11.0 transformers==5.3.0 numpy==2.4.6 safetensors==0.8.0
    touch "$venv/ready"
fi
exec "$python" scripts/goldens.py "$@"
