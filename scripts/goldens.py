"""Makes tests/parity/goldens: tiny models, their data, and what transformers + torch.optim.AdamW make of them.

    scripts/goldens.sh [CASE ...]          # make all goldens, or these
    scripts/goldens.sh --verify CASE DIR   # DIR: the model that fsdp-launch exported after training CASE for 20 steps

A case is a Hugging Face folder (config.json, safetensors), train.jsonl in `tokens` format, and golden.json: settings,
loss, gradient norm and learning rate of each step in fp32 in one process, the weights after the last step, and for
some cases the same in bf16 with FSDP2 on two ranks. A case must be sharp: its feature left out, the first loss must
change (`without`), and a second correct computation of it must give the same numbers far inside the tests' tolerance.
"""
import argparse, json, math, os, shutil, sys, tempfile, zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

GOLDENS = Path(__file__).resolve().parent.parent / "tests/parity/goldens"
# 36 sequences a step divide by every world size 1-4 times accumulation 1 and 3. 180 lines: the data repeats 4 times.
NUM_LINES = 180
SETTINGS = dict(steps=20, seq_len=32, global_batch_size=36, lr=3e-3, min_lr=3e-4, warmup_steps=4,
                betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)

BASE = dict(vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-5,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, initializer_range=0.02, use_cache=True)


def llama(**keys):
    return dict(BASE, architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, mlp_bias=False,
                attention_dropout=0.0, **keys)


def v4(theta, scaling=None):
    """Rotary keys as transformers 4 writes them."""
    return dict(rope_theta=theta, rope_scaling=scaling)


def v5(theta, **scaling):
    """Rotary keys as transformers 5 writes them."""
    return dict(rope_parameters=dict(rope_theta=theta, rope_type="default") | scaling)


# config: config.json; file_dtype: of the weights in the file; files: how many the weights are split into;
# without: config keys which, changed so, leave the case's feature out; bf16: (grad_accumulation,) of an FSDP2 golden
CASES = {
    "llama_tied": dict(
        config=llama(**v4(10000.0)) | dict(tie_word_embeddings=True), file_dtype=torch.bfloat16, files=1,
        without=[v4(500.0)]),
    "llama_untied": dict(
        config=llama(**v5(10000.0)) | dict(num_hidden_layers=3), file_dtype=torch.bfloat16, files=3,
        without=[v5(500.0)], bf16=1),
    "llama_gqa": dict(
        config=llama(**v5(10000.0), head_dim=20) | dict(num_attention_heads=6, num_key_value_heads=2),
        file_dtype=torch.float32, files=1, without=[v5(500.0), dict(rms_norm_eps=1e-2)]),
    "llama_rope_linear": dict(
        config=llama(**v5(10000.0, rope_type="linear", factor=4.0)), file_dtype=torch.bfloat16, files=1,
        without=[v5(10000.0)]),
    # wavelengths 6.3, 14.9, 35.3, ...: below 16 / 2 the rate is kept, above 16 / 0.5 divided by 8, between blended
    "llama_rope_llama3": dict(
        config=llama(**v4(1000.0, dict(factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0,
                                       original_max_position_embeddings=16, rope_type="llama3")), head_dim=16)
        | dict(tie_word_embeddings=True, num_key_value_heads=2), file_dtype=torch.bfloat16, files=2,
        without=[v4(1000.0), v4(1000.0, dict(rope_type="linear", factor=8.0)),
                 v4(1000.0, dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=2.0,
                                 original_max_position_embeddings=16, rope_type="llama3"))]),
    # a size that is no multiple of anything, and `type`, the key of older rope_scaling
    "llama_odd": dict(
        config=llama(**v4(10000.0, dict(type="linear", factor=2.5)), head_dim=14)
        | dict(vocab_size=97, hidden_size=39, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3,
               num_key_value_heads=1), file_dtype=torch.float32, files=1, without=[v4(10000.0)]),
    "mistral": dict(
        config=dict(BASE, architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=7,
                    attention_dropout=0.0, head_dim=16, **v4(10000.0))
        | dict(num_key_value_heads=2), file_dtype=torch.bfloat16, files=1,
        without=[dict(sliding_window=None), dict(sliding_window=8), dict(sliding_window=6)]),
    "qwen2": dict(
        config=dict(BASE, architectures=["Qwen2ForCausalLM"], model_type="qwen2", attention_dropout=0.0,
                    use_sliding_window=False, sliding_window=None, max_window_layers=2, **v4(1000.0))
        | dict(tie_word_embeddings=True, num_key_value_heads=2, rms_norm_eps=1e-6), file_dtype=torch.bfloat16, files=1,
        without=["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"]),
    "qwen3": dict(
        config=dict(BASE, architectures=["Qwen3ForCausalLM"], model_type="qwen3", attention_bias=False,
                    attention_dropout=0.0, use_sliding_window=False, sliding_window=None, max_window_layers=2,
                    head_dim=16, **v5(1000000.0))
        | dict(num_key_value_heads=2, rms_norm_eps=1e-6), file_dtype=torch.bfloat16, files=2,
        without=["self_attn.q_norm.weight", "self_attn.k_norm.weight"], bf16=3),
}


