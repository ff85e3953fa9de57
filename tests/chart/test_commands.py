"""The manifests' commands are those of the real binaries: by their --help, and by running them with a real etcd."""

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import NAMESPACE, ROOT, binary, containers, named, pods, render, tool

DEADLINE = 60
PROGRAMS = {"coordinator": "thaw", "worker": "thaw-worker", "health": "thaw", "workers": "thaw"}


def help_of(program: str, *verbs: str) -> str:
    shown = subprocess.run([binary(program), *verbs, "--help"], capture_output=True, text=True, timeout=30, check=True)
    return shown.stdout


def flags_of(text: str) -> set[str]:
    return set(re.findall(r"^\s+(?:-\w, )?(--[a-z][a-z-]*)", text, re.MULTILINE))


def test_every_flag_and_variable_is_one_that_the_binary_knows(manifests):
    telemetry = (ROOT / "coordinator/runtime/src/telemetry/mod.rs").read_text()
    for name, _, spec in pods(manifests):
        for container in containers(spec):
            program = PROGRAMS[container["name"]]
            commands = [container["args"]]
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"]:
                if probe in container:
                    first, *rest = container[probe]["exec"]["command"]
                    assert first == program
                    commands.append(rest)
            known = telemetry
            for verb, *arguments in commands:
                text = help_of(program, verb)
                used = {argument.partition("=")[0] for argument in arguments}
                assert used <= flags_of(text), f"{name}: {program} {verb}"
                known += text
            # Kubernetes' own are used in the arguments; what is not Thaw's is for libraries.
            for variable in container["env"]:
                if variable["name"].startswith(("THAW_", "OTEL_")):
                    assert re.search(rf"\b{variable['name']}\b", known), f"{name}: {variable['name']}"



def test_the_flags_found_in_help_are_flags():
    flags = flags_of(help_of("thaw", "serve"))
    assert {"--store", "--listen", "--advertise", "--tls-ca"} <= flags and "--stores" not in flags


class Machine:
    """Containers as processes of this machine: arguments and environment as the kubelet expands them, with files of
    this test where volumes would be, and loopback where the cluster's names would lead."""

    def __init__(self, folder: Path, manifests: list[dict], stack: contextlib.ExitStack):
        self.folder, self.manifests, self.stack = folder, manifests, stack

    def secret(self, name: str) -> Path:
        folder = self.folder / name
        # Once: a process that starts may be reading them.
        if not folder.exists():
            folder.mkdir()
            for file, text in named(self.manifests, "Secret", name)["data"].items():
                (folder / file).write_bytes(base64.b64decode(text))
        return folder

    def command(self, spec: dict, container: dict, pod: str, words: list[str]) -> tuple[list[str], dict]:
        secret = next(volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume)
        places = {"/etc/thaw/tls": str(self.secret(secret)), "/var/cache/thaw": str(self.folder / pod / "cache")}
        places["/dev/shm"] = str(self.folder / pod / "memory")
        host = f"t-thaw.{NAMESPACE}.svc"

        def here(text: str) -> str:
            for there, place in places.items():
                text = text.replace(there, place)
            return text

        fields = {"metadata.name": pod, "status.podIP": "127.0.0.1"}
        environment = {"PATH": os.environ["PATH"], "THAW_TLS_NAME": host}
        for variable in container["env"]:
            given = variable.get("value")
            environment[variable["name"]] = here(given or fields[variable["valueFrom"]["fieldRef"]["fieldPath"]])
        expanded = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], here(word)) for word in words]
        expanded = [word.replace(f"https://{host}", "https://127.0.0.1") for word in expanded]
        return [str(binary(PROGRAMS[container["name"]])), *expanded], environment

    def start(self, spec: dict, container: dict, pod: str) -> "Running":
        command, environment = self.command(spec, container, pod, container["args"])
        return self.stack.enter_context(Running(command, environment))

    def ask(self, spec: dict, container: dict, pod: str, words: list[str]) -> subprocess.CompletedProcess:
        command, environment = self.command(spec, container, pod, words)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


class Running:
    """A process whose output is kept, and which ends with its test."""

    def __init__(self, command: list[str], environment: dict | None = None):
        self.lines: list[str] = []
        nowhere = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, env=environment, stdin=nowhere, stdout=nowhere, stderr=subprocess.PIPE, text=True
        )
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE)
        self.reader.join(DEADLINE)

    def log(self) -> str:
        return "".join(self.lines)

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE)


