"""Writes what a reference found, and how far Thaw's losses and weights are from it."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch


def relative(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    expected, actual = expected.double(), actual.double()
    scale = expected.abs().max().clamp(min=1e-300)
    return ((expected - actual).abs().max() / scale).item() if expected.numel() else 0.0


def report(arguments, losses: list[float], thaw_losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    found = {
        "steps": len(losses),
        "losses": losses,
        "losses_bitwise": losses == thaw_losses,
        "losses_relative": relative(torch.tensor(losses, dtype=torch.float64), torch.tensor(thaw_losses, dtype=torch.float64)),
    }
    if arguments.weights:
        found |= compared(weights, safetensors.torch.load_file(arguments.weights))
    if arguments.save:
        safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, arguments.save)
    text = json.dumps(found)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    print(text)


def compared(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> dict:
    """How far two sets of weights are apart. Batch norm's step counters are left out: no result depends on them.

    `weights_relative` is over all weights as one vector: an attention key's bias has a gradient of rounding noise only, so
    measured by itself it never agrees.
    """
    expected, actual = ({name: value for name, value in one.items() if value.is_floating_point()} for one in (expected, actual))
    absent = sorted(set(expected) ^ set(actual))
    names = sorted(set(expected) & set(actual))
    cast = {name: expected[name].to(actual[name].dtype) for name in names}
    apart = [(relative(expected[name], actual[name]), name) for name in names]
    flat = [torch.cat([one[name].double().flatten() for name in names]) for one in (expected, actual)]
    return {
        "weights_absent": absent,
        "weights_bitwise": not absent and all(torch.equal(cast[name], actual[name]) for name in names),
        "weights_relative": ((flat[0] - flat[1]).norm() / flat[0].norm()).item(),
        "weights_furthest": max(apart)[1],
    }


def add_arguments(parser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run with verification.trace")
    parser.add_argument("--weights", help="Thaw's model.safetensors, to compare with")
    parser.add_argument("--at", type=int, help="compare the weights after this many steps (default: all)")
    parser.add_argument("--save", help="file for the reference's weights (.safetensors)")
    parser.add_argument("--output", help="file for the report (JSON); it is printed too")
    parser.add_argument("--steps", type=int, help="stop after this many steps")
    parser.add_argument("--skip-all-reduce", metavar="GROUP", help="negative control: this group keeps the first shard's gradient")
    parser.add_argument(
        "--wrong-moments", action="store_true", help="negative control: on entering a stage, moments of another step are put back"
    )
    parser.add_argument(
        "--train-frozen-batch-norm", action="store_true", help="negative control: batch norm of frozen groups trains"
    )
