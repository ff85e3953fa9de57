"""The parts of run.sh, one after the other; each prints one line `gpu NAME ...` per result.

A part that cannot be made here is skipped by a line that says why. Ends with 1 where one broke or is out of bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/benches"), str(ROOT / "tests/gpu")]

# Seconds for all parts; what is left when it ends is skipped.
BUDGET = 440
PARITY = ("resnet18", "vit", "bert")
# Samples and tokens of a step.
STEPS = {"resnet50": (128, 0), "vit_base": (128, 0), "bert_base": (64, 128)}
ROUNDS = 5
DATA = {"text": "texts.csv, format: csv, text: text, label: label", "image": "images, format: image_folder"}


class Failed(Exception):
    """A part broke, or is out of bounds."""


class Skipped(Exception):
    """A part cannot be made here."""


class Check:
    def __init__(self, device: str, programs: Path, folder: Path):
        self.device, self.programs, self.folder = device, programs, folder
        self.results: list[dict] = []
        self.began = time.monotonic()
        self.exports: dict[str, subprocess.Popen] = {}

    def left(self) -> float:
        return BUDGET - (time.monotonic() - self.began)

    def say(self, name: str, **values: object) -> None:
        text = " ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items())
        print(f"gpu {name} {text}", flush=True)
        self.results.append({"name": name, **values})

    def command(self, arguments: list, deadline: float, environment: dict[str, str] | None = None) -> str:
        """What a program prints. Its group is killed at the deadline."""
        process = self.start(arguments, environment)
        try:
            out, err = process.communicate(timeout=min(deadline, max(self.left(), 1)))
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{Path(arguments[0]).name} had not ended in time") from error
        finally:
            end(process)
        if process.returncode != 0:
            raise Failed(f"{Path(arguments[0]).name} ended with {process.returncode}: {(out + err).strip()[-1500:]}")
        return out

    def start(self, arguments: list, environment: dict[str, str] | None = None) -> subprocess.Popen:
        return subprocess.Popen(
            [str(argument) for argument in arguments],
            env={**os.environ, "RUST_BACKTRACE": "0", "HF_HUB_OFFLINE": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def program(self, name: str) -> Path:
        path = self.programs / name
        if not path.exists():
            raise Failed(f"no program {name} in {self.programs}; make them with tests/gpu/run.sh --pack")
        return path

    # Exports take seconds of one core each, so all begin at once.
    def begin_exports(self, names: list[str]) -> None:
        for name in names:
            self.exports[name] = self.start([sys.executable, ROOT / "tests/gpu/models.py", name, self.folder / f"{name}.pt2"])

    def exported(self, name: str) -> Path:
        process = self.exports[name]
        try:
            _, err = process.communicate(timeout=max(self.left(), 1))
        except subprocess.TimeoutExpired as error:
            raise Failed(f"the export of {name} had not ended in time") from error
        if process.returncode != 0:
            raise Failed(f"the export of {name} ended with {process.returncode}: {err.strip()[-1500:]}")
        return self.folder / f"{name}.pt2"


def end(process: subprocess.Popen) -> None:
    """Kills what a process started, and waits for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def fields(line: str) -> dict[str, float]:
    return {key: float(value) for key, value in (pair.split("=") for pair in line.split()[1:])}


def parity(check: Check) -> None:
    """Forward, backward and five updates against the CPU."""
    for name in PARITY:
        path = check.exported(name)
        out = check.command(
            [check.program("device_parity"), path, f"device={check.device}", "batch=8"], 120, {"NVIDIA_TF32_OVERRIDE": "0"}
        )
        check.say(f"parity-{name}", **fields(out.splitlines()[-1]))


