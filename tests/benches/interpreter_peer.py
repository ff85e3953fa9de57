"""A forward of 300 small operators on a batch of one: PyTorch eager beside worker/torch/examples/interpreter_overhead.rs.

    interpreter_peer.py export FILE.pt2
    interpreter_peer.py time [FORWARDS]
    interpreter_peer.py pair [ROUNDS]      both in turn, and the ratio of the medians' medians

The last line of `time` has the same form as interpreter_overhead's.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
OPERATORS_A_BLOCK = 6
BLOCKS = 50
WIDTH = 16


class Block(torch.nn.Module):
    """Six operators: linear, layer norm, relu, a scaling, a shift, the shortcut."""

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


def export(path: Path) -> None:
    torch.manual_seed(3)
    program = torch.export.export(Small().train(), (torch.randn(2, WIDTH),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, path)


def measure(forwards: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model, x, found = Small().eval(), torch.ones(1, WIDTH), []
    with torch.no_grad():
        for forward in range(50 + forwards):
            started = time.perf_counter()
            model(x)
            if forward >= 50:
                found.append(time.perf_counter() - started)
    operators = OPERATORS_A_BLOCK * BLOCKS + 1
    print(f"forward operators={operators} median_us={statistics.median(found) * 1e6:.1f} min_us={min(found) * 1e6:.1f}")


def last_line(command: list) -> dict[str, float]:
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {key: float(value) for key, value in (pair.split("=") for pair in output.splitlines()[-1].split()[1:])}


def pair(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.pt2"
        export(path)
        ours, theirs = [], []
        for _ in range(rounds):
            ours.append(last_line([ROOT / "target/debug/examples/interpreter_overhead", path]))
            theirs.append(last_line([sys.executable, __file__, "time"]))
    for who, lines in (("ours", ours), ("peer", theirs)):
        print(who, " ".join(f"{key}={statistics.median(line[key] for line in lines):.1f}" for key in lines[0]))
    for key in ("median_us", "min_us"):
        of = lambda lines: statistics.median(line[key] for line in lines)  # noqa: E731
        print(f"time against the peer by {key}: {of(ours) / of(theirs):.3f}")


def main() -> None:
    verb, *rest = sys.argv[1:]
    if verb == "export":
        export(Path(rest[0]))
    elif verb == "time":
        measure(int(rest[0]) if rest else 1000)
    else:
        pair(int(rest[0]) if rest else 5)


if __name__ == "__main__":
    main()
