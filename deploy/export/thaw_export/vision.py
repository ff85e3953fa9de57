"""Sources `torchvision:NAME` and `timm:NAME`: architectures by name, with weights from a local file or new ones."""

from __future__ import annotations

import difflib
import inspect

from thaw_export import weights
from thaw_export.errors import ExportError
from thaw_export.source import IMAGENET_MEAN, IMAGENET_STD, Source, image_source


def torchvision_source(name: str, options) -> Source:
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    require_known("torchvision", name, known)
    arguments = {"weights": None}
    if options.num_classes:
        arguments["num_classes"] = options.num_classes
    builder = torchvision.models.get_model_builder(name)
    if "image_size" in accepted_arguments(builder) and options.image_size:
        arguments["image_size"] = options.image_size
    module = builder(**arguments)
    if options.weights:
        weights.load_weights(module, options.weights)
    size = options.image_size or (299 if name.startswith("inception") else 224)
    return image_source(
        module,
        channels=3,
        size=size,
        mean=options.mean or IMAGENET_MEAN,
        std=options.std or IMAGENET_STD,
    )


def timm_source(name: str, options) -> Source:
    import timm

    require_known("timm", name.split(".")[0], timm.list_models())
    arguments = {"pretrained": False}
    if options.num_classes:
        arguments["num_classes"] = options.num_classes
    if options.image_size:
        arguments["img_size"] = options.image_size
    try:
        module = timm.create_model(name, **arguments)
    except TypeError:
        # Convolution nets take any size and have no such argument.
        arguments.pop("img_size", None)
        module = timm.create_model(name, **arguments)
    if options.weights:
        weights.load_weights(module, options.weights)
    config = module.pretrained_cfg
    channels, size, _ = config.get("input_size", (3, 224, 224))
    return image_source(
        module,
        channels=channels,
        size=options.image_size or size,
        mean=options.mean or config.get("mean", IMAGENET_MEAN),
        std=options.std or config.get("std", IMAGENET_STD),
    )


def require_known(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ExportError(f"{library} has no model {name!r}{hint}")


def accepted_arguments(builder) -> set[str]:
    """The arguments of the class a builder makes; torchvision's builders pass **kwargs on to it."""
    returned = inspect.signature(builder, eval_str=True).return_annotation
    return set(inspect.signature(returned).parameters) if inspect.isclass(returned) else set()
