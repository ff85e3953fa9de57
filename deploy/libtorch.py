#!/usr/bin/env python3
"""Fetches the PyTorch that deploy/requirements.txt names into a folder, as the worker's image holds it: with the
libraries that a trainer loads, and the headers to build with.

    libtorch.py cpu|cuda FOLDER

FOLDER gets torch/ and nvidia/ side by side, where the libraries look for each other. It is the same wheel for both, so
that a run on CPUs gives the same bits in the image as on a developer's machine; `cpu` keeps the few libraries that the
CPU part loads (with two of CUDA's, which PyTorch's profiler links), `cuda` keeps all. Needs pip.
"""

import re
import shutil
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
# What thaw-worker loads on a CPU, and nothing more; a test follows the libraries' own lists.
CPU_LIBRARIES = [
    "torch/lib/libtorch_cpu.so",
    "torch/lib/libtorch.so",
    "torch/lib/libc10.so",
    "torch/lib/libgomp.so.1",
    "nvidia/cu13/lib/libcudart.so.13",
    "nvidia/cu13/lib/libcupti.so.13",
]
HEADERS = "torch/include/"


def torch_requirement() -> str:
    """`torch==VERSION`, of requirements.txt."""
    return next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))


def companions(variant: str, requires: list[str]) -> list[str]:
    """Of what the wheel requires, the packages with libraries that are loaded, pinned as it pins them."""
    chosen = []
    for requirement in requires:
        name, _, version = requirement.partition(";")[0].strip().partition("==")
        if name.startswith("cuda-toolkit["):
            extras = name if variant == "cuda" else "cuda-toolkit[cudart,cupti]"
            chosen.append(f"{extras}=={version}")
        elif name.startswith("nvidia-") and variant == "cuda":
            chosen.append(f"{name}=={version}")
    return chosen


def keeps(variant: str, path: str) -> bool:
    """Whether the image's folder keeps the file at `path`."""
    if path.startswith(HEADERS):
        return True
    if variant == "cpu":
        return path in CPU_LIBRARIES
    return re.search(r"/lib/[^/]*\.so[.0-9]*$", path) is not None and "python" not in path.rsplit("/", 1)[1]


def fetch(variant: str, folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check"]
    pip += ["--target", str(folder)]
    subprocess.run([*pip, "--no-deps", torch_requirement()], check=True)
    (metadata,) = folder.glob("torch-*.dist-info")
    subprocess.run([*pip, *companions(variant, PathDistribution(metadata).requires or [])], check=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif not keeps(variant, path.relative_to(folder).as_posix()):
            path.unlink()
    missing = [path for path in CPU_LIBRARIES if not (folder / path).exists()]
    if missing:
        sys.exit(f"libtorch.py: {torch_requirement()} came without {', '.join(missing)}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("cpu", "cuda"):
        sys.exit("usage: libtorch.py cpu|cuda FOLDER")
    target = Path(sys.argv[2])
    if target.exists():
        shutil.rmtree(target)
    fetch(sys.argv[1], target)
