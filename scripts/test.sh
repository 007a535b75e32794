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
# One profile for all: libtorch's bindings take minutes to compile.
say "format";  cargo fmt --all --check
say "build";   cargo build --release --locked
say "lints";   cargo clippy --release --locked --workspace --all-targets -- -D warnings
say "docs";    RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps --quiet
say "tests";   cargo test --release --locked --workspace
say "quickstart"; scripts/quickstart.sh
say "all tests passed"
