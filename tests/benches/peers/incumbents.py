"""How far replicas drift apart under the tools that people thaw with: two Gloo ranks, a two-layer perceptron whose first layer thaws
after two epochs. Run by torch.distributed.run; rank 0 prints one JSON line.

Usage: incumbents.py ddp|ddp_rebuilt|lightning|finetuning_scheduler IMAGES SCRATCH
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

PIXELS = 3 * 8 * 8
FROZEN_EPOCHS, EPOCHS, BATCH = 2, 5, 16


class Perceptron(nn.Module):
    def __init__(self, classes: int = 10):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 32), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, pixel_values):
        return self.head(self.backbone(pixel_values))


def exported():
    """For thaw-export."""
    return Perceptron(), (torch.randn(2, 3, 8, 8),)


def dataset(folder: Path) -> TensorDataset:
    paths = sorted(folder.rglob("*.png"))
    planes = [numpy.asarray(Image.open(path), dtype=numpy.float32).transpose(2, 0, 1) / 255 - 0.5 for path in paths]
    labels = [int(path.parent.name.removeprefix("class")) for path in paths]
    return TensorDataset(torch.from_numpy(numpy.stack(planes)), torch.tensor(labels))


def loader(folder: Path) -> DataLoader:
    data = dataset(folder)
    sampler = DistributedSampler(data, num_replicas=dist.get_world_size(), rank=dist.get_rank(), seed=3)
    return DataLoader(data, batch_size=BATCH, sampler=sampler)


def apart(net: nn.Module) -> float:
    """Largest difference of any weight between ranks."""
    mine = torch.cat([parameter.detach().flatten() for parameter in net.parameters()])
    all_ = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_, mine)
    return max((other - all_[0]).abs().max().item() for other in all_)


def plain(folder: Path, rebuild: bool) -> list[float]:
    net = Perceptron()
    net.backbone.requires_grad_(False)
    wrapped, batches, found = DistributedDataParallel(net), loader(folder), []
    optimizer = torch.optim.AdamW(net.head.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        if epoch == FROZEN_EPOCHS:
            net.backbone.requires_grad_(True)
            optimizer.add_param_group({"params": list(net.backbone.parameters())})
            wrapped = DistributedDataParallel(net) if rebuild else wrapped
        batches.sampler.set_epoch(epoch)
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(inputs), labels).backward()
            optimizer.step()
        found.append(apart(net))
    return found


def lightning(folder: Path, scratch: Path, scheduler: bool) -> list[float]:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import BackboneFinetuning

    for name in ("lightning.pytorch", "lightning.fabric", "finetuning_scheduler"):
        logging.getLogger(name).setLevel(logging.ERROR)
    found = []

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            net = Perceptron()
            self.backbone, self.head = net.backbone, net.head

        def training_step(self, batch, _):
            return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def train_dataloader(self):
            return loader(folder)

        def on_train_epoch_end(self):
            found.append(apart(self))

        def configure_optimizers(self):
            trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
            return torch.optim.AdamW(trainable, lr=1e-3)

    if scheduler:
        callback = scheduled(scratch)
    else:
        callback = BackboneFinetuning(unfreeze_backbone_at_epoch=FROZEN_EPOCHS)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        max_epochs=EPOCHS,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=scheduler,
        use_distributed_sampler=False,
        default_root_dir=scratch,
    )
    trainer.fit(Module())
    return found


def scheduled(scratch: Path):
    from finetuning_scheduler import FinetuningScheduler

    schedule = {
        0: {"params": ["head.weight", "head.bias"], "max_transition_epoch": FROZEN_EPOCHS},
        1: {"params": ["backbone.1.weight", "backbone.1.bias"], "lr": 1e-3, "max_transition_epoch": EPOCHS},
    }
    return FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True, restore_best=False)


def main() -> None:
    mode, folder, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(3)
    if mode.startswith("ddp"):
        dist.init_process_group("gloo")
        found = plain(folder, rebuild=mode == "ddp_rebuilt")
    else:
        found = lightning(folder, scratch, scheduler=mode == "finetuning_scheduler")
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    # Gloo may abort in its destructors when the other rank is gone first.
    os._exit(0)


if __name__ == "__main__":
    main()
