"""Bandwidth of the collectives that PyTorch uses, Gloo's on CPUs and NCCL's on GPUs: a JSON line for each collective and
size. A process a rank, with torchrun's variables.

    torchrun --nproc-per-node N bandwidth.py [--device cpu|cuda]

Measured as by `cargo run --release -p fsdp-comm --example bandwidth`: bytes of the full buffer over the time of the
slowest rank, the median over the repeats.
"""
import argparse, json, os, time

import torch
import torch.distributed as dist

MIB = 1 << 20
WARM, REPEATS = 3, 11


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device = parser.parse_args().device
    is_gpu = device == "cuda"
    torch.set_num_threads(1)
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for mib in (16, 64, 256) if is_gpu else (16, 64):
        full = torch.ones(mib * MIB // 4, device=device)
        shard = torch.ones(mib * MIB // 4 // world, device=device)
        for name, collective in dict(
            all_gather=lambda: dist.all_gather_into_tensor(full, shard),
            reduce_scatter=lambda: dist.reduce_scatter_tensor(shard, full),
            all_reduce=lambda: dist.all_reduce(full),
        ).items():
            seconds = torch.zeros(WARM + REPEATS)
            for i in range(len(seconds)):
                dist.barrier()
                if is_gpu:
                    torch.cuda.synchronize()
                start = time.monotonic()
                collective()
                if is_gpu:
                    torch.cuda.synchronize()
                seconds[i] = time.monotonic() - start
            seconds = seconds.to(device)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if rank == 0:
                gib_per_sec = mib / 1024 / seconds[WARM:].median().item()
                print(json.dumps(dict(collective=name, mib=mib, gib_per_sec=gib_per_sec)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
