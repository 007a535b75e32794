"""The peer of bench.sh: a Hugging Face Llama under PyTorch FSDP2 or DDP + Gloo on CPU ranks, started by torchrun.

    torchrun --nproc-per-node 2 fsdp2_cpu.py MODEL_DIR DATA --steps N --batch B

bf16 parameters, fp32 reduction, every block recomputed, fused AdamW on fp32 shards, gradient norm cut to 1; DDP computes
in bf16 by autocast. With --meta FSDP2 shards before there are values, so that no rank ever holds the whole model. Rank 0
prints a JSON line at the end of each step (loss, seconds since the end of the last step), then one with the peak RSS.
"""
import argparse, contextlib, json, os, resource, time

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM


def build(model_dir, strategy, meta):
    config = AutoConfig.from_pretrained(model_dir)
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.config.use_cache = False
    block = type(model.model.layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    if strategy == "ddp":
        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = torch.distributed.init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    model = fully_shard(model, mesh=mesh, mp_policy=policy)
    if meta:
        model.to_empty(device="cpu")
        for name, param in model.named_parameters():
            torch.nn.init.ones_(param) if "norm" in name else torch.nn.init.normal_(param, std=0.02)
        rotary = model.model.rotary_emb
        rotary.inv_freq.copy_(1.0 / config.rope_parameters["rope_theta"] ** (
            torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    return model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True, help="sequences a rank")
    parser.add_argument("--strategy", choices=["fsdp2", "ddp"], default="fsdp2")
    parser.add_argument("--meta", action="store_true")
    args = parser.parse_args()
    if args.meta and args.strategy != "fsdp2":
        parser.error("--meta goes with --strategy fsdp2")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    model = build(args.model_dir, args.strategy, args.meta)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    with open(args.data) as lines:
        sequences = torch.tensor([json.loads(line)["input_ids"] for line in lines])

    last_end = time.monotonic()
    for step in range(args.steps):
        start = (step * world + rank) * args.batch
        x = sequences[start:start + args.batch]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.strategy == "ddp"):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach() / world
        dist.all_reduce(mean)
        end = time.monotonic()
        if rank == 0:
            print(json.dumps(dict(step=step + 1, loss=mean.item(), step_time_s=end - last_end)), flush=True)
        last_end = end

    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps(dict(peak_memory_bytes=peak.item())), flush=True)
    dist.barrier()
    os._exit(0)  # torch's own shutdown now and then aborts ("terminate called without an active exception")


if __name__ == "__main__":
    main()
