#!/usr/bin/env bash
# Prepares a checkout: libtorch 2.11.0 (CPU part of the PyPI wheel) into .deps/, where .cargo/config.toml points to it.
# Idempotent; quick when done. A LIBTORCH set by the user is respected and nothing is fetched.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || [ -n "${LIBTORCH:-}" ] ||
    die "only Linux on x86_64 is set up by this script; set LIBTORCH to a libtorch 2.11 folder"
# rustup writes its env file without changing running shells
# shellcheck disable=SC1091
command -v cargo >/dev/null || { [ -f "$HOME/.cargo/env" ] && . "$HOME/.cargo/env"; }
command -v cargo >/dev/null || die "cargo is missing: install rustup (https://rustup.rs)"
rust=$(cargo --version | cut -d' ' -f2)
[ "$(printf '%s\n' 1.95.0 "$rust" | sort -V | head -1)" = 1.95.0 ] || die "Rust 1.95 or newer is needed, got $rust: rustup update"
command -v g++ >/dev/null || die "g++ is missing: apt-get install build-essential"

if [ -n "${LIBTORCH:-}" ]; then
    [ -d "$LIBTORCH/lib" ] || die "LIBTORCH=$LIBTORCH has no lib folder"
    say "using LIBTORCH=$LIBTORCH"
    exit 0
fi

# The stamp holds this script's own digest: a change of pins or of the layout makes the folder anew.
stamp=.deps/stamp-$(sha256sum scripts/setup.sh | cut -c1-16)
[ -f "$stamp" ] && exit 0

command -v python3 >/dev/null || die "python3 is missing: apt-get install python3-venv"
rm -rf .deps.tmp
mkdir -p .deps.tmp/wheels
trap 'rm -rf .deps.tmp' EXIT
python3 -m venv .deps.tmp/venv >/dev/null 2>&1 || die "python3 -m venv fails: apt-get install python3-venv"

# The wheels are used as archives only, so the Python version they are made for does not matter.
cat > .deps.tmp/requirements.txt <<'R'
torch==2.11.0 --hash=sha256:7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
nvidia-cuda-cupti==13.0.85 --hash=sha256:4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
nvidia-cuda-runtime==13.0.96 --hash=sha256:7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
R
say "fetching libtorch 2.11.0 (530 MB) with pip"
.deps.tmp/venv/bin/pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
    --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 --platform manylinux2014_x86_64 \
    --dest .deps.tmp/wheels -r .deps.tmp/requirements.txt ||
    die "pip could not fetch the pinned wheels (see above)"

say "unpacking"
.deps.tmp/venv/bin/python - <<'P'
import glob, os, zipfile
# The CPU part only: CUDA kernels and Python bindings are 540 MB and not linked.
keep = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}
for wheel in glob.glob(".deps.tmp/wheels/*.whl"):
    with zipfile.ZipFile(wheel) as z:
        for name in z.namelist():
            if name.startswith("torch/include/") or os.path.basename(name) in keep:
                z.extract(name, ".deps.tmp/root")
P
# The link folder: torch-sys links `-ltorch -ltorch_cpu -lc10 -lgomp`; with libtorch.so a linker script that
# names only libtorch_cpu, the binary does not depend on CUDA, and CUDA kernels can be loaded at run time.
mkdir -p .deps.tmp/root/libtorch/lib
(
    cd .deps.tmp/root/libtorch
    ln -s ../torch/include include
    for l in libtorch_cpu.so libc10.so libgomp.so.1; do ln -s "../../torch/lib/$l" "lib/$l"; done
    ln -s libgomp.so.1 lib/libgomp.so
    echo 'INPUT(-ltorch_cpu)' > lib/libtorch.so
    echo '2.11.0' > build-version
)
rm -rf .deps
mv .deps.tmp/root .deps
touch "$stamp"
say "libtorch 2.11.0 is ready in .deps/"
