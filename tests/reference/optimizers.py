"""PyTorch's own optimizers with the settings of a run spec."""

from __future__ import annotations

import torch


def make(spec: dict, groups: list[dict], fused: bool) -> torch.optim.Optimizer:
    """`groups` are PyTorch parameter groups, each with `decays`: whether weight decay applies."""
    settings = dict(spec.get("optimizer") or {})
    is_sgd = settings.get("type", "adamw") == "sgd"
    decay = settings.get("weight_decay", 0.0 if is_sgd else 0.01)
    for group in groups:
        group["weight_decay"] = decay if group.pop("decays") else 0.0
    if is_sgd:
        momentum = settings.get("momentum", 0.9)
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=settings.get("nesterov", False), fused=fused)
    betas = (settings.get("beta1", 0.9), settings.get("beta2", 0.999))
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=settings.get("epsilon", 1e-8), fused=fused)