def run(check: Check) -> None:
    """A whole gradual run with the cache in host memory, on the CPU and on the GPU."""
    fixtures = check.folder / "fixtures"
    check.command([sys.executable, ROOT / "tests/fixtures/make.py", fixtures], 120)
    for kind, data in DATA.items():
        found = {}
        for device in dict.fromkeys(("cpu", check.device)):
            found[device] = train(check, fixtures, kind, data, device)
        expected, (summary, computed, cached, seconds) = found["cpu"], found[check.device]
        apart = abs(summary["test"]["loss"] - expected[0]["test"]["loss"]) / expected[0]["test"]["loss"]
        accuracy, of_cpu = summary["test"]["accuracy"], expected[0]["test"]["accuracy"]
        check.say(
            f"run-{kind}", accuracy=accuracy, cpu_accuracy=of_cpu, test_loss_apart=apart, computed=computed, cached=cached, seconds=seconds
        )
        if cached <= computed:
            raise Failed(f"the cache in host memory was not used: {computed} samples computed, {cached} read")
        if apart > 1e-3 or abs(accuracy - of_cpu) > 0.021:
            raise Failed("the run on the GPU did not come to what the run on the CPU came to")


def train(check: Check, fixtures: Path, kind: str, data: str, device: str, workers: int = 1, during: Callable | None = None, **more: str) -> tuple:
    """Summary, samples computed and read from the cache, seconds."""
    folder = Path(tempfile.mkdtemp(dir=check.folder))
    more_data = "  image: {size: 16, mean: [0.5], std: [0.5]}\n" if kind == "image" else "  max_length: 16\n"
    (folder / "spec.yaml").write_text(
        f"name: gpu-{kind}\nbackbone: {{graph: {fixtures}/{kind}.pt2}}\n"
        f"data:\n  train: {{path: {fixtures}/{data}}}\n  split: {{train: 0.6, eval: 0.2, test: 0.2}}\n{more_data}"
        "strategy: gradual_unfreezing\nuntil: {max_epochs: 3}\nthaw_units: 2\nstop_when_no_gain: false\nlogging_steps: 1\n"
        f"global_batch_size: 16\nlearning_rate: 3e-3\nseed: 11\nworkers: {{min: {workers}, max: {workers}, threads_per_trainer: 1}}\n"
        "prefix_cache: {mode: required, disk_mib: 0}\n"
    )
    memory = Path(tempfile.mkdtemp(prefix="thaw-gpu-", dir="/dev/shm"))
    environment = {
        "THAW_DEVICE": device,
        "NVIDIA_TF32_OVERRIDE": "0",
        "THAW_PREFIX_CACHE_MEMORY": str(memory / "cache"),
        "THAW_PREFIX_CACHE_DISK": str(folder / "disk"),
        **more,
    }
    command = [check.program("thaw"), "train", folder / "spec.yaml", "--workers", workers, "--data-dir", folder / "data", "-o", "json"]
    began = time.monotonic()
    process = check.start([*command, "--worker-program", check.program("thaw-worker")], environment)
    try:
        if during:
            during(process, folder)
        out, err = process.communicate(timeout=max(min(check.left(), 120), 1))
    except subprocess.TimeoutExpired as error:
        raise Failed(f"the {kind} run on {device} had not ended in time") from error
    finally:
        end(process)
        shutil.rmtree(memory, ignore_errors=True)
    if process.returncode != 0:
        raise Failed(f"the {kind} run on {device} ended with {process.returncode}: {(out + err).strip()[-1500:]}")
    (record,) = (folder / "data/runs").iterdir()
    steps = [json.loads(line) for line in (record / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if step["kind"] == "progress"]
    computed, cached = (sum(step[key] for step in steps) for key in ("prefix_computed", "prefix_cached"))
    return json.loads(out), computed, cached, time.monotonic() - began


def nccl(check: Check) -> None:
    """Sums at world size 1, of two ranks, and the end of a sum whose peer was killed; a run that loses a trainer."""
    if check.device != "cuda":
        raise Skipped("it needs a GPU")
    one = ranks(check, 1, {})[0]
    check.say("nccl-world-1", seconds_of_100_mib=float(one.split("seconds=")[1]))
    environment, gpus = two_ranks(check)
    # Small where two ranks take turns on one GPU.
    mib = 100 if len(set(gpus)) == 2 else 4
    found = ranks(check, 2, environment, gpus, f"mib={mib}", "rounds=5")
    check.say("nccl-world-2", gpus=len(set(gpus)), mib=mib, seconds=max(float(line.split("seconds=")[1]) for line in found))
    check.say("nccl-killed-peer", noticed_after_seconds=killed_peer(check, environment, gpus))
    lost_trainer(check, environment)


def two_ranks(check: Check) -> tuple[dict[str, str], list[int]]:
    """How two ranks can run here, and their GPUs."""
    import torch

    if torch.cuda.device_count() > 1:
        return {}, [0, 1]
    library = os.environ.get("THAW_NCCL")
    if not library:
        target = check.folder / "nccl"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, "nvidia-nccl-cu13>=2.30"]
        try:
            check.command(pip, 60)
        except Failed as error:
            raise Skipped("two ranks on one GPU need NCCL 2.30; set THAW_NCCL to its libnccl.so.2 (pip could not fetch it)") from error
        library = str(target / "nvidia/nccl/lib/libnccl.so.2")
    shared = {"LD_PRELOAD": library, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2"}
    return shared, [0, 0]


def start_ranks(check: Check, world: int, environment: dict, gpus: list[int], each: Callable[[int], list]) -> tuple[Path, list[subprocess.Popen]]:
    folder = Path(tempfile.mkdtemp(dir=check.folder))
    common = lambda rank: [check.program("gpu_sums"), folder, f"rank={rank}", f"world={world}", f"gpu={gpus[rank]}"]  # noqa: E731
    return folder, [check.start([*common(rank), *each(rank)], environment) for rank in range(world)]


def ranks(check: Check, world: int, environment: dict, gpus: list[int] | None = None, *more: str) -> list[str]:
    """The last line of each rank."""
    _, processes = start_ranks(check, world, environment, gpus or [0] * world, lambda _: list(more))
    lines = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=max(min(check.left(), 90), 1))
            if process.returncode != 0:
                raise Failed(f"a rank of {world} ended with {process.returncode}: {(out + err).strip()[-1500:]}")
            lines.append(out.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        raise Failed(f"sums over {world} ranks had not ended in time") from error
    finally:
        for process in processes:
            end(process)
    return lines


def killed_peer(check: Check, environment: dict, gpus: list[int]) -> float:
    """Seconds from the kill of rank 1, in whose sum rank 0 hangs, to the end of rank 0."""
    folder, processes = start_ranks(check, 2, environment, gpus, lambda rank: ["act=stall"] if rank == 1 else [])
    try:
        deadline = time.monotonic() + 60
        while not (folder / "stalled").exists():
            if time.monotonic() > deadline or processes[1].poll() is not None:
                raise Failed("rank 1 did not join")
            time.sleep(0.05)
        # Rank 0 is in its sum by now, or soon; it must hang there.
        time.sleep(2)
        if processes[0].poll() is not None:
            raise Failed("rank 0 did not wait for rank 1")
        processes[1].kill()
        killed = time.monotonic()
        try:
            out, err = processes[0].communicate(timeout=20)
        except subprocess.TimeoutExpired as error:
            raise Failed("rank 0 still hangs 20 s after its peer was killed") from error
        seconds = time.monotonic() - killed
        if processes[0].returncode != 3 or "lost rank 1" not in out:
            raise Failed(f"rank 0 ended with {processes[0].returncode}, not naming rank 1: {(out + err).strip()[-1500:]}")
        return seconds
    finally:
        for process in processes:
            end(process)


def lost_trainer(check: Check, environment: dict) -> None:
    """Two trainers on GPUs, one of which is killed: a new generation goes on to the end."""
    fixtures = check.folder / "fixtures"
    if not fixtures.exists():
        check.command([sys.executable, ROOT / "tests/fixtures/make.py", fixtures], 120)

    def kill_one(process: subprocess.Popen, folder: Path) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            metrics = list((folder / "data").glob("runs/*/metrics.jsonl"))
            victims = trainers(process.pid)
            if metrics and len(metrics[0].read_text().splitlines()) > 8 and len(victims) == 2:
                os.kill(victims[1], signal.SIGKILL)
                return
            time.sleep(0.1)
        raise Failed("two trainers never got to their first steps")

    summary, *_, seconds = train(check, fixtures, "text", DATA["text"], "cuda", 2, kill_one, **environment)
    check.say("nccl-run-after-a-kill", state=summary["state"], accuracy=summary["test"]["accuracy"], seconds=seconds)
    if summary["state"] != "SUCCEEDED":
        raise Failed(f"the run ended as {summary['state']}")


def trainers(session: int) -> list[int]:
    """Trainer processes below a process's agents."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
            except (OSError, IndexError):
                continue
    found, waiting = [], [session]
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        try:
            if b"\0trainer\0" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
        except OSError:
            continue
    return sorted(found)


def steps(check: Check) -> None:
    """Samples per second of a whole training step in bf16, beside eager PyTorch and torch.compile, by turns."""
    import step_peer

    for name, (batch, length) in STEPS.items():
        small = check.device == "cpu"
        batch, length = (2, 16) if small else (batch, length)
        path = check.exported(name)
        if check.left() < 75:
            raise Skipped(f"no time is left for {name}")
        settings = {**step_peer.DEFAULTS, "batch": str(batch), "length": str(length), "precision": "bf16", "format": "channels_last"}
        settings |= {"device": check.device, "steps": "1" if small else "20", "warm": "1" if small else "5"}
        if name != "resnet50":
            settings["format"] = "contiguous"
        ours = [check.program("step_time"), path, *(f"{key}={value}" for key, value in settings.items())]
        peers = {"eager": step_peer.Peer(name, settings), "compile": step_peer.Peer(name, {**settings, "compile": "true"})}
        found: dict[str, list[float]] = {"ours": [], "eager": [], "compile": []}
        rounds = 1 if small else ROUNDS
        for done in range(rounds):
            # The first turn compiles.
            for peer, one in peers.items():
                found[peer].append(batch / one.measure()["wall_median"])
            found["ours"].append(batch / fields(check.command(ours, 120).splitlines()[-1])["wall_median"])
            if check.left() < 45:
                rounds = done + 1
                break
        medians = {who: statistics.median(values) for who, values in found.items()}
        check.say(
            f"steps-{name}",
            **{f"{who}_samples_per_second": value for who, value in medians.items()},
            of_eager=medians["ours"] / medians["eager"],
            of_compile=medians["ours"] / medians["compile"],
            goal_of_eager=1.15,
            batch=batch,
            n=rounds,
        )
        peers.clear()


PARTS = {"parity": parity, "nccl": nccl, "run": run, "steps": steps}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    # Leaves no process and no folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    import torch

    broken = []
    with tempfile.TemporaryDirectory(prefix="thaw-gpu-") as folder:
        check = Check(arguments.device, arguments.programs.resolve(), Path(folder))
        gpu = torch.cuda.get_device_name(0).replace(" ", "-") if arguments.device == "cuda" else "none,-a-rehearsal"
        nccl_version = ".".join(map(str, torch.cuda.nccl.version())) if arguments.device == "cuda" else "none"
        check.say("versions", gpu=gpu, torch=torch.__version__, cuda=torch.version.cuda, nccl=nccl_version)
        check.begin_exports([*(PARITY if "parity" in wanted else ()), *(STEPS if "steps" in wanted else ())])
        try:
            for name, part in PARTS.items():
                if name not in wanted:
                    continue
                try:
                    part(check)
                except Skipped as reason:
                    print(f"gpu {name} skipped: {reason}", flush=True)
                    check.results.append({"name": name, "skipped": str(reason)})
                except Failed as error:
                    print(f"gpu {name} FAILED: {error}", flush=True)
                    check.results.append({"name": name, "failed": str(error)})
                    broken.append(name)
        finally:
            for process in check.exports.values():
                end(process)
        check.say("ended", seconds=time.monotonic() - check.began, failed=",".join(broken) or "nothing")
        if arguments.output:
            arguments.output.write_text(json.dumps(check.results, indent=1))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
