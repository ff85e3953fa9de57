"""make demo-images: trains a small residual network on digits 0-4, transfers it to 5-9 with few labels, and trains on
those few labels from scratch beside it. Everything goes through the `thaw` command line.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

import digits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = Path(".thaw/demo/digits")


def main() -> None:
    os.chdir(ROOT)
    FOLDER.mkdir(parents=True, exist_ok=True)
    run([sys.executable, HERE / "digits.py", FOLDER])
    run(
        [".bin/thaw-export", "smallresnet:digits", "--mean", "0.5", "--std", "0.5", "-o", FOLDER / "smallresnet.pt2"],
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    for name in ("digits-low", "digits-transfer", "digits-scratch"):
        shutil.copyfile(HERE / f"{name}.yaml", FOLDER / f"{name}.yaml")

    low = train("digits-low")
    trained = Path(unquote(urlparse(low["model"]).path)) / "model.pt2"
    shutil.copyfile(trained, FOLDER / "digits-low.pt2")
    transfer = train("digits-transfer")
    scratch = train("digits-scratch")

    print(f"\n{digits.FEW} labelled samples a digit, test accuracy on the other samples of 5-9:")
    for what, summary in (("transferred from 0-4, thawed gradually", transfer), ("from scratch", scratch)):
        print(f"  {what:<40} {summary['test']['accuracy']:.3f}  ({summary['steps']} steps, {summary['seconds']:.0f} s)")
    print(f"  (the network on its own digits 0-4: {low['test']['accuracy']:.3f})")


def train(name: str) -> dict:
    """The run's summary; progress goes to the terminal."""
    spec = FOLDER / f"{name}.yaml"
    print(f"\ndemo: thaw train {spec}", flush=True)
    return json.loads(run(["target/debug/thaw", "train", spec, "--workers", "1", "-o", "json"], stdout=subprocess.PIPE))


def run(command: list, **options) -> str | None:
    done = subprocess.run([str(part) for part in command], text=True, **options)
    if done.returncode != 0:
        sys.exit(f"demo: {command[0]} failed with exit status {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    main()
