"""A run through the command line, and what it left in its folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from benches import harness
from benches.harness import ROOT

THAW = ROOT / "target/debug/thaw"


@dataclass(frozen=True)
class Step:
    """One update as rank 0 saw it. Times in seconds."""

    stage: int
    # Counted from 0.
    stage_step: int
    # From the batch to the updated weights, the frozen prefix included.
    whole: float
    data_wait: float
    straggler_wait: float
    exposed_all_reduce: float
    optimizer: float
    prefix: float
    prefix_computed: int
    prefix_cached: int
    all_reduced_bytes: int
    # Training stood still for a checkpoint, within `whole` or just before the step.
    checkpoint: float
    # When the coordinator heard of it.
    heard: float


@dataclass(frozen=True)
class Evaluation:
    stage: int
    stage_step: int
    # Of the whole run.
    step: int
    loss: float
    accuracy: float
    heard: float


@dataclass(frozen=True)
class Run:
    folder: Path
    summary: dict
    steps: list[Step]
    evaluations: list[Evaluation]

    def stage(self, index: int, first: int = 0, until: int | None = None) -> list[Step]:
        """Steps of a stage, numbered from its start."""
        last = float("inf") if until is None else until
        return [step for step in self.steps if step.stage == index and first <= step.stage_step < last]

    def verified(self) -> dict:
        """What `thaw verify` finds: the plan beside what was measured, by stage."""
        command = [THAW, "verify", self.folder, "-o", "json"]
        return {stage["name"]: stage for stage in json.loads(harness.command(command, 120))["stages"]}

    def manifests(self) -> list[Manifest]:
        """Of the checkpoints that are kept, in order."""
        return [Manifest(path, json.loads(path.read_text())) for path in sorted((self.folder / "manifests").glob("*.json"))]


@dataclass(frozen=True)
class Manifest:
    path: Path
    document: dict

    @property
    def step(self) -> int:
        return self.document["position"]["step"]

    def written(self) -> float:
        """When it was whole."""
        return self.path.stat().st_mtime

    def blobs(self, part: str = "groups") -> dict[str, int]:
        """Bytes by name: of the state itself, or of `best_groups`."""
        both = [group[kind] for group in self.document[part] or [] for kind in ("weights", "optimizer")]
        return {blob["blake3"]: blob["bytes"] for blob in both if blob}


def train(spec: dict, folder: Path, deadline: float, workers: int = 2, cache: Path | None = None) -> Run:
    """`thaw train` to the end in a data folder below `folder`. `cache` is where prefixes are kept: by default, nobody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    data = folder / "data"
    shutil.rmtree(data, ignore_errors=True)
    cache = cache or folder / "prefix-cache"
    memory = memory_folder(cache)
    environment = {"THAW_PREFIX_CACHE_MEMORY": str(memory), "THAW_PREFIX_CACHE_DISK": str(cache / "disk")}
    command = [THAW, "train", path, "--workers", workers, "--data-dir", data, "-o", "json"]
    try:
        out = harness.command(command, deadline, environment, folder)
    finally:
        if cache == folder / "prefix-cache":
            forget(cache)
    (run,) = (data / "runs").iterdir()
    return read(run, json.loads(out))


def memory_folder(cache: Path) -> Path:
    """The memory tier that belongs to a cache folder."""
    return Path("/dev/shm") / f"thaw-bench-{cache.parent.name}-{cache.name}"


def forget(cache: Path) -> None:
    shutil.rmtree(memory_folder(cache), ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)


def read(run: Path, summary: dict) -> Run:
    steps, evaluations = [], []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        one = json.loads(line)
        heard = one["time_ms"] / 1000
        if one["kind"] == "evaluation":
            evaluations.append(Evaluation(one["stage"], one["stage_step"], one["step"], one["loss"], one["accuracy"], heard))
            continue
        times = one["step_time"]
        steps.append(
            Step(
                one["stage"],
                one["stage_step"] - 1,
                times["whole"],
                times["data_wait"],
                times["straggler_wait"],
                times["exposed_all_reduce"],
                times["optimizer"],
                times["prefix"],
                one["prefix_computed"],
                one["prefix_cached"],
                one["all_reduced_bytes"],
                times["checkpoint"],
                heard,
            )
        )
    return Run(run, summary, steps, evaluations)


def plan(spec: dict, folder: Path) -> dict:
    """What `thaw plan` says about a spec."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan-spec.json"
    path.write_text(json.dumps(spec))
    return json.loads(harness.command([THAW, "plan", path, "-o", "json"], 120))
