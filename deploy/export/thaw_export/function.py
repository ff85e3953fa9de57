"""Source `package.module:function`: the user's own code returns the module and an example of its inputs."""

from __future__ import annotations

import importlib
import os
import sys

import torch

from thaw_export import weights
from thaw_export.errors import ExportError
from thaw_export.source import IMAGENET_MEAN, IMAGENET_STD, TEXT_INPUTS, Source, image_source, returning_logits

RETURNS = "must return (module, example_inputs) or (module, example_inputs, dynamic_shapes)"


def function_source(text: str, options) -> Source:
    module_name, _, function_name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise ExportError(
                f"no Python module {module_name!r} in the current folder or on PYTHONPATH, nor a folder of that name"
            ) from error
        raise ExportError(f"importing {module_name!r}: {error}") from error
    except AttributeError as error:
        raise ExportError(f"module {module_name!r} has no function {function_name!r}") from error

    result = function()
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not isinstance(result[0], torch.nn.Module):
        raise ExportError(f"{text} {RETURNS}")
    module, example = result[0], tuple(result[1])
    dynamic_shapes = result[2] if len(result) == 3 else None
    if options.weights:
        weights.load_weights(module, options.weights)
    return described(text, module, example, dynamic_shapes, options)


def described(text, module, example, dynamic_shapes, options) -> Source:
    """Tells text from images by the example's dtype and rank."""
    first = example[0]
    if len(example) == 1 and first.is_floating_point() and first.dim() == 4 and first.shape[2] == first.shape[3]:
        channels, size = first.shape[1], first.shape[2]
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.5] * channels, [0.5] * channels)
        return image_source(
            module,
            channels=channels,
            size=size,
            mean=options.mean or defaults[0],
            std=options.std or defaults[1],
            dynamic_shapes=dynamic_shapes,
            example=first,
        )
    if len(example) in (1, 2) and all(value.dtype == torch.int64 and value.dim() == 2 for value in example):
        facts = {"max_length": options.max_length} if options.max_length else {}
        inputs = TEXT_INPUTS[: len(example)]
        return Source(returning_logits(module, inputs), inputs, example, dynamic_shapes, "text", facts)
    shapes = ", ".join(f"{value.dtype}{list(value.shape)}" for value in example)
    raise ExportError(
        f"{text} takes {shapes}; Thaw feeds one square float image batch [N, C, H, H] or int64 ids (and mask) [N, L]"
    )
