"""Cluster files against the schemas of those who read them: the Ray launcher, KubeRay and Serve."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rc_ray import __version__

ROOT = Path(__file__).resolve().parents[1]
KUBERAY = sorted((ROOT / "cluster/kuberay").glob("*.yaml"))
LAUNCHER = sorted((ROOT / "cluster").glob("ray-up-*.yaml"))


def closed(schema: Any) -> Any:
    """The same schema, in which an object that lists its properties allows no others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        result.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
    return result


def kuberay_schema(kind: str) -> dict[str, Any]:
    raw = json.loads((ROOT / "tests/data/kuberay_schema.json").read_text())
    return {**closed(raw["kinds"][kind]), "$defs": closed(raw["$defs"])}


def read(path: Path) -> dict[str, Any]:
    loaded = yaml.safe_load(path.read_text())
    assert isinstance(loaded, dict)
    return loaded


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("path", KUBERAY, ids=lambda p: p.stem)
def test_kuberay_accepts_the_manifest(path: Path) -> None:
    manifest = read(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.validate(manifest, kuberay_schema(manifest["kind"]))


def test_a_misspelt_field_is_caught() -> None:
    manifest = read(ROOT / "cluster/kuberay/rayjob.yaml")
    groups = cluster_spec(manifest)["workerGroupSpecs"]
    groups[0]["maxReplica"] = groups[0].pop("maxReplicas")
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(manifest, kuberay_schema("RayJob"))


@pytest.mark.parametrize("path", KUBERAY, ids=lambda p: p.stem)
def test_manifests_ask_for_a_token_and_the_tested_ray(path: Path) -> None:
    spec = cluster_spec(read(path))
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert spec["rayVersion"] == pinned.group(1)
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f"/rc-ray:{__version__}")


def test_serve_and_our_builder_accept_the_service() -> None:
    from ray.serve.schema import ServeDeploySchema

    from rc_ray.serve.deployments import ServeArguments

    text = read(ROOT / "cluster/kuberay/rayservice.yaml")["spec"]["serveConfigV2"]
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    module, _, function = application.import_path.partition(":")
    assert (find_spec(module), function) != (None, "")
    ServeArguments.model_validate(application.args)


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.stem)
def test_the_launcher_accepts_the_cluster(path: Path) -> None:
    spec = find_spec("ray.autoscaler")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "ray-schema.json").read_text())
    config = read(path)
    jsonschema.validate(config, schema)
    assert config["head_node_type"] in config["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_worker": 1}, schema)


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda p: p.stem)
def test_the_head_can_ask_the_cloud_for_nodes(path: Path) -> None:
    """Ray's provider for AWS imports boto3, which neither Ray nor the project installs."""
    config = read(path)
    assert config["provider"]["type"] == "aws"
    assert any("boto3" in command for command in config["head_setup_commands"])
    assert "pip install boto3" in path.read_text().partition("cluster_name:")[0]


def test_the_image_installs_what_is_pinned_and_is_no_root() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    assert "--constraint constraints.txt" in text
    assert re.search(r"^USER (?!root)\w+$", text, re.MULTILINE)
    for source in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists(), name


def test_the_stand_in_of_the_image_has_every_package(tmp_path: Path) -> None:
    """Its dependencies are installed before the code is there; pip refuses a missing package."""
    text = (ROOT / "cluster/Dockerfile").read_text().replace("\\\n", " ")
    (made,) = re.findall(r"^RUN (mkdir -p rc_ray.*?) && pip install", text, re.MULTILINE)
    subprocess.run(["sh", "-c", made], check=True, cwd=tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["setuptools"]["packages"]:
        assert (tmp_path / package.replace(".", "/") / "__init__.py").is_file(), package
