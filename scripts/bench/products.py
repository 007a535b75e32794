"""The matrix products of one training step, alone, on as many processes at once as the run has ranks.

    products.py CONFIG_JSON --tokens N --seq-len T --ranks R

Per rank and step, in bf16 on one thread: the linear layers of all blocks forward, again for recompute except in the
last block, and backward (two products each); the head forward and backward. Attention is timed apart, counted in the
same way. Prints one JSON object: seconds a step, the slowest rank's, and GFLOP/s a rank.
"""
import argparse, json, time

import torch
import torch.nn.functional as F

REPEATS = 5


def linear_shapes(config):
    """(inputs, outputs) of the linear layers of a block, and of the head."""
    d, f, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", d // heads)
    q, kv = heads * head_dim, config["num_key_value_heads"] * head_dim
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)], (d, config["vocab_size"])


class Linear:
    """Operands of a linear layer's three products; activations are shared by layers of one shape, weights are not."""

    def __init__(self, inputs, outputs, num_tokens, activations):
        new = lambda *shape: torch.randn(shape, dtype=torch.bfloat16)
        self.weight, self.grad = new(outputs, inputs), torch.empty(outputs, inputs, dtype=torch.bfloat16)
        self.x = activations.setdefault(inputs, new(num_tokens, inputs))
        self.y = activations.setdefault(outputs, new(num_tokens, outputs))
        self.num_flops = 2 * num_tokens * inputs * outputs  # of one product

    def forward(self):
        torch.mm(self.x, self.weight.t(), out=self.y)

    def backward(self):
        torch.mm(self.y, self.weight, out=self.x)
        torch.mm(self.y.t(), self.x, out=self.grad)


def step_of_products(blocks, head):
    flops = 0
    for block in blocks:
        for layer in block:
            layer.forward()
            flops += layer.num_flops
    head.forward()
    head.backward()
    flops += 3 * head.num_flops
    for i, block in reversed(list(enumerate(blocks))):
        for layer in block:
            if i + 1 < len(blocks):
                layer.forward()
                flops += layer.num_flops
        for layer in block:
            layer.backward()
            flops += 2 * layer.num_flops
    return flops


def step_of_attention(q, k, v, grad, num_blocks):
    for _ in range(num_blocks - 1):
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for _ in range(num_blocks):
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).backward(grad)


def median_seconds(barrier, work):
    seconds = []
    for _ in range(REPEATS + 1):
        barrier.wait()
        start = time.monotonic()
        work()
        seconds.append(time.monotonic() - start)
    return sorted(seconds[1:])[REPEATS // 2]  # the first one warms up


def rank_main(_, config, num_tokens, seq_len, barrier, results):
    torch.set_num_threads(1)
    num_blocks = config["num_hidden_layers"]
    per_block, head = linear_shapes(config)
    activations = {}
    blocks = [[Linear(*shape, num_tokens, activations) for shape in per_block] for _ in range(num_blocks)]
    head = Linear(*head, num_tokens, activations)
    flops = step_of_products(blocks, head)
    products_s = median_seconds(barrier, lambda: step_of_products(blocks, head))

    heads, head_dim = config["num_attention_heads"], per_block[0][1] // config["num_attention_heads"]
    shape = lambda heads: (num_tokens // seq_len, heads, seq_len, head_dim)
    q, k, v = (torch.randn(shape(h), dtype=torch.bfloat16, requires_grad=True)
               for h in (heads, config["num_key_value_heads"], config["num_key_value_heads"]))
    grad = torch.randn_like(q)
    attention_s = median_seconds(barrier, lambda: step_of_attention(q, k, v, grad, num_blocks))
    results.put((products_s, attention_s, flops))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--tokens", type=int, required=True, help="tokens a rank and step")
    parser.add_argument("--seq-len", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    args = parser.parse_args()
    with open(args.config) as file:
        config = json.load(file)
    context = torch.multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(args.ranks), context.Queue()
    torch.multiprocessing.spawn(rank_main, (config, args.tokens, args.seq_len, barrier, results), nprocs=args.ranks)
    ranks = [results.get() for _ in range(args.ranks)]
    products_s, attention_s = (max(rank[i] for rank in ranks) for i in (0, 1))
    gflops = ranks[0][2] / products_s / 1e9
    print(json.dumps(dict(products_s=products_s, attention_s=attention_s, products_gflops=gflops)))


if __name__ == "__main__":
    main()
