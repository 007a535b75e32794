"""Runs FSDP2 + Gloo and fsdp-launch in turns over the same work and compares them; see ../bench.sh.

Both train a random Llama of 30 M parameters for the same steps on the same random tokens, two ranks of one thread each.
A number is the median over the rounds. Start-up is the time from the command to the end of the first step, less one
median step. The matrix products of a step are timed alone; their share of a step is what cannot be made faster.
"""
import argparse, json, os, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RELEASE = HERE.parent.parent / "target/release"
RANKS, SEQ_LEN, BATCH = 2, 512, 2
CONFIG = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=512, num_hidden_layers=8,
              num_attention_heads=8, num_key_value_heads=8, intermediate_size=1408, vocab_size=4096, hidden_act="silu",
              max_position_embeddings=SEQ_LEN, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
              tie_word_embeddings=False, attention_bias=False, mlp_bias=False, initializer_range=0.02,
              bos_token_id=1, eos_token_id=2, torch_dtype="float32")
JOB = """
[model]
path = "{dir}/model"
init = "random"
[precision]
param = "bf16"
reduce = "fp32"
[activation_checkpointing]
mode = "full"
[optimizer]
lr = 1e-3
weight_decay = 0.01
[lr_scheduler]
kind = "constant"
[training]
steps = {steps}
seq_len = {seq_len}
micro_batch_size = {batch}
max_grad_norm = 1.0
[data]
train = ["{dir}/train.jsonl"]
format = "tokens"
shuffle = false
[checkpoint]
every_steps = 0
[output]
dir = "{dir}/out-{round}"
"""


def make_work(folder, steps):
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(CONFIG))
    rng = random.Random(0)
    with open(folder / "train.jsonl", "w") as file:
        for _ in range(steps * RANKS * BATCH):
            file.write(json.dumps({"input_ids": [rng.randrange(CONFIG["vocab_size"]) for _ in range(SEQ_LEN)]}) + "\n")


def environment():
    # Python's own warnings about threads and Hugging Face's look-ups are no part of the work
    return os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")


def torchrun(script, *args):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS),
            str(HERE / script), *map(str, args)]


def finish(process, log):
    if process.wait() != 0:
        log.seek(0)
        sys.exit(f"bench: {' '.join(process.args)} ended with status {process.returncode}:\n{log.read()}")


def run_peer(folder, steps, _):
    """Its lines, and the seconds from the command to the end of the first step."""
    with open(folder / "peer.log", "w+") as log:
        start = time.monotonic()
        command = torchrun("fsdp2_cpu.py", folder / "model", folder / "train.jsonl", "--steps", steps, "--batch", BATCH)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment())
        lines, first = [], None
        for line in process.stdout:
            first = first or time.monotonic() - start
            lines.append(json.loads(line))
        finish(process, log)
    *step_lines, end = lines
    return step_lines, end["peak_memory_bytes"], first


def run_ours(folder, steps, round):
    job = folder / f"job-{round}.toml"
    job.write_text(JOB.format(dir=folder, steps=steps, seq_len=SEQ_LEN, batch=BATCH, round=round))
    metrics = folder / f"out-{round}/metrics.jsonl"
    with open(folder / "ours.log", "w+") as log:
        start = time.monotonic()
        command = [RELEASE / "fsdp-launch", "--nproc", RANKS, job]
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=environment())
        while process.poll() is None and not (metrics.exists() and "\n" in metrics.read_text()):
            time.sleep(0.01)
        first = time.monotonic() - start
        finish(process, log)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return lines, lines[-1]["peak_memory_bytes"], first


def measure(run, folder, steps, warm, round):
    lines, peak, first = run(folder, steps, round)
    assert [line["step"] for line in lines] == list(range(1, steps + 1)), f"steps are missing: {lines}"
    step_s = statistics.median(line["step_time_s"] for line in lines[warm:])
    return dict(step_s=step_s, tokens_per_second=RANKS * BATCH * SEQ_LEN / step_s, peak_rss_mib=peak / 2**20,
                startup_s=first - step_s, first_loss=lines[0]["loss"], last_loss=lines[-1]["loss"])


def output_of(command):
    command = list(map(str, command))
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout


def bandwidths(command):
    """GiB/s by (collective, MiB)."""
    lines = [json.loads(line) for line in output_of(command).splitlines() if line.startswith("{")]
    return {(line["collective"], line["mib"]): line["gib_per_sec"] for line in lines}


def show(name, peer, ours, goal="", digits=1):
    print(f"{name:<34}{peer:>14.{digits}f}{ours:>14.{digits}f}{ours / peer:>10.2f} x   {goal}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a run (default 12)")
    parser.add_argument("--warm", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turns (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    args = parser.parse_args()

    sides = dict(peer=run_peer, ours=run_ours)
    rounds = dict(peer=[], ours=[])
    with tempfile.TemporaryDirectory(prefix="bench-") as tmp:
        folder, steps = Path(tmp), args.warm + args.steps
        make_work(folder, steps)
        for round in range(args.rounds):
            for side, run in sides.items():
                result = measure(run, folder, steps, args.warm, round)
                rounds[side].append(result)
                print(f"round {round + 1}, {side}: " + ", ".join(f"{k} {v:.3f}" for k, v in result.items()), flush=True)
        products = json.loads(output_of([sys.executable, HERE / "products.py", folder / "model/config.json", "--tokens",
                                         BATCH * SEQ_LEN, "--seq-len", SEQ_LEN, "--ranks", RANKS]))
    gloo = bandwidths(torchrun("bandwidth.py"))
    comm = bandwidths([RELEASE / "examples/bandwidth"])

    median = {side: {key: statistics.median(r[key] for r in results) for key in results[0]}
              for side, results in rounds.items()}
    peer, ours = median["peer"], median["ours"]
    print(f"\n{'':<34}{'FSDP2 + Gloo':>14}{'fsdp-launch':>14}{'ratio':>10}     goal")
    show("tokens/s", peer["tokens_per_second"], ours["tokens_per_second"], ">= 1.15")
    show("peak RSS of a rank, MiB", peer["peak_rss_mib"], ours["peak_rss_mib"], "<= 0.5")
    show("start-up, s", peer["startup_s"], ours["startup_s"], "<= 0.2", 2)
    for (name, mib), gib_per_sec in gloo.items():
        goal = "" if name == "all_reduce" else ">= 5"
        show(f"{name} {mib} MiB, GiB/s", gib_per_sec, comm[name, mib], goal, 2)
    for name, seconds in {"products": products["products_s"], "libtorch attention": products["attention_s"]}.items():
        share = {side: seconds / median[side]["step_s"] for side in median}
        print(f"{name + ', of a step':<34}{share['peer']:>14.0%}{share['ours']:>14.0%}     "
              f"{seconds:.3f} s of {ours['step_s']:.3f} s")
    if args.json:
        flat = lambda table: [dict(collective=c, mib=m, gib_per_sec=v) for (c, m), v in table.items()]
        ratios = {key: ours[key] / peer[key] for key in ("tokens_per_second", "peak_rss_mib", "startup_s")}
        Path(args.json).write_text(json.dumps(dict(rounds=rounds, median=median, ratios=ratios, products=products,
                                                   bandwidth=dict(gloo=flat(gloo), ours=flat(comm))), indent=1) + "\n")


if __name__ == "__main__":
    main()
