#!/usr/bin/env bash
# Checks on a machine with GPUs what cannot be checked without one, in under nine minutes and without a network: kernels,
# parity with PyTorch, speed and memory beside FSDP2, NCCL. Prints one table; status 1 where a row fails. See docs/gpu.md.
#
#   scripts/gpu_check.sh [BLOCK...]
#
# In a bundle (scripts/gpu/bundle.sh) the programs are there, in a checkout they are built first. libtorch is that of
# PYTHON's torch 2.11.0 (default: python3). DEVICE=cpu tries the script itself without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { printf 'gpu_check: %s\n' "$*" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || die "$python is missing: set PYTHON to a Python with torch 2.11.0"
# Without importing it, which takes seconds.
found=$("$python" - <<'P'
import importlib.metadata, importlib.util, os
try:
    print(importlib.metadata.version("torch"), os.path.dirname(importlib.util.find_spec("torch").origin))
except (importlib.metadata.PackageNotFoundError, AttributeError):
    pass
P
)
read -r torch folder <<<"$found" || true
case $torch in
2.11.0 | 2.11.0+*) ;;
*) die "expected torch 2.11.0 in $python, got ${torch:-none}: set PYTHON" ;;
esac

if [ -d bin ]; then
    binaries=bin goldens=goldens
else
    scripts/gpu/bundle.sh --no-tar
    binaries=target/gpu-check/bin goldens=target/gpu-check/goldens
fi
# Before the programs' own RUNPATH: CPU and CUDA halves must be of one wheel.
export LD_LIBRARY_PATH="$folder/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
"$binaries/fsdp-train" --features >/dev/null || die "fsdp-train does not start with the libtorch in $folder/lib (see above)"
GPU_CHECK_TORCH=$torch exec "$python" scripts/gpu/check.py "$binaries" "$goldens" "$@"
