"""torchrun's own recovery under the same kill: SIGKILL of one of eight workers until a step that was not made before."""

from __future__ import annotations

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


def measure(count: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="thaw-chaos-torchrun-") as folder:
        seconds = recoveries(Path(folder), count)
    seconds.sort()
    percentile = lambda percent: seconds[max(-(-len(seconds) * percent // 100), 1) - 1]
    yield f"chaos kill_trainer.torchrun p50={percentile(50):.4g} p99={percentile(99):.4g} n={len(seconds)} goal=- unit=s"


def recoveries(folder: Path, count: int) -> list[float]:
    script = ROOT / "tests/reference/elastic_ddp.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes", "1"]
    launcher += ["--nproc-per-node", str(TRAINERS), "--max-restarts", str(3 * count)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*launcher, str(script), str(folder)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    draw, found = random.Random(1), []
    try:
        wait_for(lambda: made(folder) > 20, process, folder)
        for _ in range(count):
            victim = int((folder / f"pid-{draw.randrange(TRAINERS)}").read_text())
            began = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            # An update that was under way.
            time.sleep(0.03)
            before = made(folder)
            wait_for(lambda: made(folder) > before, process, folder)
            found.append(time.monotonic() - began)
            print(f"chaos: torchrun recovered in {found[-1]:.2f} s", file=sys.stderr, flush=True)
            wait_for(lambda: made(folder) > before + 20, process, folder)
    finally:
        # Its workers are in sessions of their own; asked to end, it ends them.
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for path in folder.glob("pid-*"):
            end(int(path.read_text()))
    return found


def made(folder: Path) -> int:
    """The highest step so far."""
    try:
        lines = (folder / "steps").read_text().split("\n")[:-1]
    except FileNotFoundError:
        return 0
    return max(map(int, filter(None, lines)), default=0)


def wait_for(condition, process: subprocess.Popen, folder: Path) -> None:
    from chaos.rows import Broken

    end_at = time.monotonic() + DEADLINE
    while not condition():
        if process.poll() is not None or time.monotonic() > end_at:
            raise Broken(f"torchrun did not go on: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.005)


def end(pid: int) -> None:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_text()
        if "elastic_ddp.py" in arguments:
            os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        pass
