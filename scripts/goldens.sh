#!/usr/bin/env bash
# Makes tests/parity/goldens anew (see goldens.py), with the Python of peer-python.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(scripts/peer-python.sh)
exec "$python" scripts/goldens.py "$@"
