"""What a Thaw run with `verification: {trace: true}` leaves in its folder, and nothing else: the one place that knows the format.

    spec.yaml            the checked spec, snake_case, defaults filled in
    plan.json            the plan, snake_case: stages with their trainable groups
    trace/initial.pt2    the archive as the run starts from it, new head included
    trace/layout.json    {groups: [{name, elements, decay_elements, parameters: [{name, shape, offset, elements}], buffers}]}
    trace/steps.jsonl    {step, stage, stage_step, restored, restore_seconds, rates, loss, digest,
                          shards: [{shard, samples, records, seed}]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: list[int]
    # Elements from the start of the group's flat buffer.
    offset: int
    elements: int


@dataclass(frozen=True)
class Group:
    name: str
    # Of the flat buffer, gaps included; the first `decay_elements` take weight decay.
    elements: int
    decay_elements: int
    parameters: list[Parameter]
    buffers: list[str]


@dataclass(frozen=True)
class Shard:
    # Numbers of records in the training source, from 0.
    records: list[int]
    seed: int


@dataclass(frozen=True)
class Step:
    # Updates before this one.
    step: int
    stage: int
    # The update that the stage's weights and optimizer state were put back to; None where nothing was put back.
    restored: int | None
    shards: list[Shard]
    # Per trainable group, ascending.
    rates: list[float]
    loss: float


class Run:
    def __init__(self, folder: Path):
        self.folder = folder
        self.initial = folder / "trace" / "initial.pt2"
        self.spec = yaml.safe_load((folder / "spec.yaml").read_text())
        plan = json.loads((folder / "plan.json").read_text())
        # Indices of groups per stage, ascending. A zero default may be left out.
        self.trainable = [[int(group) for group in stage["trainable_groups"]] for stage in plan["stages"]]
        self.classes: list[str] = plan["classes"]
        self.global_batch_size = int(plan["global_batch_size"])
        layout = json.loads((folder / "trace" / "layout.json").read_text())
        self.groups = [
            Group(
                group["name"],
                group["elements"],
                group["decay_elements"],
                [Parameter(**parameter) for parameter in group["parameters"]],
                group["buffers"],
            )
            for group in layout["groups"]
        ]

    def steps(self) -> list[Step]:
        """In order. A step that was done again after a death is taken once, its last record."""
        found = {}
        for line in (self.folder / "trace" / "steps.jsonl").read_text().splitlines():
            raw = json.loads(line)
            shards = [Shard(shard["records"], shard["seed"]) for shard in raw["shards"]]
            found[raw["step"]] = Step(raw["step"], raw["stage"], raw.get("restored"), shards, raw["rates"], raw["loss"])
        return [found[step] for step in sorted(found)]
