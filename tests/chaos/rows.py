"""The rows: a spec, a schedule for `thaw chaos`, and which of its lines belong to the row.

A run is as long as its schedule takes at the pace that the trainers have here and now; one that gets faster meanwhile may end early, with a smaller n.
"""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from chaos import control_plane, elastic

ROOT = Path(__file__).resolve().parents[2]
THAW = ROOT / "target/debug/thaw"
TRAINERS = 8
# Of training, while one fault is injected, recovered from and followed by a checkpoint.
SECONDS_A_FAULT = 1.6
# Updates by which the trainers' pace is known.
PACE_STEPS = 300
STAGES = 6


class Broken(Exception):
    """Something that must not happen; missing a goal is none."""


class Refused(Broken):
    """What was asked for cannot begin."""


@dataclass(frozen=True)
class Row:
    name: str
    what: str
    # Of `thaw chaos`: faults, their number, seconds from one to the next.
    faults: str = ""
    count: int = 0
    every: float = 0.0
    # Of training, for each of the faults.
    seconds: float = SECONDS_A_FAULT
    # Updates for each of the faults, where it is stages that count.
    steps: int = 0
    # An option that says how many seconds a fault lasts, and how many of training there are for each of them.
    lasts: tuple[str, int, float] | None = None
    more: tuple[str, ...] = ()
    # Lines that belong to the row.
    lines: tuple[str, ...] = ()
    # What is said beside the usual, for so many updates.
    spec: Callable[[int], dict] = lambda _steps: {}
    # Of something else, measured after it.
    beside: Callable[[int], Iterator[str]] | None = None
    # Printed where this machine does not allow it.
    needs: str = ""

    def measure(self, folder: Path, fixtures: Path, quick: bool) -> Iterator[str]:
        if not self.lines:
            assert self.beside
            yield from self.beside(0)
            return
        tenth = lambda number: max(number // 10, 1) if quick and number else number
        count = tenth(self.count)
        # Without faults nothing is trained for them, so that no pace is needed.
        steps = count and count * (self.steps or round(self.seconds * pace(fixtures)))
        every = tenth(self.every) if self.lasts else self.every
        command = [THAW, "chaos", folder / "spec.json", "--workers", TRAINERS, "--count", count, "--every", every]
        if self.lasts:
            option, seconds, share = self.lasts
            steps = round(tenth(seconds) * share * pace(fixtures))
            command += [option, tenth(seconds)]
        if self.faults:
            command += ["--faults", self.faults]
        (folder / "spec.json").write_text(json.dumps(text_spec(fixtures, steps) | self.spec(steps)))
        try:
            yield from self.chosen(stream([*command, *self.more]))
        except Refused:
            if not self.needs:
                raise
            print(f"chaos: {self.name}: skipped: {self.needs}", file=sys.stderr, flush=True)
        if self.beside:
            yield from self.beside(count)

    def chosen(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            if line.split()[1].startswith(self.lines):
                yield line


def stream(command: list) -> Iterator[str]:
    """stdout, line by line, of a program that must end well."""
    words = [str(word) for word in command]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout
            yield from (line.strip() for line in process.stdout if line.strip())
        except BaseException:
            # It ends what it has started.
            process.terminate()
            raise
    if process.returncode != 0:
        problem = Refused if process.returncode == 2 else Broken
        raise problem(f"{Path(command[0]).name} ended with {process.returncode}")


@functools.cache
def pace(fixtures: Path) -> float:
    """Updates a second of all trainers in the best quarter of a short run: what slows this machine down for a while must not cut a schedule short."""
    with tempfile.TemporaryDirectory(prefix="thaw-chaos-pace-") as folder:
        spec, data = Path(folder) / "spec.json", Path(folder) / "data"
        workers = {"workers": {"min": TRAINERS, "max": TRAINERS}}
        spec.write_text(json.dumps(text_spec(fixtures, PACE_STEPS) | workers))
        # Its progress is of no interest here.
        list(stream([THAW, "train", spec, "--workers", TRAINERS, "--data-dir", data]))
        metrics = next(data.glob("runs/*/metrics.jsonl")).read_text().splitlines()
    told = [line for line in map(json.loads, metrics) if line["kind"] == "progress"]
    ends = [told[quarter * (len(told) - 1) // 4] for quarter in range(5)]
    found = max(1000 * (end["step"] - begin["step"]) / (end["time_ms"] - begin["time_ms"]) for begin, end in itertools.pairwise(ends))
    print(f"chaos: {TRAINERS} trainers make up to {found:.1f} steps a second here", file=sys.stderr, flush=True)
    return found


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


def staged(steps: int, each: int = 0, thaws: tuple = (["head", "/.*/"],)) -> dict:
    """Stages of equal length, of about `each` updates or a few, which thaw more and more."""
    number = max(STAGES, steps // each if each else 0)
    thawed = lambda index: {"thaw": thaws[index * len(thaws) // number], "until": {"max_steps": steps // number}}
    stages = [{"name": f"stage{index}"} | thawed(index) for index in range(number)]
    return {"strategy": "custom", "stages": stages, "stop_when_no_gain": False}


def deeper(steps: int) -> dict:
    """Many short stages."""
    return staged(steps, 50, (["head"], ["head", "/2$/"], ["head", "/.*/"]))


def without_end(_steps: int) -> dict:
    return {"until": {"max_steps": 10_000_000}, "checkpoint": {}}


def scheduler(_count: int) -> Iterator[str]:
    """The scheduler alone, in virtual time; then the same through the driver and a real etcd. Each ends with 1 where a law was broken."""
    # Of the whole workspace, so that their dependencies are those of every other build.
    list(stream(["cargo", "build", "-q", "--workspace", "--example", "scheduler", "--example", "scheduler_over_etcd"]))
    yield from stream([ROOT / "target/debug/examples/scheduler"])
    yield from stream([ROOT / "target/debug/examples/scheduler_over_etcd"])


ALL_FAULTS = "kill-trainer,stop-trainer,kill-agent,stop-agent,kill-leader,hand-over"
ROWS = (
    Row(
        "kill",
        "SIGKILL of one of 8 trainers to the next step; beside it torchrun, and torchft, over Gloo",
        "kill-trainer",
        100,
        0.5,
        lines=("kill_trainer",),
        more=("--no-reference",),
        beside=lambda count: elastic.peers(max(count // 10, 2)),
    ),
    Row(
        "stop",
        "SIGSTOP of one of 8 trainers, or of its agent, until it is declared lost",
        "stop-trainer,stop-agent",
        20,
        0.5,
        6.0,
        lines=("stop_",),
        more=("--no-reference",),
    ),
    Row(
        "partition",
        "an agent and its trainer cut off from all others until they are declared lost",
        "partition",
        20,
        0.5,
        6.0,
        lines=("partition",),
        more=("--no-reference",),
        needs="no network namespaces can be made here",
    ),
    Row(
        "false_verdict",
        "trainers declared lost in 20 minutes with all cores busy, of 8 that are not",
        "load",
        1,
        1.0,
        lasts=("--load", 1200, 0.6),
        lines=("false_verdict",),
        more=("--no-reference",),
    ),
    Row(
        "leader",
        "SIGKILL of the leading coordinator until the next serves; what trainers and clients notice",
        "kill-leader",
        30,
        3.0,
        6.0,
        lines=("kill_leader", "ledger", "weights"),
    ),
    Row("hand_over", "SIGTERM to the leading coordinator until the next serves", "hand-over", 30, 0.5, 2.4, more=("--no-reference",), lines=("hand_over",)),
    Row(
        "outage",
        "all coordinators and etcd stopped for 300 s",
        "outage",
        1,
        # As long before and after it as its rate of steps is held against.
        100.0,
        lasts=("--outage", 300, 1.8),
        lines=("outage", "ledger", "weights"),
        spec=staged,
    ),
    Row(
        "stage_change",
        "from a stage to the next: pause and process ids; weights and samples after a kill during it",
        "kill-trainer",
        20,
        0.0,
        steps=125,
        lines=("stage_change", "ledger", "weights"),
        more=("--at", "stage-change"),
        spec=deeper,
    ),
    Row(
        "faults",
        "weights and samples after 200 faults of all kinds",
        ALL_FAULTS,
        200,
        0.5,
        3.5,
        lines=("weights", "ledger"),
        more=("--reference-workers", "2"),
    ),
    Row(
        "goodput",
        "committed steps under one fault every 29 s",
        ALL_FAULTS,
        32,
        29.0,
        26.0,
        lines=("goodput", "ledger"),
        more=("--no-reference",),
    ),
    Row(
        "requests",
        "submission, cancellation, and what a run costs etcd",
        more=("--requests",),
        lines=("create_run", "cancel", "etcd"),
        spec=without_end,
    ),
    Row(
        "watch",
        "events missed or repeated by 8 clients that go on by revision, across new leaders and compactions of etcd",
        "kill-leader,hand-over,kill-trainer",
        30,
        0.5,
        4.0,
        lines=("watch",),
        more=("--no-reference", "--watchers", "8"),
    ),
    Row("scheduler", "15,000 runs of 30 tenants in virtual time: the scheduler alone, then through etcd", beside=scheduler),
    control_plane.ControlPlane(),
)
