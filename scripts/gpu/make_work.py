"""Writes a model of a given shape, to be initialised at random, and random tokens to train it on.

    make_work.py SHAPE FOLDER --lines N --seq-len T

makes FOLDER/model/config.json and FOLDER/train.jsonl, N lines of T tokens, the same ones each time.
"""
import argparse, json, random
from pathlib import Path

# hidden_size, intermediate_size, layers, heads, key-value heads, vocab_size
SHAPES = {
    "tiny": (256, 704, 4, 4, 2, 4096),  # 4.8 M parameters
    "1b": (2048, 5632, 22, 32, 4, 32000),  # 1.1 B, TinyLlama's
    "7b": (4096, 11008, 32, 32, 32, 32000),  # 6.7 B, Llama 2's
}


def config(shape, seq_len):
    hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[shape]
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=hidden, num_hidden_layers=layers,
                intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
                vocab_size=vocab, hidden_act="silu", max_position_embeddings=seq_len, rms_norm_eps=1e-5,
                rope_theta=10000.0, rope_scaling=None, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
                initializer_range=0.02, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16")


def make(folder, shape, num_lines, seq_len):
    """Returns the paths of the model's folder and of the data."""
    model, data = Path(folder) / "model", Path(folder) / "train.jsonl"
    model.mkdir(parents=True, exist_ok=True)
    (model / "config.json").write_text(json.dumps(config(shape, seq_len), indent=1) + "\n")
    rng, vocab = random.Random(0), SHAPES[shape][-1]
    with open(data, "w") as file:
        for _ in range(num_lines):
            file.write(json.dumps({"input_ids": rng.choices(range(vocab), k=seq_len)}) + "\n")
    return model, data


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder")
    parser.add_argument("--lines", type=int, required=True)
    parser.add_argument("--seq-len", type=int, required=True)
    args = parser.parse_args()
    print(*make(args.folder, args.shape, args.lines, args.seq_len), sep="\n")


if __name__ == "__main__":
    main()
