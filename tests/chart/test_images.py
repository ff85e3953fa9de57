"""The Dockerfiles: linted, in step with setup.sh and the workspace, complete. None is built: that needs a registry."""

import fnmatch
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import CHART, ROOT

DOCKERFILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))
spec = importlib.util.spec_from_file_location("libtorch", ROOT / "deploy/libtorch.py")
libtorch = importlib.util.module_from_spec(spec)
spec.loader.exec_module(libtorch)


def instructions(dockerfile: Path) -> list[str]:
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", "", text).strip().splitlines()


def tracked() -> list[str]:
    """Files that a commit of the working tree would have."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    shown = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    return [path for path in shown.stdout.splitlines() if (ROOT / path).is_file()]


def in_context(path: str) -> bool:
    """Whether .dockerignore lets a file through: the last pattern that matches it or a folder above it decides."""
    kept = True
    parts = path.split("/")
    above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            if any(fnmatch.fnmatchcase(folder, pattern.lstrip("!")) for folder in above):
                kept = pattern.startswith("!")
    return kept


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=[path.stem for path in DOCKERFILES])
def test_dockerfiles_are_linted(dockerfile):
    hadolint = Path(sys.executable).with_name("hadolint")
    linted = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, timeout=60, check=False)
    assert linted.returncode == 0, linted.stdout


def test_the_linter_notices(tmp_path):
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM debian\nRUN cd /tmp && sudo apt-get install thaw\n")
    hadolint = Path(sys.executable).with_name("hadolint")
    assert subprocess.run([hadolint, wrong], capture_output=True, timeout=60, check=False).returncode != 0


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=[path.stem for path in DOCKERFILES])
def test_what_is_copied_is_there(dockerfile):
    context = [path for path in tracked() if in_context(path)]
    copied = [line.split()[1:-1] for line in instructions(dockerfile) if line.startswith("COPY ")]
    for sources in copied:
        if sources[0].startswith("--from="):
            assert f"AS {sources[0].removeprefix('--from=')}" in dockerfile.read_text()
            continue
        for source in sources:
            assert source == "." or source in context, source


def test_the_context_is_a_workspace_and_little_else(tmp_path):
    for path in filter(in_context, tracked()):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for package in ["thaw-coordinator", "thaw-worker"]:
        command = ["cargo", "tree", "--locked", "--offline", "-q", "-p", package, "--depth=0"]
        shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert shown.returncode == 0, shown.stderr
    for outside in ["target/debug/thaw", ".git/HEAD", ".venv/bin/python", "tests/run.sh", "deploy/setup.sh"]:
        assert not in_context(outside), outside


def test_versions_agree():
    cargo = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]
    for dockerfile in DOCKERFILES:
        assert f"ARG RUST={cargo['rust-version']}." in dockerfile.read_text()
        bases = [line.split()[1] for line in instructions(dockerfile) if line.startswith("FROM ")]
        assert bases == ["rust:${RUST}-slim-${DEBIAN}", "debian:${DEBIAN}-slim"], "built and run on one C library"
        assert instructions(dockerfile)[-3].startswith(("USER", "WORKDIR"))
        assert "USER 65532:65532" in instructions(dockerfile)
    setup = (ROOT / "deploy/setup.sh").read_text()
    assert f"TORCH={libtorch.torch_requirement().removeprefix('torch==')}\n" in setup
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == cargo["version"]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for dockerfile in DOCKERFILES:
        role = dockerfile.stem
        assert f"-t {values['image'][role]['repository']}:{cargo['version']} " in dockerfile.read_text()
        assert values["podSecurityContext"]["runAsUser"] == 65532
    # The builder's packages are those of setup.sh.
    for dockerfile in DOCKERFILES:
        for package in ["g++", "protobuf-compiler", "libprotobuf-dev"]:
            assert f" {package} " in dockerfile.read_text() and f"echo {package}" in setup


def test_programs_in_the_manifests_are_in_the_images():
    for role, program in [("coordinator", "thaw"), ("worker", "thaw-worker")]:
        lines = instructions(ROOT / f"deploy/{role}.Dockerfile")
        assert f"COPY --from=build /source/target/release/{program} /usr/local/bin/{program}" in lines
        assert lines[-1] == f'ENTRYPOINT ["{program}"]'


# --- libtorch --------------------------------------------------------------------------------------------------------


def packages() -> Path:
    """The folder with the PyTorch that setup.sh installed."""
    (folder,) = (ROOT / ".venv/lib").glob("python3*/site-packages")
    return folder


def needed(library: Path) -> list[str]:
    shown = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, timeout=30, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", shown)


# In every Debian with apt: the C and C++ libraries.
DEBIAN = {"ld-linux-x86-64.so.2", "libc.so.6", "libdl.so.2", "libgcc_s.so.1", "libm.so.6", "libpthread.so.0"}
DEBIAN |= {"librt.so.1", "libstdc++.so.6", "libutil.so.1"}


def closure(start: list[str], files: list[str]) -> tuple[set[str], set[str]]:
    """Which of `files` loading `start` loads, and which names nothing of them or of Debian has."""
    by_name = {Path(path).name: path for path in files}
    loaded, missing, waiting = set(), set(), list(start)
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in loaded:
            loaded.add(name)
            waiting += needed(packages() / by_name[name])
        elif name not in by_name and name not in DEBIAN:
            missing.add(name)
    return loaded, missing


def test_the_cpu_image_has_every_library_that_a_worker_loads():
    loaded, missing = closure(needed(ROOT / "target/debug/thaw-worker"), libtorch.CPU_LIBRARIES)
    assert missing == set()
    # libtorch.so is there to link with.
    assert {Path(path).name for path in libtorch.CPU_LIBRARIES} - loaded == {"libtorch.so"}
    without = [path for path in libtorch.CPU_LIBRARIES if "cupti" not in path]
    assert closure(["libtorch_cpu.so"], without)[1] == {"libcupti.so.13"}


def test_the_cuda_image_has_every_library_that_a_trainer_on_a_gpu_loads():
    found = [path for top in ["torch", "nvidia"] for path in (packages() / top).rglob("*.so*")]
    files = [path.relative_to(packages()).as_posix() for path in found]
    kept = [path for path in files if libtorch.keeps("cuda", path)]
    loaded, missing = closure(["libtorch_cpu.so", "libtorch_cuda.so", "libnccl.so.2"], kept)
    # The driver's, which the container runtime brings.
    assert missing <= {"libcuda.so.1"}, missing
    opened_later = {"libcudnn.so.9", "libcublas.so.13", "libtorch_cuda_linalg.so"}
    assert opened_later <= {Path(path).name for path in kept}
    assert not any("python" in path for path in kept)


def test_companions_are_pinned_as_the_wheel_pins_them():
    requires = [
        "filelock",
        'cuda-toolkit[cublas,cudart,cupti]==13.0.2; platform_system == "Linux"',
        'nvidia-nccl-cu13==2.28.9; platform_system == "Linux"',
        'triton==3.6.0; platform_system == "Linux"',
    ]
    assert libtorch.companions("cpu", requires) == ["cuda-toolkit[cudart,cupti]==13.0.2"]
    cuda = ["cuda-toolkit[cublas,cudart,cupti]==13.0.2", "nvidia-nccl-cu13==2.28.9"]
    assert libtorch.companions("cuda", requires) == cuda
    (metadata,) = packages().glob("torch-*.dist-info")
    real = libtorch.PathDistribution(metadata).requires
    assert len(libtorch.companions("cpu", real)) == 1 and len(libtorch.companions("cuda", real)) == 5
