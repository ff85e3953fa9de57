"""The models that are trained, exported once, and their data; both below target/bench, made anew when what makes them changes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benches import harness, thaw
from benches.harness import KEPT, PYTHON, ROOT

CLASSES = 10
STAGES = ("head", "quarter", "half", "all")


@dataclass(frozen=True)
class Workload:
    name: str
    global_batch: int
    # Of one epoch in the step measurements.
    steps_per_epoch: int
    # Measured in a round at full depth, after one that warms up.
    full_steps: int
    # Writes what `spec` names into a folder: the archive and the data.
    make: Callable[[Workload, Path], None]
    # The `data` part of the spec, paths relative to the folder.
    data: dict
    # Builds the eager twin: a function of benches.peers.models.
    eager: str
    convolutions: bool = False

    def folder(self) -> Path:
        """Where its archive and data are; made on first use."""
        shape = f"{self.global_batch} {self.steps_per_epoch} {self.data} {CLASSES}".encode()
        folder = KEPT / f"{self.name}-{hashlib.sha256(shape + sources()).hexdigest()[:12]}"
        if not (folder / "complete").exists():
            harness.say(f"making the model and data of {self.name}")
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.make(self, folder)
            (folder / "complete").touch()
        return folder

    def spec(self, **more) -> dict:
        folder = self.folder()
        data = json.loads(json.dumps(self.data))
        for part in ("train", "eval", "test"):
            if part in data:
                data[part]["path"] = f"file://{folder / data[part]['path']}"
        return {
            "name": f"bench-{self.name.replace('_', '-')}",
            "backbone": {"graph": f"file://{folder / 'model.pt2'}"},
            "data": data,
            "global_batch_size": self.global_batch,
            "workers": {"min": 2, "max": 2, "threads_per_trainer": 1},
            "logging_steps": 1,
            "learning_rate": 1e-4,
            "learning_rate_spread": 1,
            "lr_scheduler": {"type": "constant"},
            "checkpoint": {"save_steps": 1000000},
            "seed": 3,
            **more,
        }

    def depths(self) -> list[Depth]:
        """The stages, head first; each with its plan's groups."""
        plan = thaw.plan(self.spec(strategy="full_fine_tuning", until={"max_steps": 1}), self.folder())
        groups = [(group["name"], int(group.get("forward_flops", 0)), bool(group.get("embedding"))) for group in plan["groups"]]
        total = sum(flops for _, flops, _ in groups)
        above = [sum(flops for _, flops, _ in groups[index:]) / total for index in range(len(groups))]
        nearest = lambda share: min(range(len(groups) - 1), key=lambda index: abs(above[index] - share))  # noqa: E731
        lowest = {"head": len(groups) - 1, "quarter": nearest(0.25), "half": nearest(0.5), "all": 0}
        return [Depth(name, [group for group, _, _ in groups[lowest[name] :]], above[lowest[name]]) for name in STAGES]


@dataclass(frozen=True)
class Depth:
    name: str
    groups: list[str]
    # Share of the forward's operations at and above the lowest group.
    share: float

    def bound(self) -> float:
        """How many times faster than a step that recomputes the prefix: a backward is two forwards, and the prefix costs nothing."""
        return (1 + 2 * self.share) / (3 * self.share) if self.share else float("inf")


def stages(depths: list[Depth], until: Callable[[Depth], dict], rates: dict[str, float] | None = None) -> list[dict]:
    """The stages of a custom spec, each going on from what the last one ended with; `rates` by depth, else the run's."""
    found = [{"name": one.name, "thaw": one.groups, "until": until(one), "on_enter": "keep"} for one in depths]
    for stage in found if rates else []:
        stage["learning_rate"] = rates[stage["name"]]
    return found


def sources() -> bytes:
    """What models and data are made by."""
    files = [*sorted((ROOT / "deploy/export/thaw_export").glob("*.py")), ROOT / "tests/benches/peers/data.py"]
    return b"".join(file.read_bytes() for file in files)


