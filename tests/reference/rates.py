"""Learning rates and range-test suggestions as others compute them: the fixture of thaw-core's tests.

    pip install --no-deps --target FOLDER fastai==2.8.12 fastcore==2.2.39
    python tests/reference/rates.py FOLDER > coordinator/core/fixtures/rates.json

Only single functions of fastai are run, not the package, which needs more than is installed here.
"""

import argparse
import ast
import json
import math
import random
from pathlib import Path

import timm
import torch
import transformers
from timm.optim import param_groups_layer_decay
from torch import nn


def functions(path: Path, *names: str) -> dict:
    """Functions of a file by name, without the rest of it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in tree.body:
        node.decorator_list = []
    found = {"math": math}
    exec(compile(tree, str(path), "exec"), found)
    return found


class Layers(nn.Module):
    """Eight layers that timm can number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    def group_matcher(self, coarse: bool = False) -> dict:
        return {"blocks": r"^layers\.(\d+)"}


def timm_scales(decay: float) -> list[float]:
    groups = param_groups_layer_decay(Layers(), layer_decay=decay, weight_decay=0.0, weight_decay_exclude_1d=False)
    return sorted(group["lr_scale"] for group in groups)


def slanted_triangular(steps: int, cut_frac: float = 0.1, ratio: float = 32.0) -> list[float]:
    """Howard and Ruder 2018, equation 3; for a number of steps that cut_frac divides, else p ends below zero."""
    cut = math.floor(steps * cut_frac)
    rates = []
    for t in range(steps):
        p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
        rates.append((1 + p * (ratio - 1)) / ratio)
    return rates


def one_cycle(sched_cos, steps: int) -> list[float]:
    """fastai's fit_one_cycle, in double precision: pct_start 0.25, div 25, div_final 1e5."""

    def at(position: float) -> float:
        if position < 0.25:
            return sched_cos(1 / 25, 1.0, position / 0.25)
        return sched_cos(1.0, 1e-5, (position - 0.25) / 0.75)

    return [at(t / (steps - 1)) for t in range(steps)]


def lambdas(schedule, steps: int, **more) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = schedule(optimizer, num_warmup_steps=0, num_training_steps=steps, **more).lr_lambdas[0]
    return [factor(t) for t in range(steps)]


def plateau(values: list[float], factor: float, patience: int, threshold: float) -> list[float]:
    """The rate after each value; the first value is what improvement counts from."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch lowers the rate at the evaluation after its patience.
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience - 1, threshold=threshold, eps=0.0
    )
    rates = []
    for value in values:
        scheduler.step(value)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def noisy(seed: int, count: int, fall: float) -> list[float]:
    numbers = random.Random(seed)
    return [1.0 / (1 + fall * i) + 0.15 * numbers.random() for i in range(count)]


def curves() -> list[list[float]]:
    """Losses of range tests: falling and then exploding, noisy, flat, rising, falling only, short."""
    steps = range(100)
    clean = [1.4 - 0.9 / (1 + math.exp(-(i - 55) / 6)) + (0.02 * 1.35 ** (i - 80) if i > 80 else 0.0) for i in steps]
    numbers = random.Random(3)
    rough = [value + 0.08 * numbers.random() for value in clean]
    return [
        clean,
        rough,
        [1.0] * 20,
        [float(i) for i in range(20)],
        [float(-i) for i in range(21)],
        [3.0, 2.0, 2.5, 1.0, 4.0, 9.0],
        [0.5],
        [float(-i) for i in range(18)],
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fastai", type=Path)
    folder = parser.parse_args().fastai
    schedule = functions(folder / "fastai/callback/schedule.py", "sched_cos", "valley")
    even_mults = functions(folder / "fastcore/basics.py", "even_mults")["even_mults"]
    evaluations = [noisy(seed, 40, fall) for seed, fall in [(1, 0.5), (2, 0.05), (3, 0.0)]]
    fixture = {
        "versions": {
            "timm": timm.__version__,
            "torch": torch.__version__.split("+")[0],
            "fastai": "2.8.12",
            "fastcore": "2.2.39",
            "transformers": transformers.__version__,
        },
        "layer_decay": [{"decay": decay, "scales": timm_scales(decay)} for decay in (0.75, 0.9, 0.5)],
        "even_mults": [{"spread": spread, "rates": even_mults(1e-3 / spread, 1e-3, 8)} for spread in (100.0, 40.0, 2.6)],
        "slanted_triangular": [{"steps": steps, "factors": slanted_triangular(steps)} for steps in (10, 100, 250)],
        "one_cycle": [{"steps": steps, "factors": one_cycle(schedule["sched_cos"], steps)} for steps in (5, 101, 250)],
        "linear": [{"steps": 30, "factors": lambdas(transformers.get_linear_schedule_with_warmup, 30)}],
        "cosine": [{"steps": 30, "factors": lambdas(transformers.get_cosine_schedule_with_warmup, 30)}],
        "plateau": [
            {
                "factor": factor,
                "patience": patience,
                "threshold": threshold,
                "values": values,
                "rates": plateau(values, factor, patience, threshold),
            }
            for values in evaluations
            for factor, patience, threshold in [(0.1, 1, 1e-3), (0.5, 3, 0.01), (0.2, 2, 0.0)]
        ],
        "valley": [
            {"losses": losses, "index": int(schedule["valley"](list(range(len(losses))), losses, len(losses))[0])}
            for losses in curves()
        ],
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in fixture.items())
    print("{\n" + ",\n".join(lines) + "\n}")


if __name__ == "__main__":
    main()
