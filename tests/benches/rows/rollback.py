"""Going back to the best weights and their optimizer state, as a stage does on entering it, on BERT-base.

The first stage makes the best weights; each later one takes a step that ruins them, and goes back on entering. Times are the
engine's own, from the trace; a save of what is left is under way then, as at every stage's end. The peer is one second; beside
it, what PyTorch needs for as much state from a file that was just written, as finetuning-scheduler does it, and from a copy in
memory, one process alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw
from benches.harness import Broken, Measurement, Result, Row, Settings, Skipped, median, say
from benches.peers.gang import Gang
from benches.workloads import BERT_BASE as WORKLOAD
from benches.workloads import CLASSES

ROW = Row("rollback", "back to the best weights and optimizer state from host memory, against one second", "s", "<1", "ours/peer")
# Updates, of a rate at which the random weights of this model learn.
BEST_AT, RUINOUS = 3, 0.03


def spec(settings: Settings) -> dict:
    groups = WORKLOAD.depths()[-1].groups
    stages = [{"name": "best", "thaw": groups, "until": {"max_steps": BEST_AT}, "learning_rate": 1e-6}]
    # The first of them goes back to where it stands.
    for index in range(1 + settings.rounds):
        stages.append({"name": f"ruin{index}", "thaw": groups, "until": {"max_steps": 1}, "learning_rate": RUINOUS})
    more = {"stop_when_no_gain": False, "verification": {"trace": True}}
    return WORKLOAD.spec(strategy="custom", stages=stages, **more)


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    with harness.scratch("rollback") as scratch:
        say("BERT-base, ruined and rolled back")
        run = thaw.train(spec(settings), Path(scratch) / "run", 900)
        ours = restores(run)
        # Room on the disk for what comes next.
        shutil.rmtree(run.folder / "blobs")
        say("the same state in PyTorch")
        with Gang(1) as gang:
            gang.call("saves:make", folder=str(WORKLOAD.folder()), eager=WORKLOAD.eager, classes=CLASSES)
            gang.call("saves:torch_save", folder=scratch)
            peer = [gang.call("saves:roll_back", folder=scratch)[0] for _ in range(settings.rounds)]
    more = {f"torch_{kind}": median(one[kind] for one in peer) for kind in ("file", "memory")}
    yield ROW.result(median(ours), 1.0, len(ours), n_is="restores", **more)


def restores(run: thaw.Run) -> list[float]:
    """Seconds of those that changed weights and optimizer state."""
    lines = [json.loads(line) for line in (run.folder / "trace/steps.jsonl").read_text().splitlines()]
    restored = [line for line in lines if line["restored"] is not None and line["stage"] >= 2]
    best = {line["restored"] for line in restored}
    if not restored or best != {BEST_AT}:
        raise Broken(f"stages went back to steps {sorted(best)}, not to the best stage's last")
    return [line["restore_seconds"] for line in restored]


MEASUREMENTS = (Measurement((ROW,), measure),)
