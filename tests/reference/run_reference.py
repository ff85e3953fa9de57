"""Plain PyTorch loops over the steps that a Thaw run recorded: gradient accumulation over the logical shards in the fixed
tree order, torch.optim with fused kernels over the same flat buffers. Meant to be bitwise equal to Thaw on one thread.

Usage: run_reference.py RUN_FOLDER [--weights model.safetensors] [--output report.json]
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F

import batches
import optimizers
import outcome
from model import Model
from thaw_trace import Run, Step


class Reference:
    def __init__(self, run: Run, arguments):
        self.run, self.arguments = run, arguments
        self.model = Model(run)
        self.data = batches.open_data(run)
        # Per group: an optimizer over its two flat parts. Made when the group first thaws, dropped when it freezes.
        self.optimizers: dict[int, torch.optim.Optimizer] = {}
        self.kept: dict[int, tuple] = {}
        self.class_weights = (run.spec.get("class_weights") or {}).get("weights")
        self.starts = [flat.detach().clone() for flat in self.model.flat]

    def enter(self, step: Step) -> None:
        if step.restored is not None:
            weights, states = self.kept[step.restored]
            self.model.restore(weights)
            if self.arguments.wrong_moments:
                states = self.kept[max(step.restored - 1, 0)][1]
            self.optimizers = {group: self.optimizer(group, state) for group, state in states.items()}
        elif self.arguments.wrong_moments and self.kept:
            states = self.kept[max(step.step - 1, 0)][1]
            self.optimizers = {group: self.optimizer(group, state) for group, state in states.items()}
        trainable = self.run.trainable[step.stage]
        self.model.set_trainable(trainable, self.arguments.train_frozen_batch_norm)
        self.optimizers = {group: self.optimizers.get(group) or self.optimizer(group) for group in trainable}

    def optimizer(self, group: int, state: dict | None = None) -> torch.optim.Optimizer:
        flat, middle = self.model.flat[group], self.run.groups[group].decay_elements
        parts = [(flat[:middle], True), (flat[middle:], False)]
        groups = [{"params": [torch.nn.Parameter(part)], "decays": decays} for part, decays in parts if part.numel()]
        made = optimizers.make(self.run.spec, groups, fused=True)
        if state is not None:
            made.load_state_dict(copy.deepcopy(state))
        return made

    def step(self, step: Step) -> float:
        """The step's loss: mean cross-entropy over its samples."""
        total = sum(self.weight(shard.records) for shard in step.shards)
        before = {name: value.clone() for name, value in self.model.statistics().items()}
        losses, gradients, statistics = [], [], []
        for shard in step.shards:
            weight = self.weight(shard.records) / total
            if len(step.shards) > 1:
                self.put_statistics(before)
            losses.append(self.shard(shard, total) if shard.records else 0.0)
            gradients.append({group: self.model.gradient(group) for group in self.model.trainable})
            statistics.append({name: value * weight for name, value in self.model.statistics().items()})
        if len(step.shards) > 1 and before:
            self.put_statistics({name: tree_sum([one[name] for one in statistics]) for name in before})
        sums = {group: self.reduced(group, [one[group] for one in gradients]) for group in self.model.trainable}
        self.update(sums, step.rates)
        return tree_sum(losses)

    def shard(self, shard, total: float) -> float:
        """A shard's share of the loss; its micro-batches' gradients are added up."""
        torch.manual_seed(shard.seed)
        parts, count = int(self.run.spec.get("gradient_accumulation_steps") or 1), len(shard.records)
        bounds = [count * part // parts for part in range(parts + 1)]
        micros = [shard.records[low:high] for low, high in zip(bounds, bounds[1:]) if high > low]
        return sum((self.micro(records, self.weight(records) / total) for records in micros), 0.0)

    def micro(self, records: list, weight: float) -> float:
        inputs, labels = self.data.batch(records)
        smoothing = self.run.spec.get("label_smoothing_factor") or 0.0
        logits = self.model.forward(inputs)
        weights = None if self.class_weights is None else torch.tensor(self.class_weights, dtype=logits.dtype)
        loss = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
        loss.backward(None if weight == 1.0 else torch.full_like(loss, weight))
        return loss.item() * weight

    def weight(self, records: list) -> float:
        """What samples count for in the loss."""
        if self.class_weights is None:
            return float(len(records))
        return sum((self.class_weights[self.data.labels[record]] for record in records), 0.0)

    def reduced(self, group: int, parts: list[torch.Tensor]) -> torch.Tensor:
        if self.run.groups[group].name == self.arguments.skip_all_reduce:
            return parts[0]
        return tree_sum(parts)

    def update(self, gradients: dict[int, torch.Tensor], rates: list[float]) -> None:
        limit = self.run.spec.get("max_grad_norm")
        if limit is not None:
            norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
            factor = ((norm + 1e-6).reciprocal() * limit).clamp(max=1.0)
            for gradient in gradients.values():
                gradient.mul_(factor)
        for (group, gradient), rate in zip(gradients.items(), rates, strict=True):
            optimizer, middle = self.optimizers[group], self.run.groups[group].decay_elements
            self.pull(group, rate)
            parts = [part for part in (gradient[:middle], gradient[middle:]) if part.numel()]
            for settings, part in zip(optimizer.param_groups, parts, strict=True):
                settings["lr"] = rate
                settings["params"][0].grad = part
            optimizer.step()

    def pull(self, group: int, rate: float) -> None:
        settings = self.run.spec.get("l2_sp")
        if settings is None:
            return
        flat, is_head = self.model.flat[group], group == len(self.run.groups) - 1
        with torch.no_grad():
            if is_head:
                flat.mul_(1.0 - rate * settings.get("beta", 0.01))
            else:
                flat.lerp_(self.starts[group], rate * settings.get("alpha", 0.1))

    def put_statistics(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.model.buffers[name].copy_(value)

    def keep(self, updates: int) -> None:
        states = {group: copy.deepcopy(optimizer.state_dict()) for group, optimizer in self.optimizers.items()}
        self.kept[updates] = (self.model.snapshot(), states)


def tree_sum(values: list):
    """Balanced, the left part larger: the order of Thaw's collectives. Leaves the values alone."""
    if len(values) == 1:
        return values[0]
    middle = (len(values) + 1) // 2
    return tree_sum(values[:middle]) + tree_sum(values[middle:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    outcome.add_arguments(parser)
    arguments = parser.parse_args()
    run = Run(arguments.run)
    torch.set_num_threads(int((run.spec.get("workers") or {}).get("threads_per_trainer", 1)))
    reference = Reference(run, arguments)
    steps = run.steps()[: arguments.steps]
    # Only what some stage goes back to is kept, and what the negative control needs.
    entries = {step.step for before, step in zip(steps, steps[1:]) if step.stage != before.stage}
    wanted = {step.restored for step in steps if step.restored is not None} | {0, arguments.at} - {None}
    if arguments.wrong_moments:
        wanted |= {max(step - 1, 0) for step in wanted | entries}
    losses, stage = [], None
    if 0 in wanted:
        reference.keep(0)
    for step in steps:
        if step.stage != stage:
            reference.enter(step)
            stage = step.stage
        losses.append(reference.step(step))
        if step.step + 1 in wanted:
            reference.keep(step.step + 1)
    weights = reference.kept[arguments.at][0] if arguments.at is not None else reference.model.snapshot()
    outcome.report(arguments, losses, [step.loss for step in steps], weights)


if __name__ == "__main__":
    main()
