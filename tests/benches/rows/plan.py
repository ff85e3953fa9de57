"""What `thaw plan` says of each stage, against what a run of the demo's model through four stages did. The worst stage
counts; all are printed as shares of what was planned.

The plan counts what a step does; `thaw verify` takes the rates of the machine from the run's first two stages, here the head and the
last quarter, and says what the last half and the whole should take: only these two count. Cached stages count from their second epoch
on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import Measurement, Result, Row, Settings, Skipped, say
from benches.workloads import MINILM_DEMO as WORKLOAD
from benches.workloads import Depth


def row(name: str, what: str, unit: str, goal: str) -> Row:
    return Row(f"plan_vs_actual.{name}", f"{what}, from the plan, worst of the stages", unit, goal, "ours/peer")


ROWS = {
    "gradient_bytes": row("gradient_bytes", "bytes of gradient that a trainer gave to be summed in a step", "B", "<=0.01"),
    "optimizer_bytes": row("optimizer_bytes", "bytes of optimizer state in the stage's last checkpoint", "B", "<=0.01"),
    "checkpoint_bytes": row("checkpoint_bytes", "bytes of the stage's last checkpoint", "B", "<=0.01"),
    "step_time": row("step_time", "a step, after calibration on the first two stages, of the others", "s", "<=0.15"),
    "memory_bytes": row("memory_bytes", "bytes of tensors a trainer held at most", "B", "<=0.1"),
}
# One save, in the deepest stage; the others' ends are saved in any case. Steps beside a save take longer.
SAVE_STEPS = 3 * 2 * WORKLOAD.steps_per_epoch + 5


def spec(settings: Settings) -> dict:
    def until(depth: Depth) -> dict:
        return {"max_steps": 6} if settings.quick and depth.name == "all" else {"max_epochs": 2}

    stages = workloads.stages(WORKLOAD.depths(), until)
    return WORKLOAD.spec(strategy="custom", stages=stages, prefix_cache={"mode": "required"}, checkpoint={"save_steps": SAVE_STEPS})


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    wanted = spec(settings)
    with harness.scratch("plan") as folder:
        say("the demo's model in four stages, to compare with its plan")
        run = thaw.train(wanted, Path(folder) / "run", 600)
        plan, found = json.loads((run.folder / "plan.json").read_text())["stages"], run.verified()
    stages = {stage["name"]: found[stage["name"]] for stage in plan}
    for name, row in ROWS.items():
        if name == "step_time":
            yield compared(row, {stage: one["step_seconds"] for stage, one in stages.items() if not one["calibrates"]})
        else:
            yield compared(row, {stage: one[name] for stage, one in stages.items()})


def compared(row: Row, pairs: dict[str, dict]) -> Result:
    ratios = {stage: pair["actual"] / pair["planned"] for stage, pair in pairs.items()}
    worst = max(ratios, key=lambda stage: abs(ratios[stage] - 1))
    more = {stage: f"{ratio:.4g}" for stage, ratio in ratios.items()}
    apart = abs(ratios[worst] - 1)
    return row.result(pairs[worst]["actual"], pairs[worst]["planned"], len(pairs), ratio=apart, n_is="stages", **more)


MEASUREMENTS = (Measurement(tuple(ROWS.values()), measure),)
