"""What the chart renders is valid, fits together and keeps to Kubernetes' restricted profile."""

import base64
import subprocess

import kubernetes_validate
import pytest
import yaml
from conftest import CASES, CHART, KUBERNETES, NAMESPACE, containers, helm, named, of_kind, pods, render, template


def test_lint():
    for case in CASES:
        linted = helm("lint", "--strict", CHART, "-f", case)
        assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_manifests_keep_to_kubernetes_schemas(manifests, kubernetes):
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes, strict=True)


def test_a_wrong_manifest_would_be_noticed(manifests):
    (worker, *_) = of_kind(manifests, "StatefulSet")
    wrong = {**worker, "spec": {**worker["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)


def test_the_oldest_kubernetes_is_the_one_of_the_chart():
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["kubeVersion"] == f">={KUBERNETES[0]}-0"
    assert template(kubernetes=KUBERNETES[0]).returncode == 0
    assert "incompatible with Kubernetes" in template(kubernetes="1.29.0").stderr


def test_names_are_unique_and_short(manifests):
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(names) == len(set(names))
    long = render("--set", f"fullnameOverride={'a' * 63}")
    # A pod's name has an ordinal, and its StatefulSet's revision label a hash.
    assert all(len(manifest["metadata"]["name"]) <= 52 for manifest in of_kind(long, "StatefulSet"))


def matches(selector: dict, labels: dict) -> bool:
    return selector.items() <= labels.items()


def test_selectors_find_their_pods_and_no_others(manifests):
    workloads = {name: labels for name, labels, _ in pods(manifests)}
    for manifest in of_kind(manifests, "StatefulSet"):
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        found = [pod for pod, labels in workloads.items() if matches(spec["selector"]["matchLabels"], labels)]
        assert found == [f"StatefulSet/{name}"]
        service = named(manifests, "Service", spec["serviceName"])
        assert service["spec"]["clusterIP"] == "None", "a StatefulSet's pods get names from a headless service"
        assert matches(service["spec"]["selector"], workloads[f"StatefulSet/{name}"])
    for kind, selector in [
        ("Service", lambda spec: spec["selector"]),
        ("PodDisruptionBudget", lambda spec: spec["selector"]["matchLabels"]),
        ("NetworkPolicy", lambda spec: spec["podSelector"]["matchLabels"]),
    ]:
        for manifest in of_kind(manifests, kind):
            found = [pod for pod, labels in workloads.items() if matches(selector(manifest["spec"]), labels)]
            component = manifest["metadata"]["labels"]["app.kubernetes.io/component"]
            assert len(found) == 1 and found[0].endswith(f"-{component}"), (kind, manifest["metadata"]["name"], found)


def test_ports_named_are_ports_there(manifests):
    (coordinator,) = [spec for name, _, spec in pods(manifests) if name.endswith("-coordinator")]
    ports = {port["name"]: port["containerPort"] for port in coordinator["containers"][0]["ports"]}
    used = []
    for service in of_kind(manifests, "Service"):
        used += [port["targetPort"] for port in service["spec"].get("ports", [])]
    for policy in of_kind(manifests, "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            used += [port["port"] for port in rule.get("ports", [])]
    assert used and set(used) <= ports.keys()


def test_what_pods_refer_to_exists(manifests, request):
    values = yaml.safe_load(request.node.callspec.params["manifests"].read_text())
    etcd = values.get("etcd", {})
    given = [*values.get("tls", {}).get("existingSecrets", {}).values()]
    given += [etcd[part]["existingSecret"] for part in ["tls", "auth"] if part in etcd]
    secrets = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "Secret")} | set(given)
    claims = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "PersistentVolumeClaim")}
    claims |= {values.get("storage", {}).get("existingClaim")}
    accounts = {manifest["metadata"]["name"] for manifest in of_kind(manifests, "ServiceAccount")}
    accounts |= {values.get("serviceAccount", {}).get("name")}
    seen = set()
    for name, _, spec in pods(manifests):
        assert spec["serviceAccountName"] in accounts, name
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] in secrets, name
                seen.add(volume["secret"]["secretName"])
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims, name
        mounts = [mount["name"] for container in containers(spec) for mount in container["volumeMounts"]]
        assert set(mounts) == volumes.keys(), name
    assert seen == secrets, "a Secret that nothing mounts"


def test_pods_keep_to_the_restricted_profile(manifests):
    allowed = {"persistentVolumeClaim", "secret", "emptyDir", "ephemeral"}
    for name, _, spec in pods(manifests):
        pod = spec["securityContext"]
        assert pod["runAsNonRoot"] is True and pod["runAsUser"] > 0, name
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        for volume in spec["volumes"]:
            assert volume.keys() - {"name"} <= allowed, (name, volume)
        for container in containers(spec):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            assert container["resources"]["limits"]["memory"], name