def make_weights(config, generator, dtype):
    """Random weights, large enough that every part matters: attention is far from uniform, norms far from 1."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = {}
    for name, p in model.named_parameters():  # a tied head is not named twice
        x = torch.randn(p.shape, generator=generator)
        if name.endswith("norm.weight"):
            x = 1 + 0.25 * x
        elif name.endswith(".bias"):
            x = 0.5 * x
        elif "embed_tokens" in name:
            x = x * (0.2 if config.tie_word_embeddings else 1.0)
        elif "lm_head" in name:
            x = 0.2 * x
        elif "q_proj" in name or "k_proj" in name:
            x = x * 1.3 / math.sqrt(p.shape[1])
        else:
            x = x / math.sqrt(p.shape[1])
        weights[name] = x.to(dtype).contiguous()
    return weights


def save_weights(folder, weights, num_files):
    if num_files == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(weights)
    index = {"metadata": {"total_size": sum(w.numel() * w.element_size() for w in weights.values())}, "weight_map": {}}
    for i in range(num_files):
        file = f"model-{i + 1:05}-of-{num_files:05}.safetensors"
        part = names[len(names) * i // num_files:len(names) * (i + 1) // num_files]
        save_file({n: weights[n] for n in part}, folder / file, {"format": "pt"})
        index["weight_map"] |= {n: file for n in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def make_lines(vocab, generator):
    """Noisy chains, so that there is something to learn. Lengths differ, prompts and single tokens are masked, some
    lines have no labels, and four neighbours no valid token: some rank then has an empty microbatch."""
    rand = lambda n: int(torch.randint(0, n, (1,), generator=generator))
    lines = []
    for i in range(NUM_LINES):
        length = SETTINGS["seq_len"] if i % 9 == 0 else 2 + rand(SETTINGS["seq_len"] - 1)
        ids = [rand(vocab)]
        while len(ids) < length:
            ids.append((5 * ids[-1] + 3) % vocab if rand(4) else rand(vocab))
        labels = list(ids)
        for t in range(length):
            if t < length // 4 or rand(10) == 0:
                labels[t] = -100
        if 36 <= i < 40:
            labels = [-100] * length
        lines.append({"input_ids": ids} if i % 5 == 0 and not 36 <= i < 40 else {"input_ids": ids, "labels": labels})
    return lines


def padded(lines):
    """The batch of these lines, padded on the right: input_ids and labels, [B, T]."""
    seq_len = SETTINGS["seq_len"]
    ids = [line["input_ids"] + [0] * (seq_len - len(line["input_ids"])) for line in lines]
    labels = [line.get("labels", line["input_ids"]) for line in lines]
    labels = [row + [-100] * (seq_len - len(row)) for row in labels]
    return torch.tensor(ids), torch.tensor(labels)


def num_valid_tokens(lines):
    return int((padded(lines)[1][:, 1:] != -100).sum())


def loss_sum(model, lines):
    ids, labels = padded(lines)
    # no attention mask: padding is on the right, so causal attention never sees it from a valid position
    logits = model(input_ids=ids, use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def learning_rate(step):
    """Of `step`, counted from 1: linear warm-up, then half a cosine whose first point, at step W + 1, is lr."""
    s, w, n = step, SETTINGS["warmup_steps"], SETTINGS["steps"]
    lr, min_lr = SETTINGS["lr"], SETTINGS["min_lr"]
    progress = max(0, s - 1 - w) / (n - w)
    return min(1, s / w) * (min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, decay_all=False):
    params = list(model.parameters())
    return torch.optim.AdamW(
        [dict(params=[p for p in params if p.ndim >= 2 or decay_all], weight_decay=SETTINGS["weight_decay"]),
         dict(params=[p for p in params if p.ndim < 2 and not decay_all], weight_decay=0.0)],
        lr=0.0, betas=SETTINGS["betas"], eps=SETTINGS["eps"])


def load(folder, attention):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).train()


def train(model, lines, rank=0, world=1, accumulation=1, optimizer=None):
    """The training run. Rank r takes, of microbatch m, the lines from (m * world + r) * B of the step's lines."""
    optimizer = optimizer or make_optimizer(model)
    batch = SETTINGS["global_batch_size"]
    size = batch // world // accumulation
    curve = dict(loss=[], grad_norm=[], lr=[])
    for step in range(1, SETTINGS["steps"] + 1):
        start = (step - 1) * batch % len(lines)
        step_lines = lines[start:start + batch]
        count = num_valid_tokens(step_lines)
        total = torch.zeros((), dtype=torch.float64)
        for m in range(accumulation):
            mine = step_lines[(m * world + rank) * size:][:size]
            loss = loss_sum(model, mine) / count
            (loss * world).backward()  # FSDP2 averages over ranks
            total += loss.detach().double()
        if world > 1:
            dist.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])
        norm = norm.full_tensor() if world > 1 else norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        curve["loss"].append(rounded(total.item()))
        curve["grad_norm"].append(rounded(norm.item()))
        curve["lr"].append(learning_rate(step))
    return curve


