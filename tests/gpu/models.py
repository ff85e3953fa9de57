"""Exports a model in train mode for check.py: models.py NAME FILE.pt2. Those of `parity` draw no noise."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/benches"), str(ROOT / "tests/reference")]

CLASSES = 5


def parity_model(name: str):
    """The model, a batch, and which dimensions are free."""
    import torch

    torch.manual_seed(7)
    if name == "resnet18":
        import torchvision

        return torchvision.models.resnet18(num_classes=CLASSES), (torch.randn(6, 3, 64, 64),)
    if name == "vit":
        import timm

        return timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, img_size=64, depth=4), (torch.randn(6, 3, 64, 64),)
    import transformers
    from graph_reference import Classifier

    config = transformers.BertConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(0, 1000, (6, 24))
    return Classifier(transformers.BertModel(config, add_pooling_layer=False), CLASSES), (ids, torch.ones_like(ids))


def main() -> None:
    name, path = sys.argv[1:]
    if name not in ("resnet18", "vit", "bert"):
        import step_peer

        step_peer.export(name, Path(path))
        return
    import torch

    model, inputs = parity_model(name)
    free = {0: torch.export.Dim.DYNAMIC}
    if inputs[0].dtype == torch.int64:
        free[1] = torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(model.train(), inputs, dynamic_shapes=tuple(free for _ in inputs)), path)


if __name__ == "__main__":
    main()
