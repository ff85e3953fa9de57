"""What a row is, how a result is written, and where things lie."""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Exports, data and peers that are made once.
KEPT = ROOT / "target/bench"
PYTHON = ROOT / ".venv/bin/python"


class Broken(Exception):
    """A measurement that could not be made; missing a goal is none."""


@dataclass(frozen=True)
class Row:
    name: str
    # One line for the table.
    what: str
    # Of `ours` and `peer`.
    unit: str
    # `>=1.05` or `<=1.03`, about the ratio. Empty: the result brings its own, or there is none.
    goal: str = ""
    # What the ratio is: `peer/ours` (how many times faster) or `ours/peer` (a share).
    ratio: str = "peer/ours"

    def result(self, ours: float, peer: float, n: int, **more) -> Result:
        goal = more.pop("goal", self.goal)
        over = (peer, ours) if self.ratio == "peer/ours" else (ours, peer)
        ratio = more.pop("ratio", over[0] / over[1] if over[1] else float("inf" if over[0] else "nan"))
        return Result(self, ours, peer, ratio, goal, n, more)

    def skipped(self, reason: str) -> Skipped:
        return Skipped(self, " ".join(reason.split()))


@dataclass(frozen=True)
class Result:
    row: Row
    ours: float
    peer: float
    ratio: float
    goal: str
    # Rounds, or what the row says it counts.
    n: int
    # Printed behind the contract's fields.
    more: dict = field(default_factory=dict)

    def met(self) -> bool | None:
        found = re.fullmatch(r"(>=|<=|<|=)([-0-9.e]+)", self.goal)
        if not found:
            return None
        bound = float(found[2])
        return {">=": self.ratio >= bound, "<=": self.ratio <= bound, "<": self.ratio < bound, "=": self.ratio == bound}[found[1]]

    def line(self) -> str:
        numbers = f"ours={number(self.ours)} peer={number(self.peer)} ratio={number(self.ratio)} goal={self.goal or '-'} n={self.n}"
        more = "".join(f" {key}={number(value) if isinstance(value, float) else value}" for key, value in self.more.items())
        return f"bench {self.row.name} {numbers} unit={self.row.unit}{more}"


@dataclass(frozen=True)
class Skipped:
    row: Row
    reason: str

    def line(self) -> str:
        return f"bench {self.row.name} skipped: {self.reason}"


@dataclass(frozen=True)
class Settings:
    quick: bool
    # Names or beginnings of names; empty: all.
    only: tuple[str, ...]

    @property
    def rounds(self) -> int:
        return 2 if self.quick else 5

    @property
    def seeds(self) -> int:
        return 1 if self.quick else 3

    def wants(self, row: Row) -> bool:
        """`all_reduce` wants all_reduce_100mb.2, and not all_reduced_bytes.minilm."""
        return not self.only or any(row.name == name or row.name.startswith((f"{name}.", f"{name}_")) for name in self.only)


@dataclass(frozen=True)
class Measurement:
    """Several rows that one measurement gives."""

    rows: tuple[Row, ...]
    measure: Callable[[Settings], Iterator[Result | Skipped]]


def number(value: float) -> str:
    """Four significant digits, whole numbers whole."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"


def median(values) -> float:
    return statistics.median(list(values))


def say(text: str) -> None:
    """Progress, on stderr, with the time since the start."""
    print(f"bench: {time.monotonic() - STARTED:6.0f} s  {text}", file=sys.stderr, flush=True)


STARTED = time.monotonic()


def scratch(name: str) -> tempfile.TemporaryDirectory:
    """A folder that goes when it is closed, on the disk that keeps the exports."""
    KEPT.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=f"{name}-", dir=KEPT, ignore_cleanup_errors=True)


def command(arguments: list, deadline: float, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """stdout of a program that must end well in time."""
    name = " ".join(str(argument) for argument in arguments[:3])
    process = subprocess.Popen(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=deadline)
    except BaseException as error:
        end_group(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Broken(f"{name} had not ended after {deadline:.0f} s") from error
        raise
    if process.returncode != 0:
        raise Broken(f"{name} ended with {process.returncode}: {err.strip()[-2000:]}")
    return out


def end_group(process: subprocess.Popen) -> None:
    """Ends a process that leads its own session, with its children."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()


def header(settings: Settings) -> str:
    versions = command(
        [PYTHON, "-c", "import torch; print(torch.__version__)"],
        60,
    ).strip()
    rustc = command(["rustc", "--version"], 60).split()[1]
    commit = command(["git", "describe", "--always", "--dirty"], 60).strip() if shutil.which("git") else "unknown"
    quick = "; QUICK: fewer rounds, not for quoting" if settings.quick else ""
    return (
        f"{processor()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB; Linux {platform.release()}; "
        f"PyTorch {versions} on both sides; rustc {rustc}, dev profile; Thaw {commit}{quick}"
    )


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def table(results: list[Result | Skipped]) -> str:
    """The results as a Markdown table, which README carries."""
    lines = ["| Row | What | Thaw | Peer | Ratio | Goal | n |", "|---|---|---:|---:|---:|---:|---:|"]
    for one in results:
        if isinstance(one, Skipped):
            lines.append(f"| {one.row.name} | {one.row.what} | skipped | | | {one.row.goal} | |")
            continue
        mark = {True: "", False: " (missed)", None: ""}[one.met()]
        values = [f"{number(value)} {one.row.unit}" for value in (one.ours, one.peer)]
        goal = one.goal.replace(">=", "≥ ").replace("<=", "≤ ").replace("<", "< ")
        lines.append(f"| {one.row.name} | {one.row.what} | {values[0]} | {values[1]} | {one.ratio:.3g}{mark} | {goal} | {one.n} |")
    return "\n".join(lines)
