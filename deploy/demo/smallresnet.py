"""A small residual network for 32-pixel grey images: `thaw-export smallresnet:digits -o FILE.pt2`."""

import torch
from torch import nn

CLASSES = 5
WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2015, figure 2)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x):
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU())
        channels = (WIDTHS[0], *WIDTHS)
        self.blocks = nn.Sequential(
            *(Block(channels[i], channels[i + 1], stride=1 if i == 0 else 2) for i in range(len(WIDTHS)))
        )
        self.fc = nn.Linear(WIDTHS[-1], classes)

    def forward(self, pixel_values):
        """[batch, 1, height, width] to logits [batch, classes]."""
        features = self.blocks(self.stem(pixel_values))
        return self.fc(features.mean((2, 3)))


def digits():
    """Module and example input, as thaw-export wants them."""
    return SmallResNet(), (torch.randn(2, 1, 32, 32),)
