"""What the demo's model learns in bf16: evaluation loss after the same updates on the same samples as in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benches import harness, thaw
from benches.harness import Measurement, Result, Row, Settings, Skipped, say
from benches.workloads import MINILM_DEMO

ROW = Row("bf16_loss", "evaluation loss of the demo after full fine-tuning, bf16 from fp32", "loss", "<=0.01", "ours/peer")
EPOCHS = 3


def measure(settings: Settings) -> Iterator[Result | Skipped]:
    losses = {}
    until = {"max_steps": 5} if settings.quick else {"max_epochs": EPOCHS}
    with harness.scratch("bf16") as folder:
        for precision in ("fp32", "bf16"):
            say(f"the demo in {precision}")
            spec = MINILM_DEMO.spec(strategy="full_fine_tuning", until=until, precision=precision)
            run = thaw.train(spec, Path(folder) / precision, 600)
            losses[precision] = run.evaluations[-1].loss
            updates = len(run.steps)
    ours, peer = losses["bf16"], losses["fp32"]
    yield ROW.result(ours, peer, updates, n_is="updates", ratio=abs(ours / peer - 1))


MEASUREMENTS = (Measurement((ROW,), measure),)
