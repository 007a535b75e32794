#!/usr/bin/env bash
# Prepares a checkout: libtorch 2.11.0 (from the PyPI wheel) into .deps/, where .cargo/config.toml points to it: its CPU
# part, and where there is an NVIDIA GPU its CUDA part too (FSDP_CUDA=1: in any case, FSDP_CUDA=0: in no case).
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

case ${FSDP_CUDA:-auto} in
auto) if [ -e /dev/nvidia0 ] || nvidia-smi >/dev/null 2>&1; then cuda=1; else cuda=0; fi ;;
0 | 1) cuda=$FSDP_CUDA ;;
*) die "FSDP_CUDA: expected 0 or 1, got $FSDP_CUDA" ;;
esac

# The stamp holds this script's own digest: a change of pins or of the layout makes the folder anew. A folder with the
# CUDA part serves those who do not need it.
stamp=.deps/stamp-$(sha256sum scripts/setup.sh | cut -c1-16)
[ -f "$stamp-cuda" ] && exit 0
if [ "$cuda" = 1 ]; then stamp=$stamp-cuda; fi
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
size="530 MB"
if [ "$cuda" = 1 ]; then
    # What libtorch_cuda.so needs, in the versions that the wheel's metadata and cuda-toolkit 13.0.2 ask for. Left out:
    # cusolver, for libtorch_cuda_linalg.so, which libtorch loads for factorisations; nothing here makes any.
    size="2.3 GB"
    cat >> .deps.tmp/requirements.txt <<'R'
nvidia-cublas==13.1.0.3 --hash=sha256:ee8722c1f0145ab246bccb9e452153b5e0515fd094c3678df50b2a0888b8b171
nvidia-cuda-nvrtc==13.0.88 --hash=sha256:ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575
nvidia-cudnn-cu13==9.19.0.56 --hash=sha256:d20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf
nvidia-cufft==12.0.0.61 --hash=sha256:6c44f692dce8fd5ffd3e3df134b6cdb9c2f72d99cf40b62c32dde45eea9ddad3
nvidia-cufile==1.15.1.6 --hash=sha256:08a3ecefae5a01c7f5117351c64f17c7c62efa5fffdbe24fc7d298da19cd0b44
nvidia-curand==10.4.0.35 --hash=sha256:1aee33a5da6e1db083fe2b90082def8915f30f3248d5896bcec36a579d941bfc
nvidia-cusparse==12.6.3.3 --hash=sha256:2b3c89c88d01ee0e477cb7f82ef60a11a4bcd57b6b87c33f789350b59759360b
nvidia-cusparselt-cu13==0.8.0 --hash=sha256:25e30a8a7323935d4ad0340b95a0b69926eee755767e8e0b1cf8dd85b197d3fd
nvidia-nccl-cu13==2.28.9 --hash=sha256:e4553a30f34195f3fa1da02a6da3d6337d28f2003943aa0a3d247bbc25fefc42
nvidia-nvjitlink==13.0.88 --hash=sha256:13a74f429e23b921c1109976abefacc69835f2f433ebd323d3946e11d804e47b
nvidia-nvshmem-cu13==3.4.5 --hash=sha256:290f0a2ee94c9f3687a02502f3b9299a9f9fe826e6d0287ee18482e78d495b80
R
fi
say "fetching libtorch 2.11.0 ($size) with pip"
.deps.tmp/venv/bin/pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
    --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 \
    --platform manylinux_2_18_x86_64 --platform manylinux2014_x86_64 \
    --dest .deps.tmp/wheels -r .deps.tmp/requirements.txt ||
    die "pip could not fetch the pinned wheels (see above)"

say "unpacking"
.deps.tmp/venv/bin/python - "$cuda" <<'P'
import glob, os, sys, zipfile
keep = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}
cuda = sys.argv[1] == "1"
if cuda:
    keep |= {"libtorch_cuda.so", "libc10_cuda.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so"}
# As in site-packages: the libraries find each other by paths like $ORIGIN/../../nvidia/cu13/lib.
for wheel in glob.glob(".deps.tmp/wheels/*.whl"):
    with zipfile.ZipFile(wheel) as z:
        for name in z.namelist():
            is_nvidia = name.startswith("nvidia/") and ".so" in name
            if name.startswith("torch/include/") or os.path.basename(name) in keep or (cuda and is_nvidia):
                z.extract(name, ".deps.tmp/root")
    os.remove(wheel)
P
# The link folder: torch-sys links `-ltorch -ltorch_cpu -lc10 -lgomp`; with libtorch.so a linker script that
# names only libtorch_cpu, the binary does not depend on CUDA, and CUDA kernels can be loaded at run time. They lie
# beside the file that libtorch_cpu.so links to; a libtorch_cuda.so here would be linked by torch-sys.
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
