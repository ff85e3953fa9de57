"""A forward of 300 small operators on a batch of one, in alternating rounds: what the interpreter costs beside PyTorch eager."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benches import harness, workloads
from benches.harness import ROOT, Broken, Measurement, Result, Row, Settings, Skipped, median, say
from benches.peers.gang import Gang

ROW = Row("interpreter_overhead", "a forward of 300 small operators on a batch of 1, against PyTorch eager", "s", ">=1")
FORWARDS = 2000


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    harness.command(["cargo", "build", "-q", "--workspace", "--example", "interpreter_overhead"], 1200)
    count = FORWARDS // 10 if settings.quick else FORWARDS
    ours, peer = [], []
    with harness.scratch("interpreter") as folder, Gang(1) as gang:
        model = Path(folder) / "small.pt2"
        workloads.make_with("interpreter", "export", model)
        for round_ in range(settings.rounds):
            say(f"interpreter: round {round_ + 1} of {settings.rounds}")
            ours.append(json.loads(harness.command([ROOT / "target/debug/examples/interpreter_overhead", model, count], 120)))
            peer.append(gang.call("interpreter:forwards", count=count)[0])
    operators = {one["operators"] for one in (*ours, *peer)}
    if len(operators) != 1:
        raise Broken(f"the nets differ: {sorted(operators)} operators")
    of = lambda rounds, key: median(one[key] for one in rounds)  # noqa: E731
    more = {"operators": operators.pop(), "by_least": of(peer, "least") / of(ours, "least")}
    yield ROW.result(of(ours, "median"), of(peer, "median"), settings.rounds, **more)


MEASUREMENTS = (Measurement((ROW,), measure),)
