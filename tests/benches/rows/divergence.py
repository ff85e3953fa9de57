"""How far replicas are apart after a thaw: two Gloo ranks under the tools in use, and two of Thaw's trainers, on the same
two-layer perceptron, images and schedule.

Thaw compares a digest of weights and optimizer state over its ranks at every step and fails the run where one differs, so a run
that succeeded has zero.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw, workloads
from benches.harness import KEPT, PYTHON, ROOT, Broken, Measurement, Result, Row, Settings, Skipped, say

ROWS = {
    "ddp": Row("replica_divergence.ddp", "largest difference between ranks' weights; peer: DDP, thawed later", "abs", "<=0", "ours/peer"),
    "lightning": Row(
        "replica_divergence.lightning", "the same; peer: Lightning 2.6.6 BackboneFinetuning", "abs", "<=0", "ours/peer"
    ),
    "finetuning_scheduler": Row(
        "replica_divergence.finetuning_scheduler", "the same; peer: finetuning-scheduler 2.14.1", "abs", "<=0", "ours/peer"
    ),
}
SAMPLES, BATCH, FROZEN_EPOCHS, EPOCHS = 320, 32, 2, 5


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    with harness.scratch("divergence") as scratch:
        folder = Path(scratch)
        workloads.make("images", folder / "images", 10, SAMPLES, 8)
        compared = None
        for name, row in ROWS.items():
            if not settings.wants(row):
                continue
            if name != "ddp" and (problem := install()):
                yield row.skipped(problem)
                continue
            if compared is None:
                compared = ours(folder)
            apart = incumbent(name, folder)
            if max(apart[:FROZEN_EPOCHS]) != 0:
                raise Broken(f"the replicas of {name} are apart before the thaw: {apart}")
            yield row.result(0.0, apart[-1], compared, n_is="digests", by_epoch="/".join(map(harness.number, apart)))


def install() -> str | None:
    """Lightning and finetuning-scheduler into a folder of their own; a reason where that fails."""
    wanted = ROOT / "tests/benches/requirements.txt"
    folder = incumbents_folder()
    if not (folder / "complete").exists():
        say("installing Lightning and finetuning-scheduler into target/bench")
        arguments = ["install", "-q", "--disable-pip-version-check", "--no-deps", "--upgrade", "--target", folder, "-r", wanted]
        try:
            harness.command([PYTHON, "-m", "pip", *arguments], 300)
        except Broken as problem:
            return f"cannot install {wanted.relative_to(ROOT)}: {str(problem)[-200:]}"
        (folder / "complete").touch()
    return None


def incumbents_folder() -> Path:
    import hashlib

    key = hashlib.sha256((ROOT / "tests/benches/requirements.txt").read_bytes()).hexdigest()[:12]
    return KEPT / f"incumbents-{key}"


def incumbent(name: str, folder: Path) -> list[float]:
    """Largest difference at each epoch's end."""
    say(f"two ranks of {name}")
    module = ["-m", "benches.peers.incumbents", name, folder / "images", folder / f"scratch-{name}"]
    command = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *module]
    paths = f"{ROOT / 'tests'}:{incumbents_folder()}"
    lines = harness.command(command, 180, {"PYTHONPATH": paths}, cwd=folder).splitlines()
    found = [json.loads(line) for line in lines if line.startswith("[0.0")]
    if not found or len(found[-1]) != EPOCHS:
        raise Broken(f"{name} printed no differences for {EPOCHS} epochs: {lines[-3:]}")
    return found[-1]


def ours(folder: Path) -> int:
    """Digests that two trainers compared, all of them equal: else the run fails."""
    say("two of Thaw's trainers, a digest a step")
    workloads.export("benches.peers.incumbents:exported", folder, "--mean", "0.5", "0.5", "0.5", "--std", "1", "1", "1")
    plan = thaw.plan(spec(folder, [], strategy="full_fine_tuning", until={"max_epochs": 1}), folder)
    groups = [group["name"] for group in plan["groups"]]
    stages = [
        {"name": "head", "thaw": groups[-1:], "until": {"max_epochs": FROZEN_EPOCHS}},
        {"name": "all", "thaw": groups, "until": {"max_epochs": EPOCHS - FROZEN_EPOCHS}, "on_enter": "keep"},
    ]
    run = thaw.train(spec(folder, stages, strategy="custom"), folder / "run", 180)
    digests = [json.loads(line)["digest"] for line in (run.folder / "trace/steps.jsonl").read_text().splitlines()]
    if len(digests) != SAMPLES // BATCH * EPOCHS or None in digests:
        raise Broken(f"Thaw compared {len(digests) - digests.count(None)} digests in {len(digests)} steps")
    return len(digests)


def spec(folder: Path, stages: list[dict], **more) -> dict:
    images = {"path": f"file://{folder / 'images'}", "format": "image_folder"}
    return {
        "name": "divergence",
        "backbone": {"graph": f"file://{folder / 'model.pt2'}"},
        "data": {"train": images, "eval": images, "image": {"size": 8, "mean": [0.5] * 3, "std": [1, 1, 1]}},
        "global_batch_size": BATCH,
        "workers": {"min": 2, "max": 2},
        "verification": {"trace": True, "digest_steps": 1},
        "stages": stages,
        **more,
    }


MEASUREMENTS = (Measurement(tuple(ROWS.values()), measure),)
