"""Worker-seconds to 99 % of full fine-tuning's accuracy on a synthetic transfer suite.

A task holds out eight of 24 combinations of shape and texture. A small net of five groups, trained by Thaw on the other sixteen,
is fine-tuned on 300 samples of the eight: in full by DDP, and thawed gradually by Thaw. Both evaluate on 800 samples at each
epoch's end. Time in steps counts, times two workers; loading and evaluations do not.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import KEPT, ROOT, Broken, Measurement, Result, Row, Settings, Skipped, say
from benches.peers.gang import Gang

ROWS = {
    "time": Row("transfer_suite", "worker-seconds to 99 % of full fine-tuning's accuracy, against DDP", "s", ">=4"),
    "accuracy": Row("transfer_suite.accuracy", "accuracy reached, against DDP's full fine-tuning", "share", ">=1", "ours/peer"),
    "whole": Row("transfer_suite.whole_run", "worker-seconds of the whole run, against DDP's", "s"),
}
WORKERS = 2
TASKS, SOURCE, TRAIN, TEST, EPOCHS = 3, 4000, 300, 800, 24
DEADLINE = 600.0
SHARE = 0.99


@dataclass(frozen=True)
class Curve:
    """(worker-seconds, accuracy) at each epoch's end."""

    points: list[tuple[float, float]]

    def reaches(self, accuracy: float) -> float | None:
        return next((seconds for seconds, found in self.points if found >= accuracy), None)

    def whole(self) -> float:
        return self.points[-1][0]

    def best(self) -> float:
        return max(accuracy for _, accuracy in self.points)


def folder() -> Path:
    """Data and pretrained nets of all tasks, made once."""
    sources = [Path(__file__), ROOT / "tests/benches/peers/transfer.py"]
    key = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    return KEPT / f"transfer-{key}"


def task_folder(task: int) -> Path:
    made = folder() / f"task{task}"
    if not (made / "complete").exists():
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        make(task, made)
        (made / "complete").touch()
    return made


def make(task: int, made: Path) -> None:
    say(f"transfer task {task}: data, and a net trained on its source classes")
    for kind, name, count, seed in (("source", "source", SOURCE, 1), ("target", "train", TRAIN, 2), ("target", "test", TEST, 3)):
        workloads.make_with("transfer", "write", made / name, kind, task, count, seed)
    workloads.export("benches.peers.transfer:exported", made, "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5")
    source = {"path": f"file://{made / 'source'}", "format": "image_folder"}
    spec = {
        "name": "pretraining",
        "backbone": {"graph": f"file://{made / 'model.pt2'}"},
        "data": {"train": source, "split": {"train": 0.9, "eval": 0.1}, "image": IMAGE},
        "strategy": "from_scratch",
        "global_batch_size": 64,
        "learning_rate": 3e-3,
        "until": {"max_epochs": 14},
        "workers": {"min": WORKERS, "max": WORKERS},
        "seed": task,
    }
    run = thaw.train(spec, made / "pretraining", DEADLINE, WORKERS)
    accuracy = run.summary["stages"][-1]["eval"]["accuracy"]
    if accuracy < 0.7:
        raise Broken(f"the net of transfer task {task} learnt its source classes to {accuracy:.2f} only")
    (model,) = (run.folder / "model").glob("model.pt2")
    shutil.copyfile(model, made / "backbone.pt2")
    shutil.rmtree(made / "pretraining")


IMAGE = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}


def spec(made: Path, seed: int, **more) -> dict:
    part = lambda name: {"path": f"file://{made / name}", "format": "image_folder"}  # noqa: E731
    return {
        "name": "transfer",
        "backbone": {"graph": f"file://{made / 'backbone.pt2'}"},
        "data": {"train": part("train"), "eval": part("test"), "image": IMAGE},
        "global_batch_size": 32,
        "workers": {"min": WORKERS, "max": WORKERS},
        "logging_steps": 1,
        "checkpoint": {"save_steps": 1000000},
        "seed": seed,
        **more,
    }


FULL = {"strategy": "full_fine_tuning", "until": {"max_epochs": EPOCHS}, "learning_rate": 2e-3}
GRADUAL = {
    "strategy": "gradual_unfreezing",
    "learning_rate": 1e-2,
    "until": {"max_epochs": EPOCHS, "early_stopping": {"metric": "eval_loss", "patience": 2}},
    "prefix_cache": {"mode": "required"},
}


def curve(run: thaw.Run) -> Curve:
    points = []
    for one in run.evaluations:
        if one.stage_step:
            spent = sum(step.whole for step in run.steps if (step.stage, step.stage_step) < (one.stage, one.stage_step))
            points.append((WORKERS * spent, one.accuracy))
    return Curve(points)


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    ours, peer, own_full = [], [], []
    for task in range(1 if settings.quick else TASKS):
        made = task_folder(task)
        with harness.scratch("transfer") as scratch:
            say(f"transfer task {task}: full fine-tuning in Thaw, with a trace that DDP follows")
            full = thaw.train(spec(made, task, **FULL, verification={"trace": True}), Path(scratch) / "full", DEADLINE)
            own_full.append(curve(full))
            say(f"transfer task {task}: full fine-tuning in DDP")
            with Gang(WORKERS) as gang:
                arguments = {"folder": str(made), "run": str(full.folder), "eager": "grouped_cnn", "channels_last": True}
                found = gang.call("steps:whole_run", DEADLINE, **arguments)[0]
            peer.append(Curve([(WORKERS * one["seconds"], one["accuracy"]) for one in found["evaluations"]]))
            say(f"transfer task {task}: gradual unfreezing in Thaw")
            ours.append(curve(thaw.train(spec(made, task, **GRADUAL), Path(scratch) / "gradual", DEADLINE)))
    yield from results(ours, peer, own_full)


def results(ours: list[Curve], peer: list[Curve], own_full: list[Curve]) -> Iterator[Result | Skipped]:
    """Per task against that task's full fine-tuning; sums of seconds over the tasks."""
    targets = [SHARE * curve.best() for curve in peer]
    reached = [curve.reaches(target) for curve, target in zip(ours, targets)]
    needed = [curve.reaches(target) for curve, target in zip(peer, targets)]
    own = [curve.reaches(target) or curve.whole() for curve, target in zip(own_full, targets)]
    accuracies = [sum(curve.best() for curve in curves) / len(curves) for curves in (ours, peer)]
    if None in reached:
        short = [f"task {task}: {curve.best():.3f} of {targets[task]:.3f}" for task, curve in enumerate(ours) if reached[task] is None]
        raise Broken(f"gradual unfreezing never reached 99 % of full fine-tuning's accuracy: {'; '.join(short)}")
    yield ROWS["time"].result(sum(reached), sum(needed), len(ours), n_is="tasks", thaw_full=sum(own))
    yield ROWS["accuracy"].result(*accuracies, len(ours), n_is="tasks")
    yield ROWS["whole"].result(sum(map(Curve.whole, ours)), sum(map(Curve.whole, peer)), len(ours), n_is="tasks")


MEASUREMENTS = (Measurement(tuple(ROWS.values()), measure),)
