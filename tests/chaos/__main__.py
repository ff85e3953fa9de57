"""`python -m chaos [--only NAMES] [--quick] [--list]`, with tests/ on PYTHONPATH, after `make build`.

stdout: `chaos NAME p50=… p99=… n=… goal=…` a row, as each comes. stderr: progress. Ends with 1 where something broke: weights that
differ, a run that did not end, a process that was left. A goal that is missed is no failure.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from chaos.rows import ROWS, Broken, Row

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", HF_HUB_OFFLINE="1")
    # What was started is ended on this too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser("chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAMES", help="comma-separated names of rows")
    parser.add_argument("--quick", action="store_true", help="a tenth of the faults, or of their time: shows that a row works")
    parser.add_argument("--list", action="store_true", help="print the rows and run nothing")
    options = parser.parse_args()
    if options.list:
        for row in ROWS:
            print(f"{row.name:<14} {row.what}")
        return 0
    names = [name for name in options.only.split(",") if name]
    unknown = set(names) - {row.name for row in ROWS}
    if unknown:
        print(f"chaos: no row is named {', '.join(sorted(unknown))}; `python -m chaos --list` prints them", file=sys.stderr)
        return 2
    chosen = [row for row in ROWS if not names or row.name in names]
    broken = [problem for row in chosen for problem in run(row, options.quick)]
    for problem in broken:
        print(f"chaos: broken: {problem}", file=sys.stderr)
    return 1 if broken else 0


def run(row: Row, quick: bool) -> list[str]:
    print(f"chaos: {row.name}: {row.what}", file=sys.stderr, flush=True)
    fixtures = made_fixtures()
    with tempfile.TemporaryDirectory(prefix="thaw-chaos-rows-") as folder:
        try:
            for line in row.measure(Path(folder), fixtures, quick):
                print(line, flush=True)
        except Broken as problem:
            return [f"{row.name}: {problem}"]
    return []


def made_fixtures() -> Path:
    """The small models and data of the process tests."""
    script = ROOT / "tests/fixtures/make.py"
    folder = ROOT / "target/chaos-fixtures"
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, script, folder], check=True, stdin=subprocess.DEVNULL)
        (folder / "complete").touch()
    return folder


if __name__ == "__main__":
    sys.exit(main())
