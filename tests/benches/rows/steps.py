"""Steps at four depths, in alternating rounds: a short Thaw run of all stages, then DDP's first steps of each stage.

Of both sides the time from a ready batch to updated weights counts. Each stage's first step of a process is left out, since it
makes primitives and buffers; cached stages count from their second epoch on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import Broken, Measurement, Result, Row, Settings, Skipped, median, say
from benches.peers.gang import Gang
from benches.workloads import Depth, Workload

DEADLINE = 900.0
# Losses of the first step agree to this, both sides having dropout off below the head.
SAME_LOSS = 1e-3


def rows_of(workload: Workload) -> dict[str, Row]:
    name = workload.name
    found = [
        Row(f"full_step.{name}", "a step with everything thawed, against DDP", "s", ">=1.05"),
        Row(f"head_cached.{name}", "a step of the cached head stage, against DDP's head stage", "s", ">=50"),
        Row(f"last_quarter.{name}", "a cached step of the last quarter, against DDP's; goal 0.9 of the plan's bound", "s"),
        Row(f"last_half.{name}", "a cached step of the last half, against DDP's; goal 0.9 of the plan's bound", "s"),
        Row(f"exposed_all_reduce.{name}", "wait for sums of gradients, every trainer being done with its own, as a share of a full step", "s", "<=0.05", "ours/peer"),
        Row(f"all_reduced_bytes.{name}", "bytes summed in a step over 4 a trainable weight, worst of the stages", "B", "<=1.02", "ours/peer"),
        Row(f"optimizer_update.{name}", "update with everything thawed, against fused AdamW", "s", ">=1"),
        Row(f"stage_change_pause.{name}", "between two stages' steps, evaluations taken off, in median full steps", "s", "<=1", "ours/peer"),
        Row(f"plan_memory.{name}", "how far the bytes of tensors a trainer held at most are from the plan's, worst of the stages", "B", "<=0.1"),
    ]
    if workload.convolutions:
        found.append(Row(f"full_step.{name}_default_format", "the same against DDP in its default memory format", "s", ">=1.5"))
    if name in ("resnet50", "bert_base"):
        found.append(Row(f"bf16.{name}", "a full step in bf16, against our fp32", "s", ">=1.3"))
    return {row.name.rpartition(f".{name}")[0] + row.name.rpartition(f".{name}")[2]: row for row in found}


class Steps:
    """One workload's rounds."""

    def __init__(self, workload: Workload, settings: Settings):
        self.workload, self.settings = workload, settings
        self.rows = rows_of(workload)
        self.depths = workload.depths()
        self.steps = 1 if settings.quick else workload.full_steps
        # Per round: medians by name.
        self.ours: dict[str, list[float]] = {}
        self.peer: dict[str, list[float]] = {}
        self.runs: list[thaw.Run] = []
        # Of the last run, whose folder is gone by then.
        self.verified: dict[str, dict] = {}

    def spec(self, **more) -> dict:
        def until(depth: Depth) -> dict:
            cached = {"head": 4, "quarter": 2, "half": 2}
            return {"max_steps": 1 + self.steps} if depth.name == "all" else {"max_epochs": cached[depth.name]}

        cache = {"mode": "required"}
        return self.workload.spec(strategy="custom", stages=workloads.stages(self.depths, until), prefix_cache=cache, **more)

    def run(self) -> Iterator[Result | Skipped]:
        name = self.workload.name
        with harness.scratch(name) as folder, Gang() as gang:
            say(f"{name}: a run with a trace, for samples, weights and losses")
            first = thaw.train(self.spec(verification={"trace": True}), Path(folder) / "trace", DEADLINE)
            common = {"folder": str(self.workload.folder()), "run": str(first.folder), "eager": self.workload.eager}
            gang.call("steps:load", name="same", channels_last=self.workload.convolutions, **common)
            if self.wants("full_step_default_format"):
                gang.call("steps:load", name="default", **common)
            self.check(gang)
            for round_ in range(self.settings.rounds):
                say(f"{name}: round {round_ + 1} of {self.settings.rounds}")
                self.round(gang, Path(folder) / "run")
        yield from self.results()

    def wants(self, key: str) -> bool:
        return key in self.rows and self.settings.wants(self.rows[key])

    def check(self, gang: Gang) -> None:
        """Both sides must compute the same thing."""
        first = gang.call("steps:first_loss", name="same")[0]
        apart = abs(first["ours"] - first["peer"]) / abs(first["ours"])
        if not apart <= SAME_LOSS:
            raise Broken(f"{self.workload.name}: the first loss is {first['ours']} in Thaw, {first['peer']} in PyTorch")

    def round(self, gang: Gang, folder: Path) -> None:
        run = thaw.train(self.spec(), folder, DEADLINE)
        self.runs.append(run)
        self.verified = run.verified()
        per_epoch = self.workload.steps_per_epoch
        for index, depth in enumerate(self.depths):
            measured = run.stage(index, 1 if depth.name == "all" else per_epoch)
            add(self.ours, depth.name, [step.whole for step in measured])
        full = run.stage(3, 1)
        add(self.ours, "exposed", [step.exposed_all_reduce for step in full])
        add(self.ours, "straggler", [step.straggler_wait for step in full])
        add(self.ours, "optimizer", [step.optimizer for step in full])
        for index, depth in enumerate(self.depths):
            found = gang.call("steps:some_steps", name="same", stage=index, count=1 + self.steps)[0]
            add(self.peer, depth.name, [step[0] for step in found[1:]])
            if depth.name == "all":
                add(self.peer, "optimizer", [step[1] for step in found[1:]])
        if self.wants("full_step_default_format"):
            found = gang.call("steps:some_steps", name="default", stage=3, count=1 + self.steps)[0]
            add(self.peer, "default", [step[0] for step in found[1:]])
        if self.wants("bf16"):
            add(self.ours, "bf16", self.full_steps_in_bf16(folder))

    def full_steps_in_bf16(self, folder: Path) -> list[float]:
        spec = self.workload.spec(strategy="full_fine_tuning", until={"max_steps": 1 + self.steps}, precision="bf16")
        return [step.whole for step in thaw.train(spec, folder, DEADLINE).stage(0, 1)]

    def results(self) -> Iterator[Result | Skipped]:
        ours = {name: median(values) for name, values in self.ours.items()}
        peer = {name: median(values) for name, values in self.peer.items()}
        full_spread = spread(self.peer["all"], self.ours["all"])
        yield self.result("full_step", ours["all"], peer["all"], steps=self.steps, rounds_between=full_spread)
        if "default" in peer:
            yield self.result("full_step_default_format", ours["all"], peer["default"])
        yield self.result("head_cached", ours["head"], peer["head"], over_ddp_full=peer["all"] / ours["head"])
        for key, depth in (("last_quarter", self.depths[1]), ("last_half", self.depths[2])):
            bound = depth.bound()
            found = peer[depth.name] / ours[depth.name]
            more = {"bound": bound, "share_of_bound": found / bound, "over_ddp_full": peer["all"] / ours[depth.name]}
            yield self.result(key, ours[depth.name], peer[depth.name], goal=f">={0.9 * bound:.3g}", **more)
        yield self.result("exposed_all_reduce", ours["exposed"], ours["all"], straggler_wait=ours["straggler"])
        yield self.bytes()
        yield self.result("optimizer_update", ours["optimizer"], peer["optimizer"])
        yield self.result("stage_change_pause", median(map(self.pause, self.runs)), ours["all"])
        yield self.memory()
        if "bf16" in ours:
            yield self.result("bf16", ours["bf16"], ours["all"])

    def result(self, key: str, ours: float, peer: float, **more) -> Result:
        return self.rows[key].result(ours, peer, self.settings.rounds, **more)

    def planned(self) -> list[dict]:
        return thaw.plan(self.spec(), self.workload.folder())["stages"]

    def bytes(self) -> Result:
        """The stage whose bytes are furthest above what its plan says."""
        pairs = [(self.runs[-1].stage(index)[-1].all_reduced_bytes, stage) for index, stage in enumerate(self.planned())]
        pairs = [(found, 4 * int(stage["trainable_parameters"])) for found, stage in pairs]
        found, expected = max(pairs, key=lambda pair: pair[0] / pair[1])
        return self.result("all_reduced_bytes", found, expected)

    def memory(self) -> Result:
        pairs = [stage["memory_bytes"] for stage in self.verified.values()]
        worst = max(pairs, key=lambda pair: abs(pair["actual"] / pair["planned"] - 1))
        more = {"stages": "/".join(f"{pair['actual'] / pair['planned']:.3g}" for pair in pairs)}
        apart = abs(worst["actual"] / worst["planned"] - 1)
        return self.result("plan_memory", worst["actual"], worst["planned"], ratio=apart, **more)

    def pause(self, run: thaw.Run) -> float:
        """Median over the changes: from a stage's last evaluation to the first step, less the evaluation on entering, which takes
        what the stage's next one takes."""
        found = []
        for index in range(1, len(self.depths)):
            left = max(one.heard for one in run.evaluations if one.stage == index - 1)
            first = run.stage(index)[0]
            evaluated = next(one for one in run.evaluations if one.stage == index and one.stage_step > 0)
            before = run.stage(index, until=evaluated.stage_step)[-1]
            began = first.heard - first.whole - first.data_wait
            found.append(began - left - (evaluated.heard - before.heard))
        return max(median(found), 0.0)


def add(rounds: dict[str, list[float]], name: str, seconds: list[float]) -> None:
    rounds.setdefault(name, []).append(median(seconds))


def spread(peer: list[float], ours: list[float]) -> str:
    """Least and largest ratio of a round."""
    ratios = [theirs / mine for theirs, mine in zip(peer, ours)]
    return f"{min(ratios):.3g}..{max(ratios):.3g}"


def measurement(workload: Workload) -> Measurement:
    return Measurement(tuple(rows_of(workload).values()), lambda settings: Steps(workload, settings).run())


MEASUREMENTS = tuple(measurement(workload) for workload in workloads.ALL)
