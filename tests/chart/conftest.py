"""What the tests of the chart share: the real helm, and what it renders."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm/thaw"
CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
NAMESPACE = "lab"
RELEASE = "t"
# The oldest and the newest that manifests are checked against; Chart.yaml says the oldest too.
KUBERNETES = ["1.30.0", "1.37.0"]


def tool(name: str) -> str:
    """The path of a program. Missing, it fails in CI and skips elsewhere."""
    found = shutil.which(name, path=f"{ROOT}/.bin:{os.environ['PATH']}")
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed; `make setup` installs it")
        pytest.skip(f"{name} is not installed")
    return found


def binary(name: str) -> Path:
    """A binary of this workspace."""
    path = ROOT / os.environ.get("CARGO_TARGET_DIR", "target") / "debug" / name
    assert path.is_file(), f"{path} is not built; run `cargo build --workspace` (make test does)"
    return path


def helm(*arguments: object) -> subprocess.CompletedProcess:
    # A helm of somebody's own configuration or plugins would be another test.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HELM_", "KUBE"))}
    command = [tool("helm"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def template(*more: object, kubernetes: str = KUBERNETES[-1], release: str = RELEASE) -> subprocess.CompletedProcess:
    return helm("template", release, CHART, "-n", NAMESPACE, "--kube-version", kubernetes, *more)


def render(*more: object, release: str = RELEASE) -> list[dict]:
    """Every manifest, hooks too."""
    made = template(*more, release=release)
    assert made.returncode == 0, made.stderr
    return [manifest for manifest in yaml.safe_load_all(made.stdout) if manifest]


@functools.cache
def rendered(case: Path) -> list[dict]:
    return render("-f", case)


def of_kind(manifests: list[dict], kind: str) -> list[dict]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def named(manifests: list[dict], kind: str, name: str) -> dict:
    (found,) = [manifest for manifest in of_kind(manifests, kind) if manifest["metadata"]["name"] == name]
    return found


def pods(manifests: list[dict]) -> list[tuple[str, dict, dict]]:
    """Name, labels and spec of every pod that the manifests lead to."""
    found = []
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] == "Pod":
            found.append((name, manifest["metadata"]["labels"], manifest["spec"]))
        elif "template" in manifest.get("spec", {}):
            inner = manifest["spec"]["template"]
            found.append((name, inner["metadata"]["labels"], inner["spec"]))
    return found


def containers(spec: dict) -> list[dict]:
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.fixture(params=CASES, ids=[case.stem for case in CASES])
def manifests(request) -> list[dict]:
    return rendered(request.param)
