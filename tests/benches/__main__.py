"""`python -m benches [--only NAMES] [--quick] [--list]`, with tests/ on PYTHONPATH, after `make build`.

stdout: one plain line a row as it comes, then the table. stderr: progress. Ends with 1 where something broke.
"""

from __future__ import annotations

import argparse
import os
import sys

from benches import harness
from benches.harness import Broken, Measurement, Settings


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAMES", help="comma-separated names of rows, or their beginnings")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and steps: shows that a row works")
    parser.add_argument("--list", action="store_true", help="print the rows and run nothing")
    return parser.parse_args()


def main() -> int:
    # Whatever is started here computes on one thread, and reaches other ranks over the loopback interface.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from benches.rows import MEASUREMENTS

    options = arguments()
    settings = Settings(options.quick, tuple(name for name in options.only.split(",") if name))
    if options.list:
        for row in (row for measurement in MEASUREMENTS for row in measurement.rows):
            print(f"{row.name:<40} {row.goal:<8} {row.what}")
        return 0
    chosen = [one for one in MEASUREMENTS if any(map(settings.wants, one.rows))]
    if not chosen:
        print(f"bench: no row is named {options.only}; `python -m benches --list` prints them", file=sys.stderr)
        return 2
    print(f"bench: {harness.header(settings)}", flush=True)
    results, broken = [], []
    for measurement in chosen:
        results += run(measurement, settings, broken)
    print(f"\n{harness.table(results)}")
    for problem in broken:
        print(f"bench: broken: {problem}", file=sys.stderr)
    return 1 if broken else 0


def run(measurement: Measurement, settings: Settings, broken: list[str]) -> list:
    found = []
    try:
        for result in measurement.measure(settings):
            if settings.wants(result.row):
                print(result.line(), flush=True)
                found.append(result)
    except Broken as problem:
        names = ", ".join(row.name for row in measurement.rows if settings.wants(row))
        broken.append(f"{names}: {problem}")
        harness.say(f"broken: {problem}")
    return found


if __name__ == "__main__":
    sys.exit(main())
