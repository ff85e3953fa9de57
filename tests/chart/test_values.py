"""Wrong values are refused by their field; values.yaml and its schema name the same fields."""

import json

import pytest
import yaml
from conftest import CHART, template

WRONG = [
    ("coordinator.replicas=0", "/coordinator/replicas"),
    ("coordinator.replicas=three", "/coordinator/replicas"),
    ("coordinator.port=80", "/coordinator/port"),
    ("worker.slots=65", "/worker/slots"),
    ("worker.slot=2", "'slot' not allowed"),
    ("worker.device=gpu", "/worker/device"),
    ("worker.resources.limit.memory=1Gi", "'limit' not allowed"),
    ("worker.sharedMemory.size=lots", "/worker/sharedMemory/size"),
    ("storage.size=10GB", "/storage/size"),
    ("storage.mountPath=thaw", "/storage/mountPath"),
    ("etcd.endpoints={http://etcd:2379}", "/etcd/endpoints/0"),
    ("etcd.endpoints=null", "'endpoints'"),
    ("etcd.endpoints={}", "/etcd/endpoints"),
    ("coordinator.extraEnv[0].value=a", "/coordinator/extraEnv/0"),
    ("image.worker.pullPolicy=Sometimes", "/image/worker/pullPolicy"),
    ("logFormat=xml", "/logFormat"),
    ("replicas=3", "'replicas' not allowed"),
    # What a schema cannot say, the templates do.
    ("storage.existingClaim=a,storage.volume.nfs.server=b", "existingClaim or volume, not both"),
    ("etcd.tls.enabled=true", "etcd.tls.existingSecret"),
    ("etcd.auth.user=thaw", "etcd.auth.existingSecret"),
    ("tls.existingSecrets.worker=a", "coordinator, worker and client, or none"),
]


@pytest.mark.parametrize(("setting", "named"), WRONG, ids=[setting for setting, _ in WRONG])
def test_wrong_values_are_refused_by_name(setting, named):
    made = template("--set", setting)
    assert made.returncode != 0 and named in made.stderr, made.stderr


def paths(values: object, schema: dict, root: dict, at: str = "") -> list[str]:
    """Differences between values and schema, down to where the schema leaves a field free."""
    if "$ref" in schema:
        schema = root["definitions"][schema["$ref"].rsplit("/", 1)[1]]
    if "properties" not in schema or schema.get("additionalProperties") is not False:
        return []
    found = [f"{at}/{key} has no default" for key in schema["properties"].keys() - values.keys()]
    for key in values:
        if key in schema["properties"]:
            found += paths(values[key], schema["properties"][key], root, f"{at}/{key}")
        else:
            found.append(f"{at}/{key} is not in the schema")
    return found


def test_values_and_schema_name_the_same_fields():
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    free = {"/global", *(f"/{role}/resources/claims" for role in ["coordinator", "worker"])}
    differences = [line for line in paths(values, schema, schema) if line.split()[0] not in free]
    # Lists of peers are not walked; every other object is closed.
    assert differences == []


def test_every_object_of_the_schema_is_closed():
    schema = json.loads((CHART / "values.schema.json").read_text())

    def closed(part: object) -> None:
        if isinstance(part, dict):
            if isinstance(part.get("properties"), dict):
                # A variable of the environment is as Kubernetes has it.
                assert part["additionalProperties"] is (list(part["properties"]) == ["name"]), part
            for inner in part.values():
                closed(inner)
        elif isinstance(part, list):
            for inner in part:
                closed(inner)

    closed(schema)
