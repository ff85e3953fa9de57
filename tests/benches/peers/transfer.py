"""The synthetic transfer task: shapes filled with textures. A class is a shape and a texture; sixteen combinations are the source, eight
that were held out the target. And the small net of five groups that learns them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

SHAPES = ("square", "disc", "cross", "ring", "triangle", "bars")
TEXTURES = ("plain", "stripes", "checks", "dots")
PIXELS = 32
WIDTHS = (16, 24, 32, 48)


def combinations(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Sixteen of the source and eight of the target; every shape and every texture is in both."""
    import random

    numbers = random.Random(seed)
    every = [(shape, texture) for shape in SHAPES for texture in TEXTURES]
    while True:
        numbers.shuffle(every)
        source, target = every[:16], every[16:]
        if all({one[part] for one in some} == {one[part] for one in every} for some in (source, target) for part in (0, 1)):
            return sorted(source), sorted(target)


def write(folder: str, kind: str, task: str, count: str, seed: str) -> None:
    """`count` PNG files of the `source` or `target` classes of a task, in one folder a class."""
    import numpy
    from PIL import Image

    numbers = numpy.random.default_rng([int(task), int(seed), kind == "source"])
    classes = combinations(int(task))[0 if kind == "source" else 1]
    for index in range(int(count)):
        shape, texture = classes[index % len(classes)]
        path = Path(folder) / f"{shape}-{texture}" / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(shape, texture, numbers)).save(path)


def draw(shape: str, texture: str, numbers):
    """[32, 32, 3] of 8 bits: place, size, angle, two colours and noise are random."""
    import numpy

    rows, columns = numpy.mgrid[0:PIXELS, 0:PIXELS].astype(numpy.float64)
    middle = numbers.uniform(13, 19, 2)
    size, angle = numbers.uniform(7, 11), numbers.uniform(0, numpy.pi)
    y, x = rows - middle[0], columns - middle[1]
    u, v = x * numpy.cos(angle) + y * numpy.sin(angle), y * numpy.cos(angle) - x * numpy.sin(angle)
    inside = region(shape, u, v, size)
    period, phase = numbers.uniform(3.5, 5.5), numbers.uniform(0, 2 * numpy.pi)
    filled = pattern(texture, u * 2 * numpy.pi / period + phase, v * 2 * numpy.pi / period + phase)
    front, back = numbers.uniform(0.4, 1, 3), numbers.uniform(0, 0.6, 3)
    image = numpy.where((inside & filled)[..., None], front, back)
    image = image + numbers.normal(0, 0.2, image.shape)
    return (image.clip(0, 1) * 255).astype(numpy.uint8)


def region(shape: str, u, v, size: float):
    radius = (u**2 + v**2) ** 0.5
    if shape == "square":
        return (abs(u) < size * 0.85) & (abs(v) < size * 0.85)
    if shape == "disc":
        return radius < size
    if shape == "cross":
        return ((abs(u) < size * 0.36) & (abs(v) < size)) | ((abs(v) < size * 0.36) & (abs(u) < size))
    if shape == "ring":
        return (radius < size) & (radius > size * 0.52)
    if shape == "triangle":
        return (v > -size * 0.7) & (v < size - 1.9 * abs(u))
    return (abs(v) < size) & (abs(abs(u) - size * 0.6) < size * 0.3)


def pattern(texture: str, a, b):
    import numpy

    if texture == "plain":
        return numpy.ones_like(a, dtype=bool)
    if texture == "stripes":
        return numpy.sin(a) > 0
    if texture == "checks":
        return numpy.sin(a) * numpy.sin(b) > 0
    return (numpy.sin(a) > -0.1) & (numpy.sin(b) > -0.1)


class GroupedCnn(nn.Module):
    """Four blocks of two convolutions, each halving the picture, and a linear layer."""

    def __init__(self, classes: int):
        super().__init__()
        channels = (3, *WIDTHS)
        self.blocks = nn.Sequential(*(block(*pair) for pair in zip(channels, channels[1:])))
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def forward(self, pixel_values):
        return self.fc(self.blocks(pixel_values).mean((2, 3)))


def block(channels_in: int, channels_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def exported():
    """For thaw-export."""
    return GroupedCnn(16), (torch.randn(2, 3, PIXELS, PIXELS),)