def eventually(what: str, value, *watched: Running):
    """Waits until `value()` is true; fails early where a process has ended."""
    end = time.monotonic() + DEADLINE
    while not (found := value()):
        for running in watched:
            assert running.process.poll() is None, f"it ended, waiting for {what}:\n{running.log()}"
        assert time.monotonic() < end, f"{what} did not happen; {[running.log() for running in watched]}"
        time.sleep(0.05)
    return found


def etcd(folder: Path, stack: contextlib.ExitStack) -> str:
    """A real etcd's address."""
    anywhere = "http://127.0.0.1:0"
    arguments = [f"--data-dir={folder}", f"--initial-cluster=default={anywhere}"]
    urls = ["listen-client", "advertise-client", "listen-peer", "initial-advertise-peer"]
    arguments += [f"--{what}-urls={anywhere}" for what in urls]
    running = stack.enter_context(Running([tool("etcd"), *arguments]))
    said = r"client requests on \"?(127\.0\.0\.1:\d+)"
    return eventually("etcd's port", lambda: re.search(said, running.log()), running)[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def machine(tmp_path):
    with contextlib.ExitStack() as stack:
        endpoint = etcd(tmp_path / "etcd", stack)
        mount = tmp_path / "storage"
        settings = f"etcd.endpoints={{{endpoint}}},coordinator.port={free_port()},storage.mountPath={mount}"
        yield Machine(tmp_path, render("--set", settings), stack)


def test_what_is_rendered_runs(machine):
    """A coordinator and two workers as rendered, with the chart's certificates; the probes and `helm test`."""
    specs = {name.split("/")[1]: spec for name, _, spec in pods(machine.manifests)}
    server, worker, test = (specs[f"t-thaw-{role}"] for role in ["coordinator", "worker", "test-health"])
    (coordinator,) = server["containers"]
    pod = "t-thaw-coordinator-0"
    running = machine.start(server, coordinator, pod)
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"]:
        words = coordinator[probe]["exec"]["command"][1:]
        eventually(probe, lambda words=words: machine.ask(server, coordinator, pod, words).returncode == 0, running)

    workers = [machine.start(worker, worker["containers"][0], f"t-thaw-worker-{index}") for index in range(2)]
    (health,), (listing,) = test["initContainers"], test["containers"]
    assert machine.ask(test, health, "test", health["args"]).stdout == "SERVING\n"

    def both() -> bool:
        shown = machine.ask(test, listing, "test", listing["args"])
        assert shown.returncode == 0, shown.stderr
        return all(f"t-thaw-worker-{index}" in shown.stdout for index in range(2))

    eventually("both workers", both, running, *workers)
    assert [started.end() for started in [*workers, running]] == [0, 0, 0]


def test_probes_fail_without_a_coordinator_and_strangers_are_refused(machine):
    specs = {name.split("/")[1]: spec for name, _, spec in pods(machine.manifests)}
    server = specs["t-thaw-coordinator"]
    (coordinator,) = server["containers"]
    pod = "t-thaw-coordinator-0"
    live = coordinator["livenessProbe"]["exec"]["command"][1:]
    assert machine.ask(server, coordinator, pod, live).returncode == 1

    running = machine.start(server, coordinator, pod)
    eventually("an answer", lambda: machine.ask(server, coordinator, pod, live).returncode == 0, running)
    # Certificates of another release, whose authority is another.
    stranger = Machine(machine.folder / "stranger", render(), machine.stack)
    stranger.folder.mkdir()
    refused = stranger.ask(server, coordinator, pod, live)
    assert refused.returncode == 1 and "certificate" in refused.stderr, refused.stderr
    assert running.process.poll() is None


def test_a_cluster_of_this_machine_needs_no_certificates(tmp_path):
    """`thaw up` is on loopback; what the environment says of another cluster's TLS does not reach its workers."""
    environment = {"PATH": os.environ["PATH"], "THAW_TLS_CA": "/nowhere/ca.crt", "THAW_DATA_DIR": str(tmp_path)}
    environment |= {f"THAW_PREFIX_CACHE_{tier}": str(tmp_path / tier) for tier in ["MEMORY", "DISK"]}
    with Running([str(binary("thaw")), "up", "--listen=127.0.0.1:0"], environment) as running:
        eventually("a worker", lambda: "with 1 workers" in running.log(), running)
        assert running.end() == 0
