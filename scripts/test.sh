#!/usr/bin/env bash
# Does all set-up and passes every test: format, lints, docs, unit and process tests, and the quickstart itself.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
# shellcheck disable=SC1091
command -v cargo >/dev/null || . "$HOME/.cargo/env"

for component in fmt clippy; do
    cargo "$component" --version >/dev/null 2>&1 ||
        { echo "cargo $component is missing: rustup component add rustfmt clippy" >&2; exit 1; }
done

say() { printf '\n== %s\n' "$*"; }
# The back end `mpi` is tested where an MPI library and libclang, which its bindings are made with, are installed.
features=()
if command -v mpicc >/dev/null && command -v mpirun >/dev/null &&
    { [ -n "${LIBCLANG_PATH:-}" ] || compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null; }; then
    features=(--features fsdp-train/mpi)
else
    say "the tests of MPI are skipped: no MPI library or no libclang (apt-get install libopenmpi-dev openmpi-bin libclang-dev)"
fi

{ [ "$(id -u)" = 0 ] && command -v slurmctld >/dev/null && command -v munged >/dev/null; } ||
    say "the tests on a SLURM of two nodes are skipped: not root, or no SLURM (apt-get install slurm-wlm munge)"
{ [ "$(id -u)" = 0 ] && command -v ip >/dev/null; } ||
    say "the test with network namespaces is skipped: not root, or no ip (apt-get install iproute2)"

command -v strace >/dev/null ||
    say "faults in system calls are skipped: no strace (apt-get install strace)"

# One profile for all: libtorch's bindings take minutes to compile.
say "format";  cargo fmt --all --check
say "quickstart"; scripts/quickstart.sh
say "build";   cargo build --release --locked "${features[@]}"
# The worker with faults that the fault laboratory asks for.
cargo build --release --locked -p fsdp-train --bin fsdp-train-faults "${features[@]}" --features fsdp-train/faults
say "lints";   cargo clippy --release --locked --workspace --all-targets "${features[@]}" --features fsdp-train/faults -- -D warnings
say "docs";    RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps --quiet
say "tests";   cargo test --release --locked --workspace "${features[@]}"
say "all tests passed"
