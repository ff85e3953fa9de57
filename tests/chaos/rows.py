"""The rows: a spec, a schedule for `thaw chaos`, and which of its lines belong to the row.

Runs are long enough for their schedules at about 50 steps a second of eight trainers on two cores; one that is shorter has a smaller n.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from chaos import elastic

ROOT = Path(__file__).resolve().parents[2]
THAW = ROOT / "target/debug/thaw"
TRAINERS = 8
# Updates while one fault is injected, recovered from and followed by a checkpoint.
STEPS_A_FAULT = 80
STAGES = 6


class Broken(Exception):
    """Something that must not happen; missing a goal is none."""


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    # Of `thaw chaos`: faults, their number, seconds from one to the next.
    faults: str = ""
    count: int = 0
    every: float = 0.0
    # Updates a second of schedule, where `every` is long.
    steps: int = 0
    more: tuple[str, ...] = ()
    # Lines that belong to the row.
    lines: tuple[str, ...] = ()
    spec: dict = field(default_factory=dict)
    # Of something else, measured after it.
    beside: Callable[[int], Iterator[str]] | None = None

    def measure(self, folder: Path, fixtures: Path, quick: bool) -> Iterator[str]:
        if not self.lines:
            assert self.beside
            yield from self.beside(0)
            return
        count = max(self.count // 10, 1) if quick and self.count else self.count
        path = folder / "spec.json"
        path.write_text(json.dumps(text_spec(fixtures, count * (self.steps or STEPS_A_FAULT)) | self.spec))
        command = [THAW, "chaos", path, "--workers", TRAINERS, "--count", count, "--every", self.every]
        if self.faults:
            command += ["--faults", self.faults]
        yield from self.chosen(stream([*command, *self.more]))
        if self.beside:
            yield from self.beside(count)

    def chosen(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            if line.split()[1].startswith(self.lines):
                yield line


def stream(command: list) -> Iterator[str]:
    """stdout, line by line, of a program that must end well."""
    with subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout
        yield from (line.strip() for line in process.stdout if line.strip())
    if process.returncode != 0:
        raise Broken(f"{Path(command[0]).name} ended with {process.returncode}")


def text_spec(fixtures: Path, steps: int) -> dict:
    """The small BERT of the tests, all of it trained, by up to eight trainers."""
    return {
        "name": "chaos",
        "backbone": {"graph": f"file://{fixtures}/text.pt2"},
        "data": {
            "train": {"path": f"file://{fixtures}/texts.csv", "format": "csv", "text": "text", "label": "label"},
            "split": {"train": 0.6, "eval": 0.2, "test": 0.2},
            "max_length": 16,
        },
        "strategy": "full_fine_tuning",
        "global_batch_size": 16,
        "workers": {"min": 1, "max": TRAINERS},
        "until": {"max_steps": max(steps, 100)},
        "eval_steps": 500,
        "checkpoint": {"save_steps": 10},
        "prefix_cache": {"mode": "off"},
        "seed": 11,
    }


def staged(steps: int) -> dict:
    """Stages of equal length over the same groups."""
    one = {"thaw": ["head", "/.*/"], "until": {"max_steps": steps // STAGES}}
    stages = [{"name": f"stage{index}"} | one for index in range(STAGES)]
    return {"strategy": "custom", "stages": stages, "stop_when_no_gain": False}


def outage(seconds: int) -> Row:
    steps = seconds * 75
    return Row(
        "outage",
        f"all coordinators and etcd stopped for {seconds} s",
        "outage",
        1,
        1.0,
        steps,
        ("--outage", str(seconds)),
        ("outage",),
        staged(steps),
    )


def scheduler(_count: int) -> Iterator[str]:
    """The scheduler alone, in virtual time; then the same through the driver and a real etcd. Each ends with 1 where a law was broken."""
    yield from stream(["cargo", "run", "-q", "-p", "thaw-core", "--example", "scheduler"])
    yield from stream(["cargo", "run", "-q", "-p", "thaw-coordinator", "--example", "scheduler_over_etcd"])


ALL_FAULTS = "kill-trainer,stop-trainer,kill-agent,stop-agent,kill-leader,hand-over"
ROWS = (
    Row(
        "kill",
        "SIGKILL of one of 8 trainers to the next step; beside it torchrun and Gloo",
        "kill-trainer",
        100,
        0.5,
        lines=("kill_trainer",),
        more=("--no-reference",),
        beside=lambda count: elastic.measure(max(count // 10, 2)),
    ),
    Row(
        "stop",
        "SIGSTOP of one of 8 trainers, or of its agent, until it is declared lost",
        "stop-trainer,stop-agent",
        20,
        0.5,
        300,
        lines=("stop_",),
        more=("--no-reference",),
    ),
    Row(
        "leader",
        "SIGKILL of the leading coordinator until the next serves",
        "kill-leader",
        30,
        0.5,
        300,
        lines=("kill_leader",),
    ),
    Row("hand_over", "SIGTERM to the leading coordinator until the next serves", "hand-over", 30, 0.5, 200, lines=("hand_over",)),
    outage(300),
    Row("faults", "weights and samples after 200 faults of all kinds", ALL_FAULTS, 200, 0.5, 300, lines=("weights", "ledger")),
    Row("goodput", "committed steps under one fault every 29 s", ALL_FAULTS, 31, 29.0, 1500, lines=("goodput", "weights")),
    Row(
        "requests",
        "submission, cancellation, and what a run costs etcd",
        more=("--requests",),
        lines=("create_run", "cancel", "etcd"),
        spec={"until": {"max_steps": 10_000_000}, "checkpoint": {}},
    ),
    Row("scheduler", "15,000 runs of 30 tenants in virtual time: the scheduler alone, then through etcd", beside=scheduler),
)
