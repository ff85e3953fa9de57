"""What users run today: an eager module in DistributedDataParallel over Gloo, on the samples, weights and rates of a Thaw run.

Frozen parameters need no gradient, modules without trainable ones are in eval mode, the optimizer holds trainable ones only, and
the wrapper is rebuilt at each stage. Loading is left out: a step starts from its tensors.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from benches.harness import ROOT
from benches.peers import models
from benches.peers.gang import State

sys.path[:0] = [str(ROOT / "tests/reference"), str(ROOT / "deploy/export")]

import batches  # noqa: E402
from thaw_trace import Run  # noqa: E402


class Trainer:
    def __init__(self, rank: int, folder: Path, run: Run, eager: str, channels_last: bool):
        self.rank, self.run = rank, run
        self.net = getattr(models, eager)(len(run.classes), folder)
        self.channels_last = channels_last
        exported = torch.export.load(run.initial).state_dict
        self.names = {name: self.net.name_of(name) for name in exported}
        self.net.load_state_dict({self.names[name]: value for name, value in exported.items()}, strict=False)
        held = set(self.names.values())
        absent = [name for name, _ in self.net.named_parameters() if name not in held]
        if absent:
            raise RuntimeError(f"the exported graph has no weights for {absent[:3]}")
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.data = batches.open_data(run)
        self.ready: dict[tuple[int, ...], tuple] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def batch(self, records: list[int]):
        """Tensors of a micro-batch, kept."""
        key = tuple(records)
        if key not in self.ready:
            inputs, labels = self.data.batch(records)
            if self.channels_last:
                inputs = tuple(value.to(memory_format=torch.channels_last) for value in inputs)
            self.ready[key] = inputs, labels
        return self.ready[key]

    def enter(self, stage: int) -> None:
        """Thaws what the run's stage trains."""
        groups = self.run.trainable[stage]
        trainable = {self.names[parameter.name] for group in groups for parameter in self.run.groups[group].parameters}
        for name, parameter in self.net.named_parameters():
            parameter.requires_grad_(name in trainable)
            parameter.grad = None
        self.net.train()
        for module in self.net.modules():
            own = list(module.parameters())
            if own and not any(parameter.requires_grad for parameter in own):
                module.eval()
        self.wrapped = DistributedDataParallel(self.net)
        kept = self.optimizer.state if self.optimizer else {}
        chosen = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        decaying = [
            {"params": [value for value in chosen if value.dim() > 1], "weight_decay": 0.01},
            {"params": [value for value in chosen if value.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([group for group in decaying if group["params"]], lr=1e-4, fused=True)
        for parameter in chosen:
            if parameter in kept:
                self.optimizer.state[parameter] = kept[parameter]

    def step(self, step) -> tuple[float, float, float]:
        """Seconds of the step and of its update, and this rank's loss."""
        shard = step.shards[self.rank]
        inputs, labels = self.batch(shard.records)
        for group in self.optimizer.param_groups:
            group["lr"] = step.rates[-1]
        dist.barrier()
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.wrapped(*inputs), labels)
        loss.backward()
        updated = time.perf_counter()
        self.optimizer.step()
        found = loss.item()
        ended = time.perf_counter()
        return ended - started, ended - updated, found

    @torch.no_grad()
    def evaluate(self, data, records: list[int]) -> tuple[float, float]:
        """Mean loss and accuracy; every rank computes all of it."""
        training = {module: module.training for module in self.net.modules()}
        self.net.eval()
        losses, right = 0.0, 0
        for start in range(0, len(records), 64):
            inputs, labels = data.batch(records[start : start + 64])
            logits = self.net(*inputs)
            losses += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(-1) == labels).sum())
        for module, mode in training.items():
            module.training = mode
        return losses / len(records), right / len(records)

    def snapshot(self) -> dict:
        return copy.deepcopy(self.net.state_dict())


def load(state: State, name: str, folder: str, run: str, eager: str, channels_last: bool = False) -> None:
    """Makes a trainer of the weights that a run with a trace began with, and keeps it as `name`."""
    trainer = Trainer(state.rank, Path(folder), Run(Path(run)), eager, channels_last)
    setattr(state, name, trainer)


def some_steps(state: State, name: str, stage: int, count: int) -> list[tuple[float, float, float]]:
    """The first `count` steps of a stage, which is entered anew."""
    trainer: Trainer = getattr(state, name)
    steps = [step for step in trainer.run.steps() if step.stage == stage][:count]
    for step in steps:
        trainer.batch(step.shards[trainer.rank].records)
    trainer.enter(stage)
    return [trainer.step(step) for step in steps]


def whole_run(state: State, folder: str, run: str, eager: str, channels_last: bool = False) -> dict:
    """Follows a run step by step; seconds by stage, in steps and in entering it. Evaluates at each epoch's end, tests the weights with
    the least evaluation loss; neither is timed."""
    trainer = Trainer(state.rank, Path(folder), Run(Path(run)), eager, channels_last)
    steps = trainer.run.steps()
    per_epoch = json.loads((trainer.run.folder / "plan.json").read_text())["steps_per_epoch"]
    data = {part: open_part(trainer.run, part) for part in ("eval", "test") if trainer.run.spec["data"].get(part)}
    for step in steps:
        trainer.batch(step.shards[trainer.rank].records)
    evaluations, seconds = [], [0.0] * len(trainer.run.trainable)
    stage, stage_steps = None, 0
    best, best_loss = None, float("inf")
    for step in steps:
        if step.stage != stage:
            started = time.perf_counter()
            trainer.enter(step.stage)
            seconds[step.stage] += time.perf_counter() - started
            stage, stage_steps = step.stage, 0
        seconds[stage] += trainer.step(step)[0]
        stage_steps += 1
        if stage_steps % per_epoch == 0:
            loss, accuracy = trainer.evaluate(*data["eval"])
            evaluations.append({"step": step.step + 1, "seconds": sum(seconds), "loss": loss, "accuracy": accuracy})
            if loss < best_loss:
                best, best_loss = trainer.snapshot(), loss
    test = None
    if "test" in data:
        trainer.net.load_state_dict(best)
        test = trainer.evaluate(*data["test"])[1]
    return {"stages": seconds, "evaluations": evaluations, "test": test}


def open_part(run: Run, part: str):
    """A reader of the part's own source, and all its records."""
    source = run.spec["data"][part]
    if source["format"] == "image_folder":
        data = ImagesOfFolder(run, source)
        return data, list(range(len(data.paths)))
    data = batches.Texts(run, source)
    return data, list(range(len(data.texts)))


class ImagesOfFolder(batches.Images):
    """The training reader takes its files from the index; this one lists its folder."""

    def __init__(self, run: Run, source: dict):
        super().__init__(run, run.spec["data"]["train"])
        root = batches.local(source["path"])
        self.paths = sorted(path for path in root.rglob("*") if path.is_file())
        self.labels = [run.classes.index(path.relative_to(root).parts[0]) for path in self.paths]


def first_loss(state: State, name: str) -> dict[str, float]:
    """The loss of the run's first step as Thaw recorded it, and here."""
    trainer: Trainer = getattr(state, name)
    step = trainer.run.steps()[0]
    trainer.enter(step.stage)
    samples = sum(len(shard.records) for shard in step.shards)
    total = torch.tensor(trainer.step(step)[2] * len(step.shards[trainer.rank].records) / samples)
    dist.all_reduce(total)
    return {"ours": step.loss, "peer": total.item()}