def test_workers_have_shared_memory_and_gpus_for_their_slots():
    gpu = render("-f", CASES_BY_NAME["gpu-workers"])
    spec = named(gpu, "StatefulSet", "lab-worker")["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "64Gi"}
    (worker,) = spec["containers"]
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in worker["volumeMounts"]
    assert "--slots=8" in worker["args"] and "--device=cuda" in worker["args"]
    assert worker["resources"] == {
        "limits": {"memory": "256Gi", "nvidia.com/gpu": 8},
        "requests": {"cpu": 16, "memory": "256Gi", "nvidia.com/gpu": 8},
    }
    assert worker["image"].endswith("-cuda") and spec["runtimeClassName"] == "nvidia"
    plain = named(render(), "StatefulSet", "t-thaw-worker")["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in plain["containers"][0]["resources"]["limits"]
    assert "--device=cpu" in plain["containers"][0]["args"] and "runtimeClassName" not in plain


def test_storage_is_shared_and_outlives_the_release():
    claim = named(render(), "PersistentVolumeClaim", "t-thaw-storage")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and "volumeName" not in claim["spec"]
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"

    static = render("-f", CASES_BY_NAME["gpu-workers"])
    (volume,) = of_kind(static, "PersistentVolume")
    (claim,) = of_kind(static, "PersistentVolumeClaim")
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert claim["spec"]["storageClassName"] == volume["spec"]["storageClassName"] == ""
    assert volume["spec"]["claimRef"] == {"namespace": NAMESPACE, "name": claim["metadata"]["name"]}
    assert volume["spec"]["nfs"] == {"server": "files.lab", "path": "/thaw"}

    assert not of_kind(render("-f", CASES_BY_NAME["three-coordinators"]), "PersistentVolumeClaim")


def test_certificates_carry_the_names_that_are_used(manifests, tmp_path):
    if not of_kind(manifests, "Secret"):
        return
    name = next(name for name, _, _ in pods(manifests) if name.endswith("-coordinator")).split("/")[1]
    texts = {}
    for role in ["coordinator", "worker", "client"]:
        data = named(manifests, "Secret", f"{name.removesuffix('-coordinator')}-{role}-tls")["data"]
        texts[role] = {file: base64.b64decode(text).decode() for file, text in data.items()}
        assert sorted(data) == ["ca.crt", "tls.crt", "tls.key"]
    assert len({text["ca.crt"] for text in texts.values()}) == 1
    assert len({text["tls.key"] for text in texts.values()}) == 3

    def openssl(*arguments: object) -> subprocess.CompletedProcess:
        command = ["openssl", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    for file, text in texts["coordinator"].items():
        (tmp_path / file).write_text(text)
    certificate = tmp_path / "tls.crt"
    checked = openssl("verify", "-CAfile", tmp_path / "ca.crt", certificate)
    assert checked.returncode == 0, checked.stderr
    service = name.removesuffix("-coordinator")
    for host in [f"{service}.{NAMESPACE}.svc", f"{name}-2.{name}.{NAMESPACE}.svc", "localhost"]:
        assert "does match" in openssl("x509", "-in", certificate, "-noout", "-checkhost", host).stdout, host
    usage = openssl("x509", "-in", certificate, "-noout", "-ext", "extendedKeyUsage").stdout
    assert "Server Authentication" in usage and "Client Authentication" in usage


def test_two_releases_share_neither_names_nor_keys():
    def store(manifests: list[dict]) -> str:
        (coordinator,) = [spec for name, _, spec in pods(manifests) if name.endswith("-coordinator")]
        return next(argument for argument in coordinator["containers"][0]["args"] if argument.startswith("--store="))

    one, two = render(), render(release="other")
    assert store(one) == "--store=etcd://etcd:2379/lab/t-thaw"
    assert store(two) == "--store=etcd://etcd:2379/lab/other-thaw"
    names = lambda manifests: {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    assert not names(one) & names(two)


def test_upgrades_from_the_defaults_change_no_field_that_cannot_change():
    before = {manifest["metadata"]["name"]: manifest["spec"] for manifest in of_kind(render(), "StatefulSet")}
    upgraded = render("--is-upgrade", "--set", "coordinator.replicas=3,worker.slots=4,log=debug,image.worker.tag=0.2.0")
    after = {manifest["metadata"]["name"]: manifest["spec"] for manifest in of_kind(upgraded, "StatefulSet")}
    assert before.keys() == after.keys()
    for name, spec in after.items():
        changed = {key for key in spec if spec[key] != before[name][key]}
        assert changed <= {"replicas", "template"}, (name, changed)
    assert after["t-thaw-coordinator"]["replicas"] == 3


def test_etcd_is_shown_a_certificate_and_a_password():
    manifests = render("-f", CASES_BY_NAME["three-coordinators"])
    spec = named(manifests, "StatefulSet", "t-thaw-coordinator")["spec"]["template"]["spec"]
    (coordinator,) = spec["containers"]
    assert "--store=etcd+tls://etcd-0.etcd:2379,etcd-1.etcd:2379,etcd-2.etcd:2379/lab/thaw" in coordinator["args"]
    given = {variable["name"]: variable.get("value") for variable in coordinator["env"]}
    mounts = {mount["mountPath"] for mount in coordinator["volumeMounts"]}
    for name in ["CA", "CERT", "KEY", "PASSWORD_FILE"]:
        assert given[f"THAW_ETCD_{name}"].rsplit("/", 1)[0] in mounts
    assert given["THAW_ETCD_USER"] == "thaw"
    plain = named(render(), "StatefulSet", "t-thaw-coordinator")["spec"]["template"]["spec"]["containers"][0]
    assert not any(variable["name"].startswith("THAW_ETCD") for variable in plain["env"])


CASES_BY_NAME = {case.stem: case for case in CASES}