def export(source: str, folder: Path, *more: str) -> None:
    harness.command(
        [ROOT / ".bin/thaw-export", source, "-o", folder / "model.pt2", *more],
        600,
        {"PYTHONPATH": str(ROOT / "tests")},
    )


def make(function: str, *arguments: object) -> None:
    """Runs a function of benches.peers.data, so that this process needs no PyTorch."""
    make_with("data", function, *arguments)


def make_with(module: str, function: str, *arguments: object) -> None:
    """The same, of another module of benches.peers."""
    code = f"import sys; from benches.peers import {module}; {module}.{function}(*sys.argv[1:])"
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "deploy/export")])}
    harness.command([PYTHON, "-c", code, *map(str, arguments)], 600, environment)


def make_resnet50(workload: Workload, folder: Path) -> None:
    export("torchvision:resnet50", folder, "--num-classes", str(CLASSES))
    make_images(workload, folder)


def make_vit_small(workload: Workload, folder: Path) -> None:
    export("timm:vit_small_patch16_224", folder, "--num-classes", str(CLASSES))
    make_images(workload, folder)


def make_images(workload: Workload, folder: Path) -> None:
    make("images", folder / "train", CLASSES, workload.global_batch * workload.steps_per_epoch, 224)
    make("images", folder / "eval", CLASSES, CLASSES, 224)


def make_bert_base(workload: Workload, folder: Path) -> None:
    make("bert", folder / "bert")
    export(str(folder / "bert"), folder, "--task", "embedding")
    make("texts", folder / "train.csv", CLASSES, workload.global_batch * workload.steps_per_epoch, 126)
    make("texts", folder / "eval.csv", CLASSES, CLASSES, 126)


def make_minilm(workload: Workload, folder: Path, test: int | None = None) -> None:
    """The demo's model and descriptions; of each section as many as the epochs here need."""
    harness.command([ROOT / "deploy/demo/prepare.sh", folder], 600)
    (folder / "minilm.pt2").rename(folder / "model.pt2")
    train = workload.global_batch * workload.steps_per_epoch
    make("part_of_sections", folder / "packages.csv", folder, train, test or train // 4)


def make_minilm_tested(workload: Workload, folder: Path) -> None:
    make_minilm(workload, folder, 1000)


IMAGES = {
    "train": {"path": "train", "format": "image_folder"},
    "eval": {"path": "eval", "format": "image_folder"},
    "image": {"size": 224},
}
TEXTS = {
    "train": {"path": "train.csv", "format": "csv", "text": "text", "label": "label"},
    "eval": {"path": "eval.csv", "format": "csv", "text": "text", "label": "label"},
    "max_length": 128,
}
MINILM = {**TEXTS, "max_length": 32}
TESTED = {**MINILM, "test": {"path": "test.csv", "format": "csv", "text": "text", "label": "label"}}

# 32 images: below 16 a shard, batch norm that trains keeps its statistics, which is another computation.
RESNET50 = Workload("resnet50", 32, 2, 2, make_resnet50, IMAGES, "resnet50", convolutions=True)
VIT_SMALL = Workload("vit_small", 16, 3, 3, make_vit_small, IMAGES, "vit_small")
BERT_BASE = Workload("bert_base", 8, 3, 3, make_bert_base, TEXTS, "bert_base")
MINILM_DEMO = Workload("minilm", 32, 20, 10, make_minilm, MINILM, "minilm")
# Accuracies are compared on its test part.
MINILM_TESTED = Workload("minilm_tested", 32, 20, 10, make_minilm_tested, TESTED, "minilm")
# Where an epoch ends, a frozen prefix fills its last chunks up with repeated samples: epochs here are about as long as the demo's, and of
# several chunks.
MINILM_LONG = Workload("minilm_long", 32, 80, 10, make_minilm, MINILM, "minilm")
VIT_SMALL_LONG = Workload("vit_small", 16, 8, 1, make_vit_small, IMAGES, "vit_small")
ALL = (RESNET50, VIT_SMALL, BERT_BASE, MINILM_DEMO)
