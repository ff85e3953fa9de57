"""What checkpoints cost training, how many bytes they write, and how long a full one takes beside PyTorch's.

Cost: the demo's model, fully thawed, in short runs that save every few steps and in runs that never do, in turn; from an
epoch's first step to its last, by when the coordinator heard of them. That gives the cost of a save. How often to save is
the engine's own choice in a longer run with default settings, from which the stalls come too.

A full save: BERT-base and its moments after a stage of one step, before one of its head alone: from the end of the evaluation
to the manifest on the disk. That includes the digest over all of it, which every stage end makes, and the head's stage begins
beside it. PyTorch saves as much state from as many processes, when nothing trains, and syncs its files too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import Broken, Measurement, Result, Row, Settings, Skipped, median, say
from benches.peers.gang import Gang
from benches.workloads import BERT_BASE, CLASSES, MINILM_DEMO

ROWS = {
    "stall": Row("checkpoint_stall", "a step's wait for checkpoints at p99, in median steps", "s", "<0.01", "ours/peer"),
    "overhead": Row("checkpoint_overhead", "time that checkpoints took, of all time in steps", "s", "<=0.03", "ours/peer"),
    "head_bytes": Row("checkpoint_head_bytes", "written at the head stage, of a full save", "B", "<0.01", "ours/peer"),
}
SAVES = {
    "torch_save": Row("checkpoint_save.torch_save", "a full save of BERT-base and its moments, against torch.save", "s", ">=1"),
    "distributed_save": Row("checkpoint_save.distributed", "the same, against torch.distributed.checkpoint", "s", ">=1"),
}
DEADLINE = 900.0
HEAD_STEPS, SAVE_STEPS = 4, 4
NEVER = 1_000_000
# A default run's updates; long enough for a few saves, which are 10 s apart at least.
LONG, LONG_QUICK = 140, 50


def spec(steps: int, **checkpoint) -> dict:
    """A few steps at the head, then `steps` with everything thawed."""
    head, *_, deepest = MINILM_DEMO.depths()
    stages = workloads.stages([head, deepest], lambda depth: {"max_steps": HEAD_STEPS if depth is head else steps})
    return MINILM_DEMO.spec(strategy="custom", stages=stages, prefix_cache={"mode": "off"}, checkpoint=checkpoint)


class Cost:
    def __init__(self, settings: Settings):
        self.settings = settings
        # Seconds between an epoch's first step and its last.
        self.saving: list[float] = []
        self.never: list[float] = []

    def run(self) -> Iterator[Result | Skipped]:
        with harness.scratch("checkpoint") as scratch:
            folder = Path(scratch)
            saves, bytes_ = [], (0, 0)
            epoch = MINILM_DEMO.steps_per_epoch
            for round_ in range(self.settings.rounds):
                say(f"steps with and without checkpoints, round {round_ + 1} of {self.settings.rounds}")
                often = thaw.train(spec(epoch, save_steps=SAVE_STEPS, save_total_limit=100), folder / "often", DEADLINE)
                self.saving.append(between(often.stage(1, until=epoch)))
                saves.append(saves_within(often))
                bytes_ = written_bytes(often)
                never = thaw.train(spec(epoch, save_steps=NEVER), folder / "never", DEADLINE)
                self.never.append(between(never.stage(1, until=epoch)))
            say("a run that chooses by itself when to save")
            steps = LONG_QUICK if self.settings.quick else LONG
            long = thaw.train(spec(steps, save_total_limit=100), folder / "long", DEADLINE)
            yield self.stall(long)
            yield self.overhead(long, saves)
            yield ROWS["head_bytes"].result(*bytes_, 1, n_is="saves")

    def stall(self, run: thaw.Run) -> Result:
        steps = run.stage(1, 1)
        stalls = sorted(step.checkpoint for step in steps)
        step = median(step.whole for step in steps)
        at_99 = stalls[min(len(stalls) - 1, int(0.99 * len(stalls)))]
        more = {"saves": len(within(run)), "longest": stalls[-1] / step}
        return ROWS["stall"].result(at_99, step, len(steps), n_is="steps", **more)

    def overhead(self, run: thaw.Run, saves: list[int]) -> Result:
        """A save's cost over the time between the engine's own saves; over the run's, where it made only one."""
        each = median((saving - never) / count for saving, never, count in zip(self.saving, self.never, saves))
        steps = run.stage(1)
        trained = steps[-1].heard - steps[0].heard
        made = max(len(within(run)), 1)
        more = {"saves": made, "a_save": each, "saving_every_4_steps": f"{median(self.saving) / median(self.never) - 1:.3g}"}
        return ROWS["overhead"].result(max(each, 0.0) * made, trained, self.settings.rounds, **more)


