"""The largest Llama that trains within a cap of memory per rank, not sharded and fully sharded; see ../bench_memory.sh.

A model fits if two steps of AdamW on four ranks of one thread each leave the peak RSS of every rank at or under the cap,
in one of three runs at least: the peer's peak differs from run to run. Only the number of blocks varies. The peak grows by the same amount for each, so two small models foretell the largest;
that it fits, and that one more block does not, is then found by training both.
"""
import argparse, json, subprocess, sys, tempfile
from pathlib import Path

import compare
from compare import CONFIG, finish, torchrun

compare.RANKS, compare.SEQ_LEN, compare.BATCH = 4, 16, 1
STEPS = 2
SHAPE = CONFIG | dict(vocab_size=1024)
METHODS = {
    ("fsdp-launch", "no_shard"): lambda work: ours(work, "no_shard"),
    ("fsdp-launch", "full_shard"): lambda work: ours(work, "full_shard"),
    ("PyTorch", "DDP"): lambda work: peer(work, "--strategy", "ddp"),
    ("PyTorch", "FSDP2"): lambda work: peer(work, "--strategy", "fsdp2", "--meta"),
}


def num_params(layers):
    d, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    return layers * (4 * d * d + 3 * d * f + 2 * d) + 2 * v * d + d


def ours(work, strategy):
    job = work / "job.toml"
    job.write_text(compare.JOB.format(dir=work, steps=STEPS, seq_len=compare.SEQ_LEN, batch=compare.BATCH, round=0)
                   + f'dtype = "bf16"\n[fsdp]\nstrategy = "{strategy}"\n')
    output_of([compare.RELEASE / "fsdp-launch", "--nproc", compare.RANKS, job], work)
    return json.loads((work / "out-0/metrics.jsonl").read_text().splitlines()[-1])["peak_memory_bytes"]


def peer(work, *strategy):
    script = torchrun("fsdp2_cpu.py", work / "model", work / "train.jsonl", "--steps", STEPS, "--batch", compare.BATCH,
                      *strategy)
    return json.loads(output_of(script, work).splitlines()[-1])["peak_memory_bytes"]


def output_of(command, work):
    with open(work / "log", "w+") as log, open(work / "stdout", "w+") as out:
        finish(subprocess.Popen(list(map(str, command)), stdout=out, stderr=log, env=compare.environment()), log)
        out.seek(0)
        return out.read()


def peak(run, layers, cap):
    """Bytes of the rank with the most; the least of three runs where the first ones do not fit."""
    least = None
    for _ in range(3):
        bytes = one_peak(run, layers)
        least = min(least or bytes, bytes)
        if least <= cap:
            break
    return least


def one_peak(run, layers):
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as tmp:
        work = Path(tmp)
        compare.CONFIG = SHAPE | dict(num_hidden_layers=layers)
        compare.make_work(work, STEPS)
        bytes = run(work)
    print(f"  {layers:>4} blocks, {num_params(layers) / 1e6:>6.1f} M parameters: {bytes / 2**20:>7.1f} MiB", flush=True)
    return bytes


def largest(run, cap):
    """The number of blocks that fit while one more does not."""
    at = {layers: peak(run, layers, cap) for layers in (2, 6)}
    by_slope = lambda other: int(2 + (cap - at[2]) * (other - 2) / (at[other] - at[2]))
    guess = by_slope(6)
    while True:
        if guess < 2:
            sys.exit(f"bench_memory: two blocks take {at[2]} bytes, more than the cap")
        for layers in (guess, guess + 1):
            if layers not in at:
                at[layers] = peak(run, layers, cap)
        if at[guess] <= cap < at[guess + 1]:
            return guess
        # The line through the small models leads near; from there on by steps.
        nearer = by_slope(guess)
        if nearer in at:
            nearer = guess + (1 if at[guess + 1] <= cap else -1)
        guess = nearer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cap-mib", type=int, default=2048, help="peak RSS that a rank may have (default 2048)")
    cap = parser.parse_args().cap_mib * 2**20

    blocks = {}
    for (who, strategy), run in METHODS.items():
        print(f"{who}, {strategy}:")
        blocks[who, strategy] = largest(run, cap)
    print(f"\nlargest model of {compare.RANKS} ranks with at most {cap / 2**20:.0f} MiB each, in millions of parameters")
    for who, names in {"fsdp-launch": ("no_shard", "full_shard"), "PyTorch": ("DDP", "FSDP2")}.items():
        whole, sharded = (num_params(blocks[who, name]) / 1e6 for name in names)
        print(f"{who:<12}  {names[0]:<8} {whole:>7.1f}   {names[1]:<10} {sharded:>7.1f}   ratio {sharded / whole:.2f}")


if __name__ == "__main__":
    main()
