"""Gloo's all-reduce."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from benches.peers.gang import State


def all_reduce(state: State, megabytes: int, repeats: int) -> list[float]:
    """Seconds of each sum of a vector of fp32, as this rank saw it, after one that touches the memory."""
    vector = torch.ones(megabytes * 1_000_000 // 4)
    found = []
    for _ in range(repeats + 1):
        vector.fill_(1.0)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(vector)
        found.append(time.perf_counter() - began)
        if not bool((vector == state.world).all()):
            raise RuntimeError("the sum is wrong")
    return found[1:]
