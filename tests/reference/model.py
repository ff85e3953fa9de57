"""The exported graph as PyTorch runs it: weights in flat buffers per layer group, each group in train or eval mode."""

from __future__ import annotations

import torch
from torch import fx
from torch.func import functional_call

from thaw_export.replay import is_batch_counter, set_training
from thaw_trace import Run

aten = torch.ops.aten
# A micro-batch below this normalises by the running statistics and leaves them alone.
BATCH_NORM_MINIMUM = 16


class Model:
    """Weights live in `flat` (one buffer a group); parameters are views of it, leaves of the autograd graph."""

    def __init__(self, run: Run):
        self.run = run
        self.program = torch.export.load(run.initial)
        self.dtype = torch.float64 if run.spec.get("precision") == "fp64" else torch.float32
        state = self.program.state_dict
        self.flat: list[torch.Tensor] = []
        self.parameters: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        for group in run.groups:
            flat = torch.zeros(group.elements, dtype=self.dtype)
            for parameter in group.parameters:
                view = flat[parameter.offset : parameter.offset + parameter.elements].view(parameter.shape)
                view.copy_(state[parameter.name])
                self.parameters[parameter.name] = view.detach()
            self.flat.append(flat)
        for name, _ in self.program.module().named_buffers():
            value = state.get(name, self.program.constants.get(name))
            if value is not None:
                self.buffers[name] = self.cast(value.clone())
        # By whether the micro-batch is large enough for batch norm; with the names of the weights and buffers it reads.
        self.variants: dict[bool, tuple[fx.GraphModule, list[str]]] = {}
        self.trainable: list[int] = []

    def cast(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value

    def set_trainable(self, groups: list[int], train_frozen_batch_norm: bool = False) -> None:
        """Exactly these groups get gradients and run in train mode; the others run in eval mode."""
        self.trainable = groups
        names = {parameter.name for group in groups for parameter in self.run.groups[group].parameters}
        for name, value in self.parameters.items():
            value.requires_grad_(name in names)
        self.variants = {enough: self.graph(groups, enough, train_frozen_batch_norm) for enough in (False, True)}

    def graph(self, trainable: list[int], enough: bool, train_frozen_batch_norm: bool) -> tuple[fx.GraphModule, list[str]]:
        module = self.program.module()
        owners = owning_groups(module, self.run)

        def is_training(node: fx.Node) -> bool:
            is_norm = node.target is aten.batch_norm.default or (
                node.target is aten.add_.Tensor and is_batch_counter(module, node.args[0])
            )
            if is_norm and not enough:
                return False
            return owners[node] in trainable or (is_norm and train_frozen_batch_norm)

        set_training(module, is_training)
        if self.dtype == torch.float64:
            to_double(module)
        return module, [name for name in [*self.parameters, *self.buffers] if has(module, name)]

    def forward(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits [samples, classes]."""
        module, names = self.variants[len(inputs[0]) >= BATCH_NORM_MINIMUM]
        tensors = self.parameters | self.buffers
        return functional_call(module, {name: tensors[name] for name in names}, tuple(map(self.cast, inputs)))

    def gradient(self, group: int) -> torch.Tensor:
        """The group's gradient in the layout of its flat buffer, gaps zero; clears it."""
        flat = torch.zeros_like(self.flat[group])
        for parameter in self.run.groups[group].parameters:
            value = self.parameters[parameter.name]
            if value.grad is not None:
                flat[parameter.offset : parameter.offset + parameter.elements] = value.grad.reshape(-1)
                value.grad = None
        return flat

    def statistics(self) -> dict[str, torch.Tensor]:
        """Running statistics of the trainable groups' batch norms."""
        names = [name for group in self.trainable for name in self.run.groups[group].buffers]
        wanted = ("running_mean", "running_var")
        return {name: self.buffers[name] for name in names if name.endswith(wanted)}

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of all weights and buffers by name."""
        return {name: value.detach().clone() for name, value in (self.parameters | self.buffers).items()}

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in (self.parameters | self.buffers).items():
                value.copy_(snapshot[name])


def has(module: torch.nn.Module, name: str) -> bool:
    try:
        for part in name.split("."):
            module = getattr(module, part)
    except AttributeError:
        return False
    return True


def owning_groups(module: fx.GraphModule, run: Run) -> dict[fx.Node, int]:
    """Every node's group. Groups are contiguous in node order, so a node without weights belongs to the last group that read any."""
    group_of = {parameter.name: index for index, group in enumerate(run.groups) for parameter in group.parameters}
    group_of |= {name: index for index, group in enumerate(run.groups) for name in group.buffers}
    owners, current = {}, 0
    for node in module.graph.nodes:
        if node.op == "call_function":
            read = [group_of.get(value.target, 0) for value in node.all_input_nodes if value.op == "get_attr"]
            current = max([current, *read])
        owners[node] = current
    return owners


def to_double(module: fx.GraphModule) -> None:
    """Turns fp32 literals into fp64, so that the whole graph runs in double precision."""
    for node in list(module.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
            continue
        change = lambda value: torch.float64 if value is torch.float32 else value
        node.args = fx.node.map_aggregate(node.args, change)
        node.kwargs = fx.node.map_aggregate(node.kwargs, change)
    module.recompile()
