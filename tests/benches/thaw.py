"""A run through the command line, and what it left in its folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from benches import harness
from benches.harness import ROOT, Broken

THAW = ROOT / "target/debug/thaw"
# Seconds between two looks at a trainer's memory.
LOOK = 0.2
# When it was looked at, and the largest resident set of a trainer since the last look.
Memory = list[tuple[float, int]]


@dataclass(frozen=True)
class Step:
    """One update as rank 0 saw it. Times in seconds."""

    stage: int
    # Counted from 0.
    stage_step: int
    # From the batch to the updated weights, the frozen prefix included.
    whole: float
    data_wait: float
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
    memory: Memory

    @property
    def peak_memory(self) -> int:
        """Largest resident set of a trainer, bytes."""
        return max((peak for _, peak in self.memory), default=0)

    def stage(self, index: int, first: int = 0, until: int | None = None) -> list[Step]:
        """Steps of a stage, numbered from its start."""
        last = float("inf") if until is None else until
        return [step for step in self.steps if step.stage == index and first <= step.stage_step < last]

    def stage_memory(self, index: int) -> int:
        """Largest resident set of a trainer while the stage's steps ran, bytes."""
        steps = self.stage(index)
        began, ended = steps[0].heard - steps[0].whole, steps[-1].heard + LOOK
        return max((peak for looked, peak in self.memory if began <= looked <= ended), default=0)

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
    environment = {**os.environ, "THAW_PREFIX_CACHE_MEMORY": str(memory), "THAW_PREFIX_CACHE_DISK": str(cache / "disk")}
    command = [THAW, "train", path, "--workers", str(workers), "--data-dir", data, "-o", "json"]
    process = subprocess.Popen(
        [str(argument) for argument in command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    watch = MemoryWatch(process.pid)
    try:
        out, err = process.communicate(timeout=deadline)
    except BaseException as error:
        harness.end_group(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Broken(f"thaw train of {spec['name']} had not ended after {deadline:.0f} s") from error
        raise
    finally:
        memory = watch.stop()
        if cache == folder / "prefix-cache":
            forget(cache)
    if process.returncode != 0:
        raise Broken(f"thaw train of {spec['name']} ended with {process.returncode}: {err.strip()[-1500:]}")
    (run,) = (data / "runs").iterdir()
    return read(run, json.loads(out), memory)


def memory_folder(cache: Path) -> Path:
    """The memory tier that belongs to a cache folder."""
    return Path("/dev/shm") / f"thaw-bench-{cache.parent.name}-{cache.name}"


def forget(cache: Path) -> None:
    shutil.rmtree(memory_folder(cache), ignore_errors=True)
    shutil.rmtree(cache, ignore_errors=True)


def read(run: Path, summary: dict, memory: Memory) -> Run:
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
    return Run(run, summary, steps, evaluations, memory)


def plan(spec: dict, folder: Path) -> dict:
    """What `thaw plan` says about a spec."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plan-spec.json"
    path.write_text(json.dumps(spec))
    return json.loads(harness.command([THAW, "plan", path, "-o", "json"], 120))


class MemoryWatch:
    """The largest resident sets of the trainers below a process."""

    def __init__(self, parent: int):
        self.parent, self.found, self.ended = parent, [], threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        trainers: set[int] = set()
        looked = 0.0
        while not self.ended.wait(LOOK):
            if time.monotonic() - looked > 2:
                trainers, looked = trainers_of(self.parent), time.monotonic()
            if trainers:
                self.found.append((time.time(), max(map(high_water, trainers))))

    def stop(self) -> Memory:
        self.ended.set()
        self.thread.join()
        return self.found


def trainers_of(session: int) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            belongs = os.getsid(int(entry.name)) == session
            if belongs and b"\0trainer\0" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def high_water(process: int) -> int:
    """The largest resident set since this was last asked."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                Path(f"/proc/{process}/clear_refs").write_text("5")
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
