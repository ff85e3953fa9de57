"""Exports a source, checks the graph against the module it came from, and writes the archive."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from thaw_export.errors import ExportError
from thaw_export.replay import set_training
from thaw_export.source import Source

FORMAT = 1


@dataclass
class Sizes:
    nodes: int
    operators: int
    parameters: int
    tensors: int


def export(source: Source) -> ExportedProgram:
    """Exports in train mode with a dynamic batch, so that dropout and batch norm are in the graph."""
    shapes = source.dynamic_shapes or tuple({0: Dim.DYNAMIC} for _ in source.example)
    try:
        program = torch.export.export(source.module.train(), source.example, dynamic_shapes=shapes)
    except Exception as error:  # Anything the model's Python does may fail here, in torch's many exception types.
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(
            f"torch.export cannot trace this model: {first.strip()} (data-dependent control flow must go, "
            "and every input's first dimension must be free)"
        ) from error
    outputs = [spec for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    if len(outputs) != 1:
        raise ExportError(f"the model returns {len(outputs)} tensors; it must return one tensor of features or logits")
    return program


def check(source: Source, program: ExportedProgram) -> str:
    """Runs graph and module side by side and returns how close they are, or raises.

    Compared in eval and in train mode (same random seed), at the example's sizes and at another batch size and length.
    """
    worst = 0.0
    single = tuple(value[:1] for value in source.example)
    # A batch of one has no statistics, so some modules refuse to train on it.
    cases = [(False, source.example), (False, single), (True, source.example)]
    cases += [(training, resized(source)) for training in (False, True)]
    for training, example in cases:
        # Batch norm changes the module, and setting the mode changes the graph: both are used once.
        eager = copy.deepcopy(source.module).train(training)
        graph = copy.deepcopy(program).module()
        set_training(graph, lambda node: training)
        with torch.no_grad():
            expected = seeded(eager, example)
            try:
                actual = seeded(graph, example)
            except Exception as error:  # Guards and shape errors of the replayed graph come in any type.
                shapes = [list(value.shape) for value in example]
                raise ExportError(f"the exported graph does not run on inputs of shape {shapes}: {error}") from error
        if expected.shape != actual.shape:
            raise ExportError(f"the exported graph returns {list(actual.shape)}, the model {list(expected.shape)}")
        scale = expected.abs().max().clamp(min=1e-12)
        worst = max(worst, ((expected - actual).abs().max() / scale).item())
    if worst == 0.0:
        return "bitwise equal to the module in train and eval mode"
    if worst < 1e-5:
        return f"equal to the module within {worst:.1e}"
    raise ExportError(f"the exported graph differs from the module by {worst:.1e}; the model must compute the same each time")


def seeded(run, example) -> torch.Tensor:
    torch.manual_seed(0)
    return run(*example)


def resized(source: Source) -> tuple[torch.Tensor, ...]:
    """The example at another batch size, and for text another length with padding at the end."""
    values = tuple(torch.cat([value, value.flip(0), value[:1]]) for value in source.example)
    if source.kind == "text" and (source.dynamic_shapes is None or 1 in source.dynamic_shapes[0]):
        values = tuple(torch.cat([value, value[:, :3]], dim=1) for value in values)
        if len(values) == 2:
            values[1][0, -4:] = 0
    return values


def save(source: Source, program: ExportedProgram, path: Path, origin: str) -> None:
    """Writes the archive, whole or not at all."""
    document = {"format": FORMAT, "kind": source.kind, "inputs": source.inputs, "source": origin, **source.facts}
    extra = {**source.extra_files, "thaw.json": json.dumps(document, indent=1)}
    # The archive's inner folder is named after the file, so the temporary one has its name in a folder of its own.
    folder = Path(tempfile.mkdtemp(prefix=".thaw-export-", dir=path.parent))
    try:
        torch.export.save(program, folder / path.name, extra_files=extra)
        with open(folder / path.name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / path.name, path)
    except (OSError, RuntimeError) as error:
        raise ExportError(f"writing {path}: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sizes(program: ExportedProgram) -> Sizes:
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    parameters = {id(value): value for value in program.state_dict.values() if isinstance(value, torch.nn.Parameter)}
    return Sizes(
        nodes=len(list(program.graph.nodes)),
        operators=len({str(node.target) for node in calls}),
        parameters=sum(value.numel() for value in parameters.values()),
        tensors=len(parameters),
    )
