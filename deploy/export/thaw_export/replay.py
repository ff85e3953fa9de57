"""Runs an exported graph in train or eval mode, node by node.

torch.export writes the mode into the graph as literals (dropout's and batch norm's `training`, attention's `dropout_p`).
`set_training` rewrites them, so one graph exported in train mode serves both, and a part of it can be in eval: what Thaw's
executor does, done here for the sanity check and for the reference scripts of the tests.
"""

from __future__ import annotations

from typing import Callable

import torch
from torch import fx

aten = torch.ops.aten

# Operator to the position of its `training` (or `train`) argument.
FLAG = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.batch_norm.default: 5,
    aten.rrelu.default: 3,
}
ATTENTION = aten.scaled_dot_product_attention.default
DROPOUT_P = 4


def set_training(module: fx.GraphModule, is_training: Callable[[fx.Node], bool]) -> None:
    """Sets each node's mode. Call it once per `ep.module()`: leaving eval mode again needs a fresh one."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or is_training(node):
            continue
        if node.target in FLAG:
            node.update_arg(FLAG[node.target], False)
        elif node.target is ATTENTION and len(node.args) > DROPOUT_P:
            node.update_arg(DROPOUT_P, 0.0)
        elif node.target is ATTENTION and "dropout_p" in node.kwargs:
            node.update_kwarg("dropout_p", 0.0)
        elif node.target is aten.add_.Tensor and is_batch_counter(module, node.args[0]):
            # Batch norm's step counter stands still in eval mode. Nothing reads its new value but the output.
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()


def is_batch_counter(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and str(node.target).endswith("num_batches_tracked")
