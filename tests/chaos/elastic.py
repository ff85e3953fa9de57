"""The recovery of others under the same kill: SIGKILL of one of eight workers until a step that was not made before."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = 8
DEADLINE = 300.0


class Torchrun:
    """Its launcher starts all of them again."""

    name = "torchrun"

    def __init__(self, folder: Path, log, kills: int):
        self.folder = folder
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
        launcher += ["--nproc-per-node", str(TRAINERS), "--max-restarts", str(3 * kills)]
        self.process = start([*launcher, ROOT / "tests/reference/elastic_ddp.py", folder], log)

    def lives(self) -> bool:
        return self.process.poll() is None

    def victim(self, index: int) -> int:
        return int((self.folder / f"pid-{index}").read_text())

    def stop(self) -> None:
        # Its workers are in sessions of their own; asked to end, it ends them.
        stop(self.process)
        for path in self.folder.glob("pid-*"):
            end(int(path.read_text()))


class Torchft:
    """Each worker is a replica group of its own. One that has died is started again at once, as a launcher would."""

    name = "torchft"

    def __init__(self, folder: Path, log, _kills: int):
        self.folder, self.log = folder, log
        self.environment = os.environ | {"PYTHONPATH": str(torchft_folder())}
        self.lighthouse = self.program("lighthouse")
        self.replicas: dict[int, subprocess.Popen] = {}

    def program(self, *words) -> subprocess.Popen:
        script = ROOT / "tests/reference/elastic_torchft.py"
        return start([sys.executable, script, words[0], self.folder, *words[1:]], self.log, self.environment)

    def lives(self) -> bool:
        if (self.folder / "lighthouse").exists():
            for index in range(TRAINERS):
                if index not in self.replicas or self.replicas[index].poll() is not None:
                    self.replicas[index] = self.program("replica", index)
        return self.lighthouse.poll() is None

    def victim(self, index: int) -> int:
        return self.replicas[index].pid

    def stop(self) -> None:
        for process in self.replicas.values():
            process.kill()
            process.wait()
        stop(self.lighthouse)


def measure(peer: type, kills: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix=f"thaw-chaos-{peer.name}-") as folder:
        seconds = recoveries(peer, Path(folder), kills)
    seconds.sort()
    percentile = lambda percent: seconds[max(-(-len(seconds) * percent // 100), 1) - 1]
    yield f"chaos kill_trainer.{peer.name} p50={percentile(50):.4g} p99={percentile(99):.4g} n={len(seconds)} goal=- unit=s"


def peers(kills: int) -> Iterator[str]:
    yield from measure(Torchrun, kills)
    why = install_torchft()
    if why:
        print(f"chaos: torchft: not installed: {why}", file=sys.stderr, flush=True)
    else:
        yield from measure(Torchft, kills)


def torchft_folder() -> Path:
    key = hashlib.sha256((ROOT / "tests/chaos/requirements.txt").read_bytes()).hexdigest()[:12]
    return ROOT / f"target/torchft-{key}"


def install_torchft() -> str | None:
    """The reason where it cannot be."""
    folder, wanted = torchft_folder(), ROOT / "tests/chaos/requirements.txt"
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--upgrade"]
        try:
            subprocess.run(
                [*command, "--target", folder, "-r", wanted],
                check=True,
                capture_output=True,
                stdin=subprocess.DEVNULL,
                text=True,
                timeout=DEADLINE,
            )
            check = [sys.executable, "-c", "import torchft"]
            environment = os.environ | {"PYTHONPATH": str(folder)}
            subprocess.run(check, check=True, capture_output=True, stdin=subprocess.DEVNULL, text=True, env=environment, timeout=DEADLINE)
        except subprocess.CalledProcessError as failed:
            return " ".join(failed.stderr.split())[-200:]
        except subprocess.TimeoutExpired:
            return f"it took more than {DEADLINE:.0f} s"
        (folder / "complete").touch()
    return None


def recoveries(peer: type, folder: Path, kills: int) -> list[float]:
    draw, found = random.Random(1), []
    with open(folder / "log", "w") as log:
        group = peer(folder, log, kills)
        try:
            wait_for(lambda: made(folder) > 20, group, folder)
            for _ in range(kills):
                began = time.monotonic()
                os.kill(group.victim(draw.randrange(TRAINERS)), signal.SIGKILL)
                # An update that was under way.
                time.sleep(0.03)
                before = made(folder)
                wait_for(lambda: made(folder) > before, group, folder)
                found.append(time.monotonic() - began)
                print(f"chaos: {peer.name} recovered in {found[-1]:.2f} s", file=sys.stderr, flush=True)
                wait_for(lambda: made(folder) > before + 20 and whole(folder), group, folder)
        finally:
            group.stop()
    return found


def made(folder: Path) -> int:
    """The highest step so far."""
    try:
        lines = (folder / "steps").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return max(map(int, filter(None, lines)), default=0)


def whole(folder: Path) -> bool:
    """Whether all workers have begun."""
    found = [path.read_text() for path in folder.glob("pid-*")]
    return len(found) == TRAINERS and all(text and is_alive(int(text)) for text in found)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, group, folder: Path) -> None:
    from chaos.rows import Broken

    end_at = time.monotonic() + DEADLINE
    while not (group.lives() and condition()):
        if not group.lives() or time.monotonic() > end_at:
            raise Broken(f"{group.name} did not go on: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.005)


def start(command: list, log, environment: dict | None = None) -> subprocess.Popen:
    """With an input that ends when this process does."""
    words = [str(word) for word in command]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, env=environment)


def stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end(pid: int) -> None:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text()
        if "elastic_ddp.py" in arguments:
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass
