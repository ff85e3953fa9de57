"""Tiny exported models for the tests of thaw-graph, and checks of what it writes.

    fixtures.py export FOLDER          writes the archives
    fixtures.py check FOLDER NAME...   loads what thaw-graph wrote with torch.export.load and runs it
"""

import pickle
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, export, load, save
from torch.nn import functional as F

warnings.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 16), Block(16, 16))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu_(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class WritingBlock(nn.Module):
    """Writes in place into what the block below returned."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)

    def forward(self, x):
        x.relu_()
        return x + self.two(self.one(x))


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([WritingBlock() for _ in range(3)])
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = x * 2
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.query = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x, mask):
        heads = lambda y: y.view(y.shape[0], y.shape[1], 2, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads(self.query(x)), heads(x), heads(self.value(x)), attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(x.shape)
        return self.norm(x + self.dropout(mixed))


class Encoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.layer = nn.ModuleList([Layer(size) for _ in range(3)])

    def forward(self, x, mask):
        for layer in self.layer:
            x = layer(x, mask)
        return x


class Text(nn.Module):
    """Tokens to one vector; the pooler is computed and thrown away, as in sentence embedders."""

    def __init__(self, size=8):
        super().__init__()
        self.words = nn.Embedding(30, size)
        self.positions = nn.Embedding(16, size)
        self.register_buffer("position_ids", torch.arange(16).unsqueeze(0))
        self.encoder = Encoder(size)
        self.pooler = nn.Linear(size, size)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[:, None, None, :].to(torch.bool)
        x = self.words(input_ids) + self.positions(self.position_ids[:, : input_ids.shape[1]])
        x = self.encoder(x, mask)
        torch.tanh(self.pooler(x[:, 0]))
        weight = attention_mask.unsqueeze(-1).to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 8)
        self.middle = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 30, bias=False)
        self.lm_head.weight = self.words.weight

    def forward(self, input_ids):
        return self.lm_head(self.middle(self.words(input_ids).mean(1)))


class Region(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        y = self.one(x)
        with torch.no_grad():
            scale = y.abs().mean(-1, keepdim=True) + x.shape[0] * 2
        return self.fc(y / scale)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,)))


TOKENS = (torch.randint(1, 30, (3, 7)), torch.ones(3, 7, dtype=torch.long))
MODELS = {
    "convolutions": (Convolutions, (torch.randn(4, 3, 8, 8),)),
    "writing": (Writing, (torch.randn(4, 8),)),
    "text": (Text, TOKENS),
    "tied": (Tied, TOKENS[:1]),
    "region": (Region, (torch.randn(4, 4),)),
    "branches": (Branches, (torch.randn(4, 4),)),
}


def write(folder):
    for name, (build, example) in MODELS.items():
        torch.manual_seed(0)
        shapes = tuple({0: Dim.DYNAMIC, 1: Dim.AUTO} if x.dtype == torch.long else {0: Dim.DYNAMIC} for x in example)
        program = export(build().train(), example, dynamic_shapes=shapes, strict=False)
        save(program, folder / f"{name}.pt2", extra_files={"thaw.json": '{"name": "%s"}' % name})
    torch.save(Text().state_dict(), folder / "checkpoint.pt2")
    (folder / "pickle.pt2").write_bytes(pickle.dumps({"a": 1}))
    torch.jit.script(nn.Linear(2, 2)).save(folder / "script.pt2")


def run(program, name):
    torch.manual_seed(1)
    example = MODELS[name][1]
    batch = [torch.randint(1, 30, (5, 9)) if x.dtype == torch.long else torch.randn(5, *x.shape[1:]) for x in example]
    batch = [torch.ones_like(x) if index == 1 else x for index, x in enumerate(batch)]
    return program.module()(*batch)


def check(folder, names):
    for name in names:
        program = load(folder / f"{name}.pt2")
        base, _, change = name.partition("-")
        found = run(program, base)
        if change == "same":
            expected = run(load(folder / f"{base}.pt2"), base)
            assert torch.equal(found, expected), f"{name}: outputs differ"
        else:
            # The test writes zero weights and the biases 0, 1, 2, ... into the new last layer.
            assert torch.equal(found, torch.arange(7.0).expand(5, 7)), f"{name}: {found}"
            found.sum().backward()
            save(program, folder / "saved-again.pt2")


if __name__ == "__main__":
    verb, target, *rest = sys.argv[1:]
    if verb == "export":
        write(Path(target))
    else:
        check(Path(target), rest)
