"""PyTorch's DistributedDataParallel over gloo, rebuilt at every stage, on the steps that a Thaw run recorded: rank r takes
logical shard r. Sums are in gloo's order and optimizers work parameter by parameter, so it agrees to rounding only.

Usage: ddp_reference.py RUN_FOLDER [--weights model.safetensors] [--output report.json]
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import batches
import optimizers
import outcome
from model import Model
from thaw_trace import Run, Step


class Net(torch.nn.Module):
    """The model as DDP wants it: trainable weights as parameters of its own."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = model
        self.values = torch.nn.ParameterList()
        self.names = []
        for group in model.trainable:
            for parameter in model.run.groups[group].parameters:
                value = torch.nn.Parameter(model.parameters[parameter.name])
                # The same object is used in the forward pass, so its gradient is DDP's.
                model.parameters[parameter.name] = value
                self.values.append(value)
                self.names.append((group, parameter))

    def forward(self, *inputs):
        return self.model.forward(inputs)


class Rank:
    def __init__(self, run: Run, arguments):
        self.run, self.arguments = run, arguments
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.model = Model(run)
        self.data = batches.open_data(run)
        # By parameter name, carried over stages.
        self.state: dict[str, dict] = {}
        self.kept: dict[int, tuple] = {}

    def enter(self, step: Step) -> None:
        if step.step:
            self.state = self.states()
        if step.restored is not None:
            weights, self.state = copy.deepcopy(self.kept[step.restored])
            self.model.restore(weights)
        if self.arguments.wrong_moments and self.kept:
            self.state = copy.deepcopy(self.kept[max((step.restored if step.restored is not None else step.step) - 1, 0)][1])
        self.model.set_trainable(self.run.trainable[step.stage], self.arguments.train_frozen_batch_norm)
        net = Net(self.model)
        ignored = [
            f"values.{index}"
            for index, (group, _) in enumerate(net.names)
            if self.run.groups[group].name == self.arguments.skip_all_reduce
        ]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ignored)
        self.net = net
        # DDP refuses a module of which it would reduce nothing.
        nothing_left = len(ignored) == len(net.names)
        self.wrapped = net if nothing_left else DistributedDataParallel(net, broadcast_buffers=False)
        # Weight decay is Thaw's rule: none on what has fewer than two dimensions.
        groups = [
            {"params": [value], "decays": parameter.offset < self.run.groups[group].decay_elements}
            for value, (group, parameter) in zip(net.values, net.names)
        ]
        self.optimizer = optimizers.make(self.run.spec, groups, fused=False)
        for value, (_, parameter) in zip(net.values, net.names):
            if parameter.name in self.state:
                self.optimizer.state[value] = copy.deepcopy(self.state[parameter.name])

    def states(self) -> dict[str, dict]:
        pairs = zip(self.net.values, self.net.names)
        return {parameter.name: copy.deepcopy(self.optimizer.state[value]) for value, (_, parameter) in pairs}

    def step(self, step: Step) -> float:
        samples = sum(len(shard.records) for shard in step.shards)
        shard = step.shards[self.rank]
        weight = len(shard.records) / samples
        torch.manual_seed(shard.seed)
        inputs, labels = self.data.batch(shard.records)
        loss = F.cross_entropy(self.wrapped(*inputs), labels)
        # DDP divides the sum by the number of ranks.
        (loss * weight * self.world).backward()
        by_group = dict(zip(self.model.trainable, step.rates, strict=True))
        for settings, (group, _) in zip(self.optimizer.param_groups, self.net.names):
            settings["lr"] = by_group[group]
        limit = self.run.spec.get("max_grad_norm")
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(list(self.net.values), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for value in self.model.statistics().values():
            value.mul_(weight)
            dist.all_reduce(value)
        total = torch.tensor(loss.item() * weight, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item()

    def keep(self, updates: int) -> None:
        self.kept[updates] = (self.model.snapshot(), self.states() if updates else {})


def work(rank: int, world: int, meeting: str, arguments) -> None:
    torch.set_num_threads(1)
    # The loopback interface: no name of this host has to resolve.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    run = Run(arguments.run)
    steps = run.steps()[: arguments.steps]
    entries = {step.step for before, step in zip(steps, steps[1:]) if step.stage != before.stage}
    wanted = {step.restored for step in steps if step.restored is not None} | {arguments.at} - {None}
    if arguments.wrong_moments:
        wanted |= {max(step - 1, 1) for step in wanted | entries}
    me = Rank(run, arguments)
    losses, stage = [], None
    me.keep(0)
    for step in steps:
        if step.stage != stage:
            me.enter(step)
            stage = step.stage
        losses.append(me.step(step))
        if step.step + 1 in wanted:
            me.keep(step.step + 1)
    if rank == 0:
        weights = me.kept[arguments.at][0] if arguments.at is not None else me.model.snapshot()
        outcome.report(arguments, losses, [step.loss for step in steps], weights)
    dist.destroy_process_group()
    # Gloo's threads may outlive the group, and the interpreter's own end then aborts the process.
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    outcome.add_arguments(parser)
    arguments = parser.parse_args()
    world = len(Run(arguments.run).steps()[0].shards)
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(work, args=(world, os.path.join(folder, "meeting"), arguments), nprocs=world)


if __name__ == "__main__":
    main()
