"""finetuning-scheduler on the samples of a Thaw run, phase by phase as the run's stages. Run by torch.distributed.run on two ranks;
rank 0 prints one JSON line: seconds in steps and in phase changes by phase, and the accuracy on the test part.

Phases end by epochs, and nothing is restored at their start: it is not asked for what the others do not do either.

Usage: scheduled.py FOLDER RUN EAGER EPOCHS SCRATCH
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from finetuning_scheduler import FinetuningScheduler
from torch.utils.data import DataLoader, Dataset

from benches.peers import steps
from benches.peers.steps import Run, Trainer


class Batches(Dataset):
    """This rank's micro-batches of one epoch after another, as tensors made before."""

    def __init__(self, trainer: Trainer, per_epoch: int):
        self.ready = [trainer.batch(step.shards[trainer.rank].records) for step in trainer.run.steps()]
        self.per_epoch, self.epoch = per_epoch, 0

    def __len__(self) -> int:
        return self.per_epoch

    def __getitem__(self, index: int):
        return self.ready[self.epoch * self.per_epoch + index]


class Module(pl.LightningModule):
    def __init__(self, net: torch.nn.Module, batches: Batches, epochs: int, rate: float):
        super().__init__()
        self.net, self.batches, self.epochs, self.rate = net, batches, epochs, rate
        self.seconds: list[float] = []

    def forward(self, *inputs):
        return self.net(*inputs)

    def training_step(self, batch, _):
        inputs, labels = batch
        return F.cross_entropy(self.net(*inputs), labels)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None, shuffle=False)

    def on_train_epoch_start(self):
        self.batches.epoch = self.current_epoch
        if self.current_epoch % self.epochs == 0:
            self.seconds.append(0.0)

    def on_train_batch_start(self, *_):
        dist.barrier()
        self.began = time.perf_counter()

    def on_train_batch_end(self, outputs, *_):
        outputs["loss"].item()
        self.seconds[-1] += time.perf_counter() - self.began

    def configure_optimizers(self):
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.rate, weight_decay=0.01, fused=True)


def schedule(trainer: Trainer, epochs: int) -> dict:
    """A phase a stage: the weights that are new in it, by the names they have below `net`."""
    phases, before = {}, set()
    first_steps = {step.stage: step for step in reversed(trainer.run.steps())}
    for stage, groups in enumerate(trainer.run.trainable):
        names = [trainer.names[one.name] for group in groups for one in trainer.run.groups[group].parameters]
        new = [f"net.{name}" for name in names if name not in before]
        before |= set(names)
        phases[stage] = {"params": new, "max_transition_epoch": epochs * (stage + 1), "lr": first_steps[stage].rates[-1]}
    phases[0].pop("lr")
    return phases


def main() -> None:
    folder, run, eager, epochs, scratch = Path(sys.argv[1]), Run(Path(sys.argv[2])), sys.argv[3], int(sys.argv[4]), sys.argv[5]
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "finetuning_scheduler"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    trainer = Trainer(int(os.environ["RANK"]), folder, run, eager, channels_last=False)
    per_epoch = json.loads((run.folder / "plan.json").read_text())["steps_per_epoch"]
    phases = schedule(trainer, epochs)
    module = Module(trainer.net, Batches(trainer, per_epoch), epochs, trainer.run.steps()[0].rates[-1])
    callback = FinetuningScheduler(ft_schedule=phases, epoch_transitions_only=True, restore_best=False)
    pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        max_epochs=epochs * len(phases),
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=scratch,
    ).fit(module)
    test = trainer.evaluate(*steps.open_part(run, "test"))[1]
    if dist.get_rank() == 0:
        print(json.dumps({"stages": module.seconds, "test": test}), flush=True)
    dist.barrier()
    # Gloo may abort in its destructors when the other rank is gone first.
    os._exit(0)


if __name__ == "__main__":
    main()
