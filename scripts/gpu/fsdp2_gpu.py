"""The peer of gpu_check.sh: a Llama under PyTorch FSDP2 in eager mode; a process a rank, with torchrun's variables.

    torchrun --nproc-per-node N fsdp2_gpu.py MODEL_DIR DATA --device cuda|cpu --batch B --warm W --steps S

bf16 parameters, fp32 reduction, every block recomputed, fused AdamW on fp32 shards, gradient norm cut to 1. The model is
transformers' where that is installed, else the one below. The host waits for the device before and after the S measured
steps only. Rank 0 prints one JSON line: model, seconds a step, peak memory (the largest over ranks, in bytes), losses.
"""
import argparse, importlib.util, json, os, time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        d, f, self.heads, self.kv_heads = (c[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads",
                                                          "num_key_value_heads"))
        self.head_dim = d // self.heads
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.q, self.o = linear(d, d), linear(d, d)
        self.k, self.v = (linear(d, self.kv_heads * self.head_dim) for _ in range(2))
        self.gate, self.up, self.down = linear(d, f), linear(d, f), linear(f, d)
        self.norm1, self.norm2 = (nn.RMSNorm(d, c["rms_norm_eps"]) for _ in range(2))

    def forward(self, x, cos, sin):  # [B, T, D]
        h = self.norm1(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in (self.q(h), self.k(h), self.v(h)))
        q, k = (y * cos + torch.cat((-y[..., self.head_dim // 2:], y[..., :self.head_dim // 2]), -1) * sin
                for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config, d = c, c["hidden_size"]
        self.embed = nn.Embedding(c["vocab_size"], d)
        self.layers = nn.ModuleList(Block(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.RMSNorm(d, c["rms_norm_eps"])
        self.head = nn.Linear(d, c["vocab_size"], bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=c["initializer_range"])

    def forward(self, tokens):  # [B, T] -> mean loss
        x = self.embed(tokens)
        width = self.config["hidden_size"] // self.config["num_attention_heads"]
        rates = self.config["rope_theta"] ** (-torch.arange(0, width, 2, device=tokens.device) / width)
        angles = torch.arange(tokens.shape[1], device=tokens.device)[:, None] * rates
        angles = torch.cat((angles, angles), -1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = self.head(self.norm(x))[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def build(model_dir, device):
    """The sharded model, its loss as a function of tokens, and its name."""
    if importlib.util.find_spec("transformers"):
        import transformers
        config = transformers.AutoConfig.from_pretrained(model_dir)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa",
                                                                  dtype=torch.float32)
        model.config.use_cache = False
        layers, loss = model.model.layers, lambda x: model(input_ids=x, labels=x).loss
        name = f"transformers {transformers.__version__}"
    else:
        with torch.device(device):
            model = Llama(json.loads((Path(model_dir) / "config.json").read_text()))
        layers, loss, name = model.layers, model, "plain torch"
    block = type(layers[0])
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block))
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy), loss, name


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_dir")
    parser.add_argument("data")
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--batch", type=int, required=True, help="sequences a rank")
    parser.add_argument("--warm", type=int, required=True, help="steps before the measured ones")
    parser.add_argument("--steps", type=int, required=True, help="measured steps")
    args = parser.parse_args()
    is_gpu = args.device == "cuda"
    if is_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    dist.init_process_group("nccl" if is_gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    model, loss_of, name = build(args.model_dir, args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    with open(args.data) as lines:
        sequences = torch.tensor([json.loads(line)["input_ids"] for line in lines])
    if is_gpu:
        sequences = sequences.pin_memory()

    losses = []
    for step in range(args.warm + args.steps):
        if step == args.warm:
            if is_gpu:
                torch.cuda.synchronize()
            start = time.monotonic()
        first = (step * world + rank) * args.batch % len(sequences)
        x = sequences[first:first + args.batch].to(args.device, non_blocking=True)
        loss = loss_of(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.detach() / world
        dist.all_reduce(mean)
        losses.append(mean)
    if is_gpu:
        torch.cuda.synchronize()
    step_secs = (time.monotonic() - start) / args.steps

    peak = torch.tensor(torch.cuda.max_memory_allocated() if is_gpu else 0, device=args.device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps(dict(model=name, step_secs=step_secs, peak_memory_bytes=peak.item(),
                              losses=torch.stack(losses).tolist())), flush=True)
    dist.barrier()
    os._exit(0)  # torch's own shutdown now and then aborts ("terminate called without an active exception")


if __name__ == "__main__":
    main()
