"""PyTorch's ways to write and read back a training state: torch.save and torch.load, and torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benches.peers import models
from benches.peers.gang import State

FILE = "state.pt"


def make(state: State, folder: str, eager: str, classes: int) -> int:
    """A model whose weights have all been updated once by AdamW, kept. Returns the bytes of its state."""
    torch.manual_seed(3)
    state.net = getattr(models, eager)(classes, Path(folder))
    state.optimizer = torch.optim.AdamW(state.net.parameters(), fused=True)
    for parameter in state.net.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return sum(tensor.nbytes for tensor in tensors(whole(state)))


def tensors(value: object):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)


def whole(state: State) -> dict:
    return {"model": state.net.state_dict(), "optimizer": state.optimizer.state_dict()}


def torch_save(state: State, folder: str) -> float:
    """Seconds till rank 0 has the file on the disk; the other ranks wait, as a training loop would have them."""
    dist.barrier()
    began = time.perf_counter()
    if state.rank == 0:
        with (Path(folder) / FILE).open("wb") as file:
            torch.save(whole(state), file)
            file.flush()
            os.fsync(file.fileno())
    dist.barrier()
    return time.perf_counter() - began


def distributed_save(state: State, folder: str) -> float:
    """The same by torch.distributed.checkpoint: each rank writes a part of what all hold, and syncs it."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    to = Path(folder) / "distributed"
    dist.barrier()
    began = time.perf_counter()
    model, optimizer = get_state_dict(state.net, state.optimizer)
    checkpoint.save({"model": model, "optimizer": optimizer}, checkpoint_id=to)
    dist.barrier()
    seconds = time.perf_counter() - began
    if state.rank == 0:
        shutil.rmtree(to)
    dist.barrier()
    return seconds


def roll_back(state: State, folder: str) -> dict[str, float]:
    """Seconds to put a saved state back: from its file, and from a copy in memory."""
    kept = copy.deepcopy(whole(state))
    began = time.perf_counter()
    loaded = torch.load(Path(folder) / FILE, weights_only=True)
    put_back(state, loaded)
    from_file = time.perf_counter() - began
    began = time.perf_counter()
    # The optimizer takes the tensors that it is given as its own.
    put_back(state, {"model": kept["model"], "optimizer": copy.deepcopy(kept["optimizer"])})
    return {"file": from_file, "memory": time.perf_counter() - began}


def put_back(state: State, saved: dict) -> None:
    state.net.load_state_dict(saved["model"])
    state.optimizer.load_state_dict(saved["optimizer"])
