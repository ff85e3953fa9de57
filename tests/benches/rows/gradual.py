"""Whole gradual runs on the demo's model, its head, last quarter, last half and all of it in turn, beside DDP and
finetuning-scheduler.

DDP follows the run's samples and rates through the same stages. Of all three the time in steps counts, from a ready batch to
updated weights; of DDP also that of a stage change. finetuning-scheduler has less to do: it never sums gradients of what thaws
after the start. The bound is DDP's time times the share of its floating-point operations that are left when the frozen prefix
is computed once for each sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import PYTHON, ROOT, Broken, Measurement, Result, Row, Settings, Skipped, median, say
from benches.peers.gang import Gang
from benches.rows import divergence
from benches.workloads import MINILM_TESTED as WORKLOAD
from benches.workloads import Depth

OVER_BOUND = 1.1
ROWS = {
    "all": Row("gradual_run", "steps of a whole run in four stages, against DDP's; goal 1.1 of the bound", "s", ratio="ours/peer"),
    "half": Row("gradual_run.half_deepest", "the same without the deepest stage", "s", ratio="ours/peer"),
    "scheduler": Row("gradual_run.finetuning_scheduler", "the same run, against finetuning-scheduler 2.14.1's", "s", ratio="ours/peer"),
    "accuracy": Row("gradual_run.accuracy", "mean test accuracy, against DDP's; goal: equal but for chance", "share", ratio="ours/peer"),
}
RATES = {"head": 1e-3, "quarter": 3e-4, "half": 1e-4, "all": 1e-4}
DEADLINE = 900.0


@dataclass(frozen=True)
class Times:
    """Seconds in steps, by stage."""

    stages: list[float]
    test: float

    def until(self, stages: int) -> float:
        return sum(self.stages[:stages])


class Gradual:
    def __init__(self, settings: Settings):
        self.settings = settings
        self.epochs = 2 if settings.quick else 3
        self.ours: list[Times] = []
        self.ddp: list[Times] = []
        self.scheduler: list[Times] = []

    def spec(self, seed: int, **more) -> dict:
        def until(_: Depth) -> dict:
            return {"max_epochs": self.epochs}

        stages = workloads.stages(WORKLOAD.depths(), until, RATES)
        return WORKLOAD.spec(strategy="custom", stages=stages, prefix_cache={"mode": "required"}, seed=seed, **more)

    def run(self) -> Iterator[Result | Skipped]:
        problem = divergence.install() if self.settings.wants(ROWS["scheduler"]) else "not asked for"
        for seed in range(self.settings.seeds):
            with harness.scratch("gradual") as folder:
                say(f"gradual run, seed {seed}: Thaw")
                run = thaw.train(self.spec(seed, verification={"trace": True}), Path(folder) / "run", DEADLINE)
                by_stage = [sum(step.whole for step in run.stage(index)) for index in range(len(RATES))]
                self.ours.append(Times(by_stage, run.summary["test"]["accuracy"]))
                say(f"gradual run, seed {seed}: DDP")
                self.ddp.append(self.follow(run))
                # One is enough for a time that two others of ours are beside.
                if not problem and seed == 0:
                    say(f"gradual run, seed {seed}: finetuning-scheduler")
                    self.scheduler.append(self.schedule(run, Path(folder)))
        yield from self.results(problem)

    def follow(self, run: thaw.Run) -> Times:
        with Gang() as gang:
            arguments = {"folder": str(WORKLOAD.folder()), "run": str(run.folder), "eager": WORKLOAD.eager}
            found = gang.call("steps:whole_run", DEADLINE, **arguments)[0]
        return Times(found["stages"], found["test"])

    def schedule(self, run: thaw.Run, scratch: Path) -> Times:
        arguments = [WORKLOAD.folder(), run.folder, WORKLOAD.eager, self.epochs, scratch / "scheduler"]
        command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "benches.peers.scheduled"]
        paths = f"{ROOT / 'tests'}:{divergence.incumbents_folder()}"
        lines = harness.command([*command, *arguments], DEADLINE, {"PYTHONPATH": paths}, cwd=scratch).splitlines()
        found = [json.loads(line) for line in lines if line.startswith('{"stages"')]
        if not found or len(found[-1]["stages"]) != len(RATES):
            raise Broken(f"finetuning-scheduler printed no times of {len(RATES)} phases: {lines[-3:]}")
        return Times(found[-1]["stages"], found[-1]["test"])

    def share(self, stages: int) -> float:
        """Of the floating-point operations of DDP's first stages: what is left when each sample's prefix is computed once."""
        costs = [stage["cost"] for stage in thaw.plan(self.spec(0), WORKLOAD.folder())["stages"]]
        least = [int(cost["step_flops"]) for cost in costs]
        whole = [int(cost["uncached_step_flops"]) for cost in costs]
        return (self.epochs * sum(least[:stages]) + whole[0] - least[0]) / (self.epochs * sum(whole[:stages]))

    def results(self, problem: str | None) -> Iterator[Result | Skipped]:
        seeds = len(self.ours)
        for key, stages in (("all", 4), ("half", 3)):
            bound = self.share(stages)
            ours, peer = (median(times.until(stages) for times in side) for side in (self.ours, self.ddp))
            more = {"n_is": "seeds", "bound": bound, "over_bound": ours / peer / bound}
            yield ROWS[key].result(ours, peer, seeds, goal=f"<={OVER_BOUND * bound:.3g}", **more)
        if self.scheduler:
            test = self.scheduler[0].test
            yield ROWS["scheduler"].result(self.ours[0].until(4), self.scheduler[0].until(4), 1, n_is="seeds", accuracy=test)
        else:
            yield ROWS["scheduler"].skipped(problem or "it was not run")
        yield self.accuracy()

    def accuracy(self) -> Result:
        """Both sides draw their own dropout, so accuracies differ by chance: two standard errors of the difference are allowed."""
        ours, peer = (sum(times.test for times in side) / len(side) for side in (self.ours, self.ddp))
        samples = len(self.ours) * int(thaw.plan(self.spec(0), WORKLOAD.folder())["data"]["test_samples"])
        chance = 2 * (2 * peer * (1 - peer) / samples) ** 0.5
        return ROWS["accuracy"].result(ours, peer, len(self.ours), goal=f">={1 - chance / peer:.3g}", n_is="seeds", tested=samples)


MEASUREMENTS = (Measurement(tuple(ROWS.values()), lambda settings: Gradual(settings).run()),)
