"""Loads a safetensors file into a module, strictly: a name too many or too few is an error that shows the nearest known name."""

from __future__ import annotations

import difflib
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from thaw_export.errors import ExportError


def load_weights(module: torch.nn.Module, path: str) -> None:
    tensors = read_weights(path)
    wanted = module.state_dict()
    # Files written from other frameworks lack batch norm's step counter, which no result depends on.
    missing = [name for name in wanted if name not in tensors and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in tensors if name not in wanted]
    refuse_mismatch(path, missing, unexpected)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ExportError(
                f"weights {path}: {name} has shape {list(tensor.shape)} and the model wants {list(wanted[name].shape)}"
                + ("; is --num-classes what the file was trained with?" if tensor.dim() <= 2 else "")
            )
    module.load_state_dict(tensors, strict=False)


def read_weights(path: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ExportError(f"weights {path}: no such file")
    if not path.endswith(".safetensors"):
        raise ExportError(f"weights {path}: only .safetensors files are read (a pickle can run code); convert it first")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ExportError(f"weights {path}: not a valid safetensors file: {error}") from error


def refuse_mismatch(path: str, missing: list[str], unexpected: list[str]) -> None:
    """Raises if either list has a name, pairing each with the most similar name of the other list."""
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing: {listed(missing, unexpected)}")
    if unexpected:
        parts.append(f"{len(unexpected)} not in the model: {listed(unexpected, missing)}")
    raise ExportError(f"weights {path} do not fit the model; " + "; ".join(parts))


def listed(names: list[str], others: list[str], limit: int = 4) -> str:
    shown = []
    for name in names[:limit]:
        near = difflib.get_close_matches(name, others, n=1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (", ..." if len(names) > limit else "")
