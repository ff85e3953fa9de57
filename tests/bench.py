"""Seconds of an optimizer update, Thaw beside plain PyTorch: the same model, batches, seeds and rates, one thread each, in turn.

Usage: bench.py (from the repository, after `make build`)

Loading of samples is left out on both sides. The reference follows the trace of the Thaw run beside it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/reference"), str(ROOT / "deploy/export")]

import torch  # noqa: E402
from run_reference import Reference  # noqa: E402
from thaw_trace import Run  # noqa: E402

ROUNDS = 2
STEPS = 30
# The first updates warm caches and allocators.
WARM_UP = 5

SPEC = """name: bench
backbone: {{graph: {folder}/minilm.pt2}}
data:
  train: {{path: {folder}/packages.csv, format: csv, text: description, label: section}}
  max_length: 32
strategy: {strategy}
global_batch_size: 32
until: {{max_steps: {steps}}}
eval_steps: {steps}
logging_steps: 1
seed: 3
verification: {{trace: true}}
"""


class Arguments:
    skip_all_reduce = None
    wrong_moments = False
    train_frozen_batch_norm = False


def thaw(folder: Path, strategy: str) -> tuple[list[float], Path]:
    """Seconds per update, and the run's folder."""
    data = Path(tempfile.mkdtemp(dir=folder))
    spec = data / "spec.yaml"
    spec.write_text(SPEC.format(folder=folder, strategy=strategy, steps=STEPS))
    command = [ROOT / "target/debug/thaw", "train", spec, "--workers", "1", "--data-dir", data, "-o", "json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (run,) = (data / "runs").iterdir()
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        parts = json.loads(line).get("step_time") or json.loads(line).get("progress", {}).get("step_time")
        if parts:
            found.append(sum(seconds for name, seconds in parts.items() if name != "data_wait"))
    return found[WARM_UP:], run


def pytorch(folder: Path) -> list[float]:
    """Seconds per update of the plain loops over the same steps."""
    run = Run(folder)
    reference = Reference(run, Arguments())
    loaded = reference.data.batch
    waited = 0.0

    def timed(records):
        nonlocal waited
        before = time.perf_counter()
        batch = loaded(records)
        waited += time.perf_counter() - before
        return batch

    reference.data.batch = timed
    found = []
    steps = run.steps()
    reference.enter(steps[0])
    for step in steps:
        before, waited = time.perf_counter(), 0.0
        reference.step(step)
        found.append(time.perf_counter() - before - waited)
    return found[WARM_UP:]


def main() -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; one thread each; dev profile; MiniLM, batch 32")
    print(f"{'strategy':<20}{'Thaw s/update':>24}{'PyTorch s/update':>24}{'Thaw / PyTorch':>18}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([ROOT / "deploy/demo/prepare.sh", folder], check=True, stdout=subprocess.DEVNULL)
        for strategy in ("full_fine_tuning", "feature_extraction"):
            ours, theirs = [], []
            for _ in range(ROUNDS):
                found, run = thaw(folder, strategy)
                ours += found
                theirs += pytorch(run)
            shown = [f"{statistics.median(one):.4f} (min {min(one):.4f})" for one in (ours, theirs)]
            ratio = statistics.median(ours) / statistics.median(theirs)
            print(f"{strategy:<20}{shown[0]:>24}{shown[1]:>24}{ratio:>18.3f}", flush=True)


if __name__ == "__main__":
    main()
