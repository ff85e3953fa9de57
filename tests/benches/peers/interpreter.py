"""A net of 300 small operators, which worker/torch/examples/interpreter_overhead.rs runs too."""

from __future__ import annotations

import time

import torch

from benches.peers.gang import State

# Linear, layer norm, relu, a scaling, a shift, the shortcut.
OPERATORS_A_BLOCK = 6
BLOCKS = 50
WIDTH = 16
WARM = 50


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norm(self.linear(x)))
        return x + (inner * 0.5 + 0.1)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.head = torch.nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def export(path: str) -> None:
    torch.manual_seed(3)
    program = torch.export.export(Small().train(), (torch.randn(2, WIDTH),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, path)


def forwards(state: State, count: int) -> dict[str, float]:
    """Least and median seconds of a forward of one sample, eagerly, without gradients; and how many operators it has."""
    torch.manual_seed(3)
    model, x, found = Small().eval(), torch.ones(1, WIDTH), []
    with torch.no_grad():
        for _ in range(WARM + count):
            started = time.perf_counter()
            model(x)
            found.append(time.perf_counter() - started)
    found = sorted(found[WARM:])
    return {"median": found[count // 2], "least": found[0], "operators": OPERATORS_A_BLOCK * BLOCKS + 1}
