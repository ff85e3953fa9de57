"""What every kind of source becomes before it is exported: a module, its example inputs, and what Thaw has to know to feed it."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass, field
from typing import Callable

import torch

from thaw_export.errors import ExportError

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
IMAGE_INPUTS = ["pixel_values"]
TEXT_INPUTS = ["input_ids", "attention_mask"]


@dataclass
class Source:
    """A module whose forward takes `inputs` and returns one tensor [batch, features or classes]."""

    module: torch.nn.Module
    # Names of the positional inputs, in order.
    inputs: list[str]
    # One example, batch first; its sizes are arbitrary where `dynamic_shapes` says so.
    example: tuple[torch.Tensor, ...]
    dynamic_shapes: tuple | None
    # "text" (int64 ids and mask, [batch, length]) or "image" (float32, [batch, channels, height, width]).
    kind: str
    # What thaw.json says besides: image size, mean, std; longest text.
    facts: dict = field(default_factory=dict)
    # File name to content, carried inside the archive.
    extra_files: dict[str, str] = field(default_factory=dict)


def with_forward(module: torch.nn.Module, inputs: list[str], forward: Callable) -> torch.nn.Module:
    """Gives `module` another forward, of the named inputs, and keeps every parameter name; a wrapper module would prefix them all.

    `forward(module, original, *inputs)` gets the original forward as a callable.
    """
    cls = type(module)
    original = cls.forward

    def replaced(self, *inputs):
        return forward(self, types.MethodType(original, self), *inputs)

    # torch.export names the graph's inputs by the signature.
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    replaced.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in ["self", *inputs]])
    module.__class__ = type(cls.__name__, (cls,), {"forward": replaced, "__module__": cls.__module__})
    return module


def returning_logits(module: torch.nn.Module, inputs: list[str]) -> torch.nn.Module:
    """Makes a module that returns several things (auxiliary logits, a dataclass) return its main logits only."""
    return with_forward(module, inputs, lambda self, original, *values: main_output(original(*values)))


def main_output(output) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    raise ExportError(f"the model returns {type(output).__name__}; its forward must return one tensor of features or logits")


def image_source(module, *, channels: int, size: int, mean, std, dynamic_shapes=None, example=None) -> Source:
    if example is None:
        example = torch.randn(2, channels, size, size)
    return Source(
        module=returning_logits(module, IMAGE_INPUTS),
        inputs=IMAGE_INPUTS,
        example=(example,),
        dynamic_shapes=dynamic_shapes,
        kind="image",
        facts={"image": {"size": size, "mean": list(map(float, mean)), "std": list(map(float, std))}},
    )
