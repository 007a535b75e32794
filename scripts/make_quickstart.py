#!/usr/bin/env python3
"""Writes the quickstart's model folder and instruction data. Standard library only; the same bytes every time.

    scripts/make_quickstart.py [FOLDER]        default: out/quickstart-data

FOLDER/model/            config.json and a tokenizer, no weights: the job starts from random ones
FOLDER/train.jsonl       {"prompt": "Reverse the word planet.", "completion": "tenalp"}, six kinds of task
FOLDER/validation.jsonl  the same kinds; no prompt of the training set
FOLDER/prompts.json      a few prompts that are in neither file, with the right answers

The answers follow rules, and the operands are random, so a model that answers new prompts has learnt the rules.
"""

import json
import random
import re
import sys
from pathlib import Path

NUM_TRAIN = 60_000
NUM_VALIDATION = 512
SEED = 3

# What quickstart.toml asks the trained model, so it must not be in the training data.
PROMPTS = [
    "What is 47 + 38?",
    "What is 19 + 64?",
    "What is 73 - 26?",
    "What is 90 - 51?",
    "Reverse the word planet.",
    "Reverse the word window.",
    "Write the word garden in capitals.",
    "Write the word rust in capitals.",
    "Sort the letters of orange.",
    "Sort the letters of shard.",
    "Count the letters of elephant.",
    "Count the letters of tensor.",
]

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def answer(prompt):
    """The right completion of a prompt, by the rules."""
    if match := re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", prompt):
        a, operator, b = match.groups()
        return str(int(a) + int(b) if operator == "+" else int(a) - int(b))
    task, word = re.fullmatch(r"(.*?) ([a-z]+)(?: in capitals)?\.", prompt).groups()
    return {
        "Reverse the word": lambda: word[::-1],
        "Write the word": lambda: word.upper(),
        "Sort the letters of": lambda: "".join(sorted(word)),
        "Count the letters of": lambda: str(len(word)),
    }[task]()


def random_word(rng):
    """A word of 3 to 8 letters, half of them pronounceable."""
    length = rng.randint(3, 8)
    if rng.random() < 0.5:
        return "".join(rng.choice(LETTERS) for _ in range(length))
    kinds = ("bcdfghjklmnprstvwz", "aeiou")
    first = rng.randrange(2)
    return "".join(rng.choice(kinds[(first + i) % 2]) for i in range(length))


def random_prompt(rng):
    task = rng.randrange(6)
    if task == 0:
        return f"What is {rng.randrange(100)} + {rng.randrange(100)}?"
    if task == 1:
        a, b = rng.randrange(100), rng.randrange(100)
        return f"What is {max(a, b)} - {min(a, b)}?"
    word = random_word(rng)
    return [
        f"Reverse the word {word}.",
        f"Write the word {word} in capitals.",
        f"Sort the letters of {word}.",
        f"Count the letters of {word}.",
    ][task - 2]