def fsdp2_rank(rank, folder, lines, accumulation, attention, result):
    """One of the two ranks of the bf16 run; rank 0 writes the curve."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{result}.store", rank=rank, world_size=2)
    model = load(folder, attention)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    curve = train(model, lines, rank, 2, accumulation)
    if rank == 0:
        Path(result).write_text(json.dumps(curve))
    dist.destroy_process_group()


def fsdp2(folder, lines, accumulation, attention="sdpa"):
    with tempfile.TemporaryDirectory() as tmp:
        result = tmp + "/curve.json"
        torch.multiprocessing.spawn(fsdp2_rank, (folder, lines, accumulation, attention, result), nprocs=2)
        return json.loads(Path(result).read_text())


def rounded(x):
    """Nine digits hold an fp32 number exactly."""
    return float(f"{x:.9g}")


def final_state(model):
    """Of the trained weights, what a test without PyTorch can compare; and what it answers to a prompt."""
    tensors = {}
    for name, p in model.named_parameters():
        x = p.detach().double().flatten()
        ramp = torch.arange(x.numel(), dtype=torch.float64) % 61 - 30  # so that values in wrong places are seen
        tensors[name] = dict(shape=list(p.shape), sum=rounded(x.sum().item()), abs_sum=rounded(x.abs().sum().item()),
                             ramp_sum=rounded((x * ramp).sum().item()), first=[rounded(v) for v in x[:8].tolist()])
    prompt = [3, 18, 93, 5, 28]
    logits, answer = answers(model, prompt)
    return dict(tensors=tensors, prompt=prompt, logits=[rounded(v) for v in logits], answer=answer)


@torch.no_grad()
def answers(model, prompt):
    """Logits after the prompt, and eight tokens of greedy generation."""
    model.eval()
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].tolist()
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                         max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    return logits, out[0, len(prompt):].tolist()


def largest_difference(a, b):
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def check_sharp(name, case, folder, lines, curve):
    """Other wrong computations must be seen, other right ones must not."""
    step_lines = lines[:SETTINGS["global_batch_size"]]
    first = curve["loss"][0] * num_valid_tokens(step_lines)
    for change in case["without"]:
        if isinstance(change, str):
            model = load(folder, "sdpa")
            for n, p in model.named_parameters():
                if n.endswith(change):
                    p.data.fill_(0.0 if n.endswith("bias") else 1.0)
        else:
            with tempfile.TemporaryDirectory() as tmp:
                other = Path(tmp) / "model"
                shutil.copytree(folder, other)
                write_config(other, case["config"] | change)
                model = load(other, "sdpa")
        with torch.no_grad():
            difference = abs(loss_sum(model, step_lines).item() - first) / first
        assert difference > 3e-5, f"{name}: {change} changes the loss by {difference:.1e} only"
        print(f"  without {change}: first loss differs by {difference:.1e}")

    model = load(folder, "sdpa")
    other = train(model, lines, optimizer=make_optimizer(model, decay_all=True))
    difference = largest_difference(other["loss"], curve["loss"])
    assert difference > 1e-4, f"{name}: decay of vectors changes the loss by {difference:.1e} only"
    print(f"  weight decay on norms and biases too: losses differ by {difference:.1e}")

    twin = train(load(folder, "eager"), lines, accumulation=3)
    for key, limit in dict(loss=1e-6, grad_norm=1e-5).items():
        difference = largest_difference(twin[key], curve[key])
        assert difference < limit, f"{name}: noise of {key} is {difference:.1e}"
        print(f"  eager attention, 3 microbatches: {key} differs by {difference:.1e}")


def write_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def make(name, case):
    print(name)
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    dtype_key = "torch_dtype" if "rope_theta" in case["config"] else "dtype"
    case["config"][dtype_key] = str(case["file_dtype"]).removeprefix("torch.")
    write_config(folder, case["config"])
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    config = transformers.AutoConfig.from_pretrained(folder)
    save_weights(folder, make_weights(config, generator, case["file_dtype"]), case["files"])
    lines = make_lines(config.vocab_size, generator)
    (folder / "train.jsonl").write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))

    model = load(folder, "sdpa")
    curve = train(model, lines)
    golden = dict(made_with=dict(torch=torch.__version__.split("+")[0], transformers=transformers.__version__),
                  settings=SETTINGS, fp32=curve)
    print(f"  loss {curve['loss'][0]:.4f} -> {curve['loss'][-1]:.4f}, "
          f"gradient norm {min(curve['grad_norm']):.3f} .. {max(curve['grad_norm']):.3f}")
    check_sharp(name, case, folder, lines, curve)
    if accumulation := case.get("bf16"):
        bf16 = fsdp2(folder, lines, accumulation)
        twin = fsdp2(folder, lines, accumulation, "eager")
        print(f"  bf16, FSDP2: loss -> {bf16['loss'][-1]:.4f}; differs from fp32 by "
              f"{largest_difference(bf16['loss'], curve['loss']):.1e}, with eager attention by "
              f"{max(abs(a - b) for a, b in zip(bf16['loss'], twin['loss'])):.1e} (absolute), gradient norm by "
              f"{largest_difference(twin['grad_norm'], bf16['grad_norm']):.1e}")
        golden["bf16"] = dict(world_size=2, grad_accumulation=accumulation, **bf16)
    golden["final"] = final_state(model)
    (folder / "golden.json").write_text(json.dumps(golden, indent=None, separators=(",", ":")) + "\n")


def verify(name, exported):
    """The exported folder loads in transformers, nothing missing or left over, and answers as the golden model."""
    golden = json.loads((GOLDENS / name / "golden.json").read_text())["final"]
    model, info = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    problems = {k: v for k, v in info.items() if v}
    assert not problems, f"{exported} does not load cleanly: {problems}"
    logits, answer = answers(model, golden["prompt"])
    scale = max(map(abs, golden["logits"]))
    difference = max(abs(a - b) for a, b in zip(logits, golden["logits"], strict=True)) / scale
    print(f"{name}: logits differ by {difference:.1e} of the largest, answer {answer}, expected {golden['answer']}")
    config = json.loads((Path(exported) / "config.json").read_text())
    if "bfloat16" in (config.get("dtype"), config.get("torch_dtype")):
        good = difference < 2e-2  # rounding the weights alone makes 1e-2, and may change the answer
    else:
        good = difference < 1e-4 and answer == golden["answer"]
    sys.exit(0 if good else f"goldens: {exported} is not the model that {name} gives")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", help="cases to make (default: all)")
    parser.add_argument("--verify", nargs=2, metavar=("CASE", "DIR"))
    args = parser.parse_args()
    if unknown := [c for c in args.cases if c not in CASES]:
        sys.exit(f"goldens: no case {unknown[0]!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    if args.verify:
        verify(*args.verify)
        return
    for name in args.cases or CASES:
        make(name, CASES[name])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