def between(steps: list[thaw.Step]) -> float:
    return steps[-1].heard - steps[0].heard


def within(run: thaw.Run) -> list[thaw.Manifest]:
    """Of the second stage, without its end."""
    positions = ((one, one.document["position"]) for one in run.manifests())
    return [one for one, position in positions if position["stage"] == 1 and position["stage_step"] > 0]


def saves_within(run: thaw.Run) -> int:
    """Saves that began before the epoch's last step."""
    last = run.stage(1, until=MINILM_DEMO.steps_per_epoch)[-1]
    found = [one for one in within(run) if one.document["position"]["stage_step"] <= last.stage_step]
    if not found:
        raise Broken(f"no checkpoint was made in {last.stage_step} steps, one being due every {SAVE_STEPS}")
    return len(found)


def written_bytes(run: thaw.Run) -> tuple[int, int]:
    """Of the head stage's save, and of the first with everything thawed: blobs that were not there before, and the manifest."""
    before, found = set(), {}
    for manifest in run.manifests():
        blobs = manifest.blobs() | manifest.blobs("best_groups")
        new = {name: size for name, size in blobs.items() if name not in before}
        before |= set(new)
        found[manifest.step] = sum(new.values()) + manifest.path.stat().st_size
    full = min(step for step in found if step > HEAD_STEPS)
    return found[HEAD_STEPS], found[full]


def full_saves(settings: Settings) -> Iterator[Result | Skipped]:
    ours: list[float] = []
    peer: dict[str, list[float]] = {name: [] for name, row in SAVES.items() if settings.wants(row)}
    head, *_, deepest = BERT_BASE.depths()
    stages = workloads.stages([deepest, head], lambda _: {"max_steps": 1})
    more = {"prefix_cache": {"mode": "off"}, "learning_rate": 1e-6, "stop_when_no_gain": False}
    spec = BERT_BASE.spec(strategy="custom", stages=stages, **more)
    with harness.scratch("saves") as folder, Gang() as gang:
        theirs = gang.call("saves:make", folder=str(BERT_BASE.folder()), eager=BERT_BASE.eager, classes=CLASSES)[0]
        for round_ in range(settings.rounds):
            say(f"full saves, round {round_ + 1} of {settings.rounds}")
            run = thaw.train(spec, Path(folder) / "run", DEADLINE)
            (saved,) = (one for one in run.manifests() if one.document["position"]["stage_step"] == 0 and one.step == 1)
            ours.append(saved.written() - [one for one in run.evaluations if one.stage == 0][-1].heard)
            bytes_ = sum((saved.blobs() | saved.blobs("best_groups")).values())
            if not 0.98 < bytes_ / theirs < 1.02:
                raise Broken(f"the states differ: {bytes_} bytes here, {theirs} in PyTorch")
            for name in peer:
                peer[name].append(gang.call(f"saves:{name}", folder=folder)[0])
    for name, seconds in peer.items():
        yield SAVES[name].result(median(ours), median(seconds), settings.rounds, bytes=bytes_)


MEASUREMENTS = (
    Measurement(tuple(ROWS.values()), lambda settings: Cost(settings).run()),
    Measurement(tuple(SAVES.values()), full_saves),
)
