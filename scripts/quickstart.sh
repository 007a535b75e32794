#!/usr/bin/env bash
# Does all set-up, then the main job: trains a small Llama on generated instructions, fully sharded over two CPU ranks,
# and lets it answer prompts that it has not seen. Results are in out/quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
# shellcheck disable=SC1091
command -v cargo >/dev/null || . "$HOME/.cargo/env"

cargo build --release --locked --quiet
python3 scripts/make_quickstart.py out/quickstart-data
rm -rf out/quickstart
target/release/fsdp-launch --nproc 2 configs/quickstart.toml
