"""What `thaw plan` says of each stage, against what a run of the demo's model through four stages did. The worst stage
counts; all are printed as shares of what was planned.

A step takes a fixed time, calibrated on the head, whose operations are next to none, and its operations' at the rate calibrated
on the last half: that predicts the last quarter and the whole. Cached stages count from their second epoch on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import Measurement, Result, Row, Settings, Skipped, median, say
from benches.workloads import MINILM_DEMO as WORKLOAD
from benches.workloads import Depth


def row(name: str, what: str, unit: str, goal: str) -> Row:
    return Row(f"plan_vs_actual.{name}", f"{what}, from the plan, worst of the stages", unit, goal, "ours/peer")


ROWS = {
    "gradient_bytes": row("gradient_bytes", "bytes of gradient that a trainer gave to be summed in a step", "B", "<=0.01"),
    "optimizer_bytes": row("optimizer_bytes", "bytes of optimizer state in the stage's last checkpoint", "B", "<=0.01"),
    "checkpoint_bytes": row("checkpoint_bytes", "bytes of the stage's last checkpoint", "B", "<=0.01"),
    "step_time": row("step_time", "a step, after calibration on two other stages", "s", "<=0.15"),
    "memory_bytes": row("memory_bytes", "bytes of tensors a trainer held at most", "B", "<=0.1"),
}
# One save, in the deepest stage; the others' ends are saved in any case. Steps beside a save take longer.
SAVE_STEPS = 3 * 2 * WORKLOAD.steps_per_epoch + 5
HEAD, HALF = workloads.STAGES.index("head"), workloads.STAGES.index("half")


def spec(settings: Settings) -> dict:
    def until(depth: Depth) -> dict:
        deepest = {"max_steps": 6 if settings.quick else 1 + WORKLOAD.full_steps}
        return deepest if depth.name == "all" else {"max_epochs": 2}

    stages = workloads.stages(WORKLOAD.depths(), until)
    return WORKLOAD.spec(strategy="custom", stages=stages, prefix_cache={"mode": "required"}, checkpoint={"save_steps": SAVE_STEPS})


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    wanted = spec(settings)
    with harness.scratch("plan") as folder:
        say("the demo's model in four stages, to compare with its plan")
        run = thaw.train(wanted, Path(folder) / "run", 600)
        plan, found = json.loads((run.folder / "plan.json").read_text())["stages"], run.verified()
        seconds = [step_time(run, stage) for stage in range(len(plan))]
    for name, row in ROWS.items():
        if name == "step_time":
            yield compared(row, seconds, calibrated(seconds, [int(stage["cost"]["step_flops"]) for stage in plan]))
        else:
            pairs = [found[stage["name"]][name] for stage in plan]
            yield compared(row, [pair["actual"] for pair in pairs], [pair["planned"] for pair in pairs])


def calibrated(seconds: list[float], flops: list[int]) -> list[float]:
    """What the head and the last half took is given; the others follow."""
    per_flop = (seconds[HALF] - seconds[HEAD]) / (flops[HALF] - flops[HEAD])
    return [seconds[HEAD] + per_flop * (one - flops[HEAD]) for one in flops]


def step_time(run: thaw.Run, stage: int) -> float:
    deepest = stage == len(workloads.STAGES) - 1
    return median(step.whole for step in run.stage(stage, 1 if deepest else WORKLOAD.steps_per_epoch))


def compared(row: Row, actual: list[float], planned: list[float]) -> Result:
    apart = [abs(found / said - 1) for found, said in zip(actual, planned)]
    worst = max(range(len(apart)), key=apart.__getitem__)
    more = {name: f"{found / said:.4g}" for name, found, said in zip(workloads.STAGES, actual, planned)}
    return row.result(actual[worst], planned[worst], len(apart), ratio=apart[worst], n_is="stages", **more)


MEASUREMENTS = (Measurement(tuple(ROWS.values()), measure),)
