"""Writes synthetic data and models with random weights. Arguments are strings, from a command line."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

VOCABULARY = 1000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def images(folder: str, classes: str, count: str, size: str) -> None:
    """PNG files in one folder a class: blocks of colour that lean to the class's own, quick to decode."""
    import numpy
    from PIL import Image

    random_numbers = numpy.random.default_rng(0)
    palette = random_numbers.integers(0, 256, (int(classes), 3))
    for number in range(int(count)):
        label = number % int(classes)
        blocks = random_numbers.integers(0, 256, (7, 7, 3)) // 2 + palette[label] // 2
        path = Path(folder) / f"class{label}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blown_up = Image.fromarray(blocks.astype(numpy.uint8)).resize((int(size), int(size)), Image.Resampling.NEAREST)
        blown_up.save(path, compress_level=1)


def texts(path: str, classes: str, count: str, words: str) -> None:
    """Every text has `words` words of the vocabulary; a third of them belong to its class."""
    numbers = random.Random(0)
    own = VOCABULARY // int(classes)
    rows = []
    for number in range(int(count)):
        label = number % int(classes)
        word = lambda: numbers.randrange(label * own, (label + 1) * own) if numbers.random() < 1 / 3 else numbers.randrange(VOCABULARY)  # noqa: E731
        rows.append((" ".join(f"w{word()}" for _ in range(int(words))), f"class{label}"))
    write(path, rows)


def write(path: str | Path, rows: list[tuple[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["text", "label"])
        table.writerows(rows)


def bert(folder: str) -> None:
    """A Hugging Face folder: BERT-base's default configuration, random weights, a tokenizer of whole words."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import models, pre_tokenizers, processors

    torch.manual_seed(7)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    model.save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *(f"w{number}" for number in range(VOCABULARY))])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.enable_padding(pad_id=vocabulary["[PAD]"], pad_token="[PAD]")
    tokenizer.save(str(Path(folder) / "tokenizer.json"))


def part_of_sections(source: str, folder: str, train: str, test: str) -> None:
    """From the demo's descriptions: `train` to learn from, a quarter as many to evaluate on, `test` to test on."""
    with open(source, newline="", encoding="utf-8") as file:
        rows = [(row["description"], row["section"]) for row in csv.DictReader(file)]
    random.Random(0).shuffle(rows)
    needed = int(train)
    parts = {"train": needed, "eval": needed // 4, "test": int(test)}
    if len(rows) < sum(parts.values()):
        sys.exit(f"{source} has {len(rows)} descriptions; {sum(parts.values())} are needed")
    for name, count in parts.items():
        write(Path(folder) / f"{name}.csv", rows[:count])
        rows = rows[count:]


