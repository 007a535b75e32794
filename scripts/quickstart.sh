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

# The answers of the last validation beside the right ones; most of them must be right.
python3 - out/quickstart/answers.jsonl out/quickstart-data/prompts.json <<'P'
import json, sys
right = {e["prompt"]: e["completion"] for e in json.load(open(sys.argv[2]))}
lines = [json.loads(line) for line in open(sys.argv[1])]
last = [line for line in lines if line["step"] == lines[-1]["step"]]
assert {line["prompt"] for line in last} == set(right), "the config asks other prompts than prompts.json holds"
num_right = sum(line["answer"] == right[line["prompt"]] for line in last)
print(f"\n{num_right} of {len(last)} answers to prompts that were not in the training data are right")
sys.exit(num_right * 2 <= len(last))
P
