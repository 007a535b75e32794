#!/usr/bin/env python3
"""Writes the quickstart's model folder and instruction data. Standard library only; the same bytes every time.

    scripts/make_quickstart.py [FOLDER]        default: out/quickstart-data

FOLDER/model/            config.json and a tokenizer, no weights: the job starts from random ones
FOLDER/train.jsonl       lines like {"prompt": "Reverse the word planet.", "completion": "tenalp"}
FOLDER/validation.jsonl  the same kinds of tasks; none of its prompts is in train.jsonl
FOLDER/prompts.json      prompts that are in neither file, with the right answers; quickstart.toml asks them

The answers follow rules and the operands are random, so a model that answers new prompts has learnt the rules.
"""

import json
import random
import sys
from pathlib import Path

NUM_TRAIN = 60_000
NUM_VALIDATION = 256
SEED = 20

SUM = "What is {} + {}?"
# Task -> rule. Words have 3 to 6 letters.
WORD_TASKS = {
    "Reverse the word {}.": lambda word: word[::-1],
    "Upper-case the word {}.": str.upper,
    "Sort the letters of {}.": lambda word: "".join(sorted(word)),
    "Count the letters of {}.": lambda word: str(len(word)),
}
# How often each task comes: the hardest most often.
SHARES = {
    SUM: 5,
    "Reverse the word {}.": 4,
    "Upper-case the word {}.": 2,
    "Sort the letters of {}.": 3,
    "Count the letters of {}.": 1,
}

# (task, operands) that training never sees.
ASKED = [
    (SUM, 23, 19),
    (SUM, 38, 45),
    (SUM, 16, 27),
    (SUM, 42, 31),
    ("Reverse the word {}.", "planet"),
    ("Reverse the word {}.", "window"),
    ("Reverse the word {}.", "shard"),
    ("Upper-case the word {}.", "garden"),
    ("Upper-case the word {}.", "rust"),
    ("Sort the letters of {}.", "orange"),
    ("Sort the letters of {}.", "tiger"),
    ("Count the letters of {}.", "tensor"),
]


def example(task, *operands):
    """The prompt of a task and its right answer."""
    answer = str(sum(operands)) if task == SUM else WORD_TASKS[task](*operands)
    return {"prompt": task.format(*operands), "completion": answer}


def random_example(rng):
    task = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if task == SUM:
        return example(task, rng.randrange(10, 50), rng.randrange(10, 50))
    return example(task, random_word(rng))


def random_word(rng):
    """Half of the words are any letters, half alternate vowels and consonants."""
    length = rng.randint(3, 6)
    letters = "abcdefghijklmnopqrstuvwxyz"
    if rng.random() < 0.5:
        return "".join(rng.choice(letters) for _ in range(length))
    kinds = ["".join(c for c in letters if c not in "aeiou"), "aeiou"]
    rng.shuffle(kinds)
    return "".join(rng.choice(kinds[i % 2]) for i in range(length))


def data():
    """(training, validation, asked) examples; a prompt of one list is in no other."""
    rng = random.Random(SEED)
    asked = [example(*task) for task in ASKED]
    taken = {e["prompt"] for e in asked}
    validation = []
    while len(validation) < NUM_VALIDATION:
        new = random_example(rng)
        if new["prompt"] not in taken:
            taken.add(new["prompt"])
            validation.append(new)
    train = []
    while len(train) < NUM_TRAIN:
        new = random_example(rng)
        if new["prompt"] not in taken:
            train.append(new)
    return train, validation, asked


SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def tokenizer():
    """One token for the beginning of each kind of task, one for every other character of ASCII."""
    pieces = [task.split("{")[0] for task in SHARES] + [" + "]
    characters = [chr(c) for c in range(32, 127)]
    vocab = {token: i for i, token in enumerate([*SPECIAL.values(), *pieces, *characters])}
    pattern = "|".join([*(p.replace("+", "\\+") for p in pieces), "[\\s\\S]"])
    added = [
        {"id": vocab[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for token in SPECIAL.values()
    ]
    bos, text = ({"SpecialToken": {"id": "<s>", "type_id": 0}}, lambda name: {"Sequence": {"id": name, "type_id": 0}})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text("A")],
            "pair": [bos, text("A"), text("B")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }


def model_files():
    """Name -> contents of the model folder's files."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "vocab_size": 128,
            "hidden_size": 320,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
            "head_dim": 32,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.05,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "tie_word_embeddings": True,
            "use_cache": True,
            **ids,
        },
        "generation_config.json": {"do_sample": False, "max_new_tokens": 8, **ids},
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 64,
            **SPECIAL,
        },
        "special_tokens_map.json": SPECIAL,
    }


def main():
    if len(sys.argv) > 2 or sys.argv[1:] and sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/quickstart-data")
    (folder / "model").mkdir(parents=True, exist_ok=True)
    for name, contents in model_files().items():
        (folder / "model" / name).write_text(json.dumps(contents, indent=1) + "\n")
    train, validation, asked = data()
    for name, examples in [("train.jsonl", train), ("validation.jsonl", validation)]:
        (folder / name).write_text("".join(json.dumps(e) + "\n" for e in examples))
    (folder / "prompts.json").write_text(json.dumps(asked, indent=1) + "\n")


if __name__ == "__main__":
    main()
