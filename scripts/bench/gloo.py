"""Bandwidth of Gloo's collectives, started by torchrun: a JSON line for each collective and size.

Measured as by `cargo run --release -p fsdp-comm --example bandwidth`: bytes of the full buffer over the time of the
slowest rank, the median over the repeats.
"""
import json, time

import torch
import torch.distributed as dist

MIB = 1 << 20
WARM, REPEATS = 3, 11


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for mib in (16, 64):
        full = torch.ones(mib * MIB // 4)
        shard = torch.ones(mib * MIB // 4 // world)
        for name, collective in dict(
            all_gather=lambda: dist.all_gather_into_tensor(full, shard),
            reduce_scatter=lambda: dist.reduce_scatter_tensor(shard, full),
        ).items():
            seconds = torch.zeros(WARM + REPEATS)
            for i in range(len(seconds)):
                dist.barrier()
                start = time.monotonic()
                collective()
                seconds[i] = time.monotonic() - start
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if rank == 0:
                gib_per_sec = mib / 1024 / seconds[WARM:].median().item()
                print(json.dumps(dict(collective=name, mib=mib, gib_per_sec=gib_per_sec)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
