"""What keeping a frozen prefix costs in the epoch that fills the cache, and what it saves the next run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import Broken, Measurement, Result, Row, Settings, Skipped, median, say
from benches.workloads import MINILM_DEMO, MINILM_LONG, VIT_SMALL_LONG, Workload

FIRST_EPOCH = {
    workload.name: Row(
        f"cache_first_epoch.{workload.name}", "an epoch that fills the cache, against one without", "s", "<=1.03", "ours/peer"
    )
    for workload in (MINILM_DEMO, MINILM_LONG, VIT_SMALL_LONG)
}
SHARING = Row(
    "cache_sharing", "prefixes that a second run computes, of those it needs", "samples", "<=0", "ours/peer"
)
DEADLINE = 600.0


def spec(workload: Workload, until: dict[str, dict], **more) -> dict:
    """A stage for each depth in `until`. The first keeps what all others need; a stage of one epoch keeps nothing for itself."""
    depths = [depth for depth in workload.depths() if depth.name in until]
    stages = workloads.stages(depths, lambda depth: until[depth.name])
    return workload.spec(strategy="custom", stages=stages, **more)


def first_epoch(workload: Workload, settings: Settings) -> Iterator[Result | Skipped]:
    seconds: dict[str, list[float]] = {"required": [], "off": []}
    until = {"head": {"max_epochs": 2}, "quarter": {"max_steps": 1}, "half": {"max_steps": 1}}
    runs = {
        "required": spec(workload, until, prefix_cache={"mode": "required"}),
        # The same stages: a trainer has the next one's memory ready while the first epoch runs.
        "off": spec(workload, until, prefix_cache={"mode": "off"}),
    }
    with harness.scratch(f"cache-{workload.name}") as folder:
        for round_ in range(settings.rounds):
            say(f"first epoch of {workload.name} with and without a cache, round {round_ + 1} of {settings.rounds}")
            for mode, chosen in runs.items():
                run = thaw.train(chosen, Path(folder) / mode, DEADLINE)
                epochs = (run.stage(0, until=workload.steps_per_epoch), run.stage(0, workload.steps_per_epoch))
                if mode == "required":
                    check(workload, *epochs)
                # All of them: what is computed at one step may be what a later one needs.
                seconds[mode].append(sum(step.whole for step in epochs[0]))
    ratios = [with_ / without for with_, without in zip(*seconds.values())]
    ours, peer = median(seconds["required"]), median(seconds["off"])
    more = {"rounds_between": f"{min(ratios):.3g}..{max(ratios):.3g}", "steps": workload.steps_per_epoch}
    yield FIRST_EPOCH[workload.name].result(ours, peer, settings.rounds, **more)


def check(workload: Workload, first: list[thaw.Step], second: list[thaw.Step]) -> None:
    """The first epoch must have filled the cache, from which the second lives."""
    computed = [sum(step.prefix_computed for step in epoch) for epoch in (first, second)]
    if computed[0] < workload.global_batch * workload.steps_per_epoch // 2 or computed[1]:
        raise Broken(f"{workload.name}: prefixes computed in the first and second epoch: {computed}")


def sharing(settings: Settings) -> Iterator[Result | Skipped]:
    with harness.scratch("sharing") as scratch:
        folder, kept = Path(scratch), Path(scratch) / "shared-cache"
        # Memory is given back when a run ends; the disk is for the next one.
        cached = {"mode": "required", "memory_mib": 0}
        until = {name: {"max_epochs": 2} for name in workloads.STAGES[:3]} | {"all": {"max_steps": 1}}
        try:
            say("a run that fills the cache")
            first = thaw.train(spec(MINILM_DEMO, until, prefix_cache=cached), folder / "first", DEADLINE, cache=kept)
            filled = sum(step.prefix_computed for step in first.steps)
            say("a run with another seed, rate and head")
            second = spec(MINILM_DEMO, until, prefix_cache=cached)
            second["backbone"] = {**second["backbone"], "head": {"hidden_sizes": [64]}}
            second |= {"seed": 4, "learning_rate": 3e-4}
            run = thaw.train(second, folder / "second", DEADLINE, cache=kept)
        finally:
            thaw.forget(kept)
    computed = sum(step.prefix_computed for step in run.steps)
    needed = computed + sum(step.prefix_cached for step in run.steps)
    if not filled or not needed:
        raise Broken(f"no prefix was run apart: the first run computed {filled}, the second needed {needed}")
    yield SHARING.result(computed, needed, needed, n_is="samples", first_run_computed=filled)


MEASUREMENTS = (
    *(
        Measurement((FIRST_EPOCH[workload.name],), lambda settings, workload=workload: first_epoch(workload, settings))
        for workload in (MINILM_DEMO, MINILM_LONG, VIT_SMALL_LONG)
    ),
    Measurement((SHARING,), sharing),
)
