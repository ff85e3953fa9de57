"""The sum of 100 MB over trainers on this host, beside Gloo's, in alternating rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator

from benches import harness
from benches.harness import ROOT, Measurement, Result, Row, Settings, Skipped, median, say
from benches.peers.gang import Gang

MEGABYTES, REPEATS = 100, 5
GOALS = {2: ">=3", 8: ">=2"}
ROWS = {
    ranks: Row(f"all_reduce_100mb.{ranks}", f"sum of 100 MB over {ranks} ranks of this host, against Gloo", "GB/s", goal, "ours/peer")
    for ranks, goal in GOALS.items()
}


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    harness.command(["cargo", "build", "-q", "--workspace", "--example", "all_reduce"], 1200)
    for ranks, row in ROWS.items():
        if settings.wants(row):
            yield measured(settings, ranks, row)


def measured(settings: Settings, ranks: int, row: Row) -> Result:
    ours, peer, shares_memory = [], [], None
    with Gang(ranks) as gang:
        for round_ in range(settings.rounds):
            say(f"all-reduce of {ranks} ranks, round {round_ + 1} of {settings.rounds}")
            program = ROOT / "target/debug/examples/all_reduce"
            found = json.loads(harness.command([program, ranks, MEGABYTES, REPEATS], 300))
            shares_memory = found["shared_memory"]
            ours.append(bandwidth(found["seconds"]))
            peer.append(bandwidth(gang.call("collective:all_reduce", megabytes=MEGABYTES, repeats=REPEATS)[0]))
    return row.result(median(ours), median(peer), settings.rounds, sums_per_round=REPEATS, shared_memory=str(shares_memory).lower())


def bandwidth(seconds: list[float]) -> float:
    """Of the vector, not of the wire."""
    return MEGABYTES / 1000 / median(seconds)


MEASUREMENTS = (Measurement(tuple(ROWS.values()), measure),)
