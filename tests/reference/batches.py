"""Micro-batches straight from the run's data files, by libraries other than Thaw's own."""

from __future__ import annotations

import csv
import json
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy
import torch
from PIL import Image
from tokenizers import Tokenizer

from thaw_trace import Run


def local(url: str) -> Path:
    return Path(unquote(urlparse(url).path))


def open_data(run: Run):
    """An object whose `batch(records)` returns (inputs, labels)."""
    source = run.spec["data"]["train"]
    return Images(run, source) if source["format"] == "image_folder" else Texts(run, source)


class Texts:
    """`input_ids` and `attention_mask`, [samples, tokens], padded to the longest of the micro-batch."""

    def __init__(self, run: Run, source: dict):
        path = local(source["path"])
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file)) if source["format"] == "csv" else [json.loads(line) for line in file if line.strip()]
        self.texts = [row[source["text"]] for row in rows]
        self.labels = [run.classes.index(str(row[source["label"]])) for row in rows]
        self.tokenizer = Tokenizer.from_str(tokenizer_json(run))
        padding = self.tokenizer.padding
        self.pad = padding["pad_id"] if padding else self.tokenizer.token_to_id("[PAD]")
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(run.spec["data"]["max_length"])

    def batch(self, records: list[int]):
        rows = [self.tokenizer.encode(self.texts[record]).ids for record in records]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return (ids, mask), torch.tensor([self.labels[record] for record in records])


def tokenizer_json(run: Run) -> str:
    graph = local(run.spec["backbone"]["graph"])
    with zipfile.ZipFile(graph) as archive:
        for name in archive.namelist():
            if name.endswith("/extra/tokenizer.json"):
                return archive.read(name).decode()
    return graph.with_name("tokenizer.json").read_text()


class Images:
    """[samples, channels, size, size]; files must have that size already, so that no resampling is compared."""

    def __init__(self, run: Run, source: dict):
        root = local(source["path"])
        index = json.loads((run.folder / "data" / "index.json").read_text())
        entries = index["sources"][0]["files"]
        self.paths = [root / (entry[0] if isinstance(entry, list) else entry["path"]) for entry in entries]
        self.labels = [run.classes.index(path.relative_to(root).parts[0]) for path in self.paths]
        image = run.spec["data"]["image"]
        self.size = image["size"]
        self.mean, self.std = numpy.float32(image["mean"]), numpy.float32(image["std"])

    def batch(self, records: list[int]):
        planes = numpy.stack([self.planes(self.paths[record]) for record in records])
        return (torch.from_numpy(planes),), torch.tensor([self.labels[record] for record in records])

    def planes(self, path: Path) -> numpy.ndarray:
        image = Image.open(path).convert("L" if len(self.mean) == 1 else "RGB")
        if image.size != (self.size, self.size):
            raise SystemExit(f"{path} is {image.size}, not {self.size} pixels square: the reference does not resize")
        pixels = numpy.asarray(image, dtype=numpy.float32).reshape(self.size, self.size, -1)
        return ((pixels / numpy.float32(255) - self.mean) / self.std).transpose(2, 0, 1).copy()
