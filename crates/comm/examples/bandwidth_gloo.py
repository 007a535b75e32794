#!/usr/bin/env python3
"""Bandwidth of PyTorch's Gloo back end, measured as bandwidth.rs measures ours, for comparison.

usage: bandwidth_gloo.py [WORLD_SIZE [ROUNDS]]     (needs torch; prints a JSON line for each collective and size)

Bandwidth = bytes of the full tensor / time of a round, the median over rounds of the slowest rank; one thread a rank.
"""

import json
import os
import socket
import statistics
import sys
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZES_MIB = (16, 64)
NUM_WARMUP = 3


def rank_main(rank: int, world_size: int, rounds: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    for mib in SIZES_MIB:
        n = (mib << 20) // 4 // world_size  # f32 elements of a rank's range
        shard, full = torch.ones(n), torch.ones(n * world_size)
        collectives = {
            "all_gather": lambda: dist.all_gather_into_tensor(full, shard),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(shard, full),
        }
        for name, collective in collectives.items():
            secs = []
            for i in range(NUM_WARMUP + rounds):
                dist.barrier()
                start = time.perf_counter()
                collective()
                slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                if i >= NUM_WARMUP:
                    secs.append(slowest.item())
            median = statistics.median(secs)
            if rank == 0:
                line = {"backend": "gloo", "collective": name, "world_size": world_size, "mib": mib}
                line |= {"secs": round(median, 6), "gib_per_sec": round(mib / 1024 / median, 3)}
                print(json.dumps(line, separators=(",", ":")), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    world_size, rounds = (int(arg) for arg in (sys.argv[1:] + ["2", "20"][len(sys.argv) - 1 :]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free_port = probe.getsockname()[1]
    mp.spawn(rank_main, (world_size, rounds, free_port), nprocs=world_size)
