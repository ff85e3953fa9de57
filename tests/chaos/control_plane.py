"""The row `control_plane`: thousands of simulated workers on one coordinator, and as many replicas on torchft's lighthouse.

`thaw-fleet` makes the load and prints the lines. The lighthouse is that of a wheel put into target/; only its compiled part is loaded, so it
runs without torchft's Python.
"""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLEET = ROOT / "target/debug/thaw-fleet"
TORCHFT = "torchft==0.2.0"
WORKERS = 4096
GANGS = (1024, 4096)
DEADLINE = 60.0

LIGHTHOUSE = """
import sys
sys.path.insert(0, sys.argv[1])
import _torchft
server = _torchft.LighthouseServer(bind="127.0.0.1:0", min_replicas=int(sys.argv[2]))
print(server.address().rsplit(":", 1)[1], flush=True)
sys.stdin.read()
server.shutdown()
"""


@dataclass(frozen=True)
class ControlPlane:
    name: str = "control_plane"
    what: str = "4,096 simulated workers: processor time, gangs, and their return to a new leader; beside it torchft's lighthouse"

    def measure(self, folder: Path, fixtures: Path, quick: bool) -> Iterator[str]:
        from chaos.rows import Broken, stream

        steady = 10 if quick else 60
        load = [FLEET, "thaw", "--workers", WORKERS, "--gangs", ",".join(map(str, GANGS)), "--fixtures", fixtures]
        load += ["--rounds", 3 if quick else 20, "--steady", steady, "--kills", 1 if quick else 5]
        yield from stream([*load, "--folder", folder])
        torchft = installed()
        if not torchft:
            print(f"chaos: control_plane: {TORCHFT} does not install here, so its lighthouse is not measured", file=sys.stderr)
            return
        for size in GANGS:
            process = subprocess.Popen(
                [sys.executable, "-c", LIGHTHOUSE, str(torchft), str(size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            try:
                load = [FLEET, "lighthouse", "--address", f"127.0.0.1:{port(process)}", "--pid", process.pid, "--workers", size]
                # Its quorums of 4,096 take up to a minute.
                load += ["--rounds", 3 if quick or size == WORKERS else 20, "--steady", steady if size == WORKERS else 0]
                yield from stream(load)
            except Broken as problem:
                print(f"chaos: control_plane: torchft's lighthouse with {size} replicas: {problem}", file=sys.stderr)
            finally:
                process.kill()
                process.wait()


def installed() -> Path | None:
    """The folder of the wheel's compiled part; `None` where there is no wheel for this machine."""
    folder = ROOT / "target" / f"chaos-{TORCHFT.replace('==', '-')}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:", "--target", folder, TORCHFT]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
            return None
    return folder / "torchft"


def port(process: subprocess.Popen) -> int:
    from chaos.rows import Broken

    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], DEADLINE)
    line = process.stdout.readline() if ready else b""
    if not line.strip().isdigit():
        raise Broken("torchft's lighthouse does not serve")
    return int(line)
