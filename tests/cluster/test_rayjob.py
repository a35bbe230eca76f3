"""The RayJob manifest against the public reference of KubeRay's ray.io/v1 API; no Kubernetes is needed or touched."""

from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweeps.launch import command
from sweeps.sae.sweep import SWEEP

MANIFEST = Path(__file__).resolve().parents[2] / "docs" / "rayjob.yaml"

# Fields by object, from the API reference of KubeRay (ray.io/v1) and of Kubernetes' core/v1; "!" marks required ones.
# A value names the shape of the field: a Python type, a list of a shape, or an object below.
SHAPES: dict[str, dict[str, Any]] = {
    "RayJob": {"!apiVersion": str, "!kind": str, "!metadata": "Meta", "!spec": "RayJobSpec"},
    "Meta": {"!name": str, "namespace": str, "labels": dict, "annotations": dict},
    "RayJobSpec": {
        "!entrypoint": str,
        "!rayClusterSpec": "RayClusterSpec",
        "submissionMode": str,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "runtimeEnvYAML": str,
        "jobId": str,
        "suspend": bool,
        "metadata": dict,
        "clusterSelector": dict,
        "submitterPodTemplate": "Template",
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "entrypointResources": str,
        "managedBy": str,
    },
    "RayClusterSpec": {
        "rayVersion": str,
        "!headGroupSpec": "HeadGroup",
        "workerGroupSpecs": ["WorkerGroup"],
        "enableInTreeAutoscaling": bool,
        "autoscalerOptions": dict,
        "headServiceAnnotations": dict,
        "gcsFaultToleranceOptions": dict,
        "suspend": bool,
    },
    "HeadGroup": {
        "rayStartParams": dict,
        "!template": "Template",
        "serviceType": str,
        "headService": dict,
        "enableIngress": bool,
    },
    "WorkerGroup": {
        "!groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "numOfHosts": int,
        "idleTimeoutSeconds": int,
        "suspend": bool,
        "rayStartParams": dict,
        "!template": "Template",
    },
    "Template": {"metadata": dict, "!spec": "PodSpec"},
    "PodSpec": {"!containers": ["Container"], "volumes": list, "nodeSelector": dict, "tolerations": list},
    "Container": {
        "!name": str,
        "!image": str,
        "env": ["Env"],
        "envFrom": list,
        "ports": ["Port"],
        "resources": "Resources",
        "volumeMounts": list,
        "command": list,
        "args": list,
    },
    "Env": {"!name": str, "value": str, "valueFrom": dict},
    "Port": {"!containerPort": int, "name": str, "protocol": str},
    "Resources": {"limits": dict, "requests": dict},
}


def faults(value: Any, shape: Any, where: str) -> list[str]:
    """What is wrong with a value of a manifest, one line each."""
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [fault for i, item in enumerate(value) for fault in faults(item, shape[0], f"{where}[{i}]")]
    if not isinstance(shape, str):
        kinds = (int, float) if shape is float else shape
        wrong = not isinstance(value, kinds) or (shape is int and isinstance(value, bool))
        return [f"{where}={value!r} is no {shape.__name__}"] if wrong else []
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    fields = SHAPES[shape]
    known = {name.lstrip("!"): inner for name, inner in fields.items()}
    found = [f"{where}.{name[1:]} is missing" for name in fields if name[0] == "!" and name[1:] not in value]
    found += [f"{where}.{name} is not a field of {shape}" for name in value if name not in known]
    return found + [f for name, v in value.items() if name in known for f in faults(v, known[name], f"{where}.{name}")]


def manifest() -> dict[str, Any]:
    return yaml.safe_load(MANIFEST.read_text())


def test_manifest_has_the_shape_of_a_rayjob() -> None:
    job = manifest()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert faults(job, "RayJob", "RayJob") == []
    assert job["spec"]["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:  # ray start takes every value as text
        assert all(isinstance(v, str) for v in group["rayStartParams"].values())
        for container in group["template"]["spec"]["containers"]:
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits == requests  # otherwise Ray plans with memory that the pod may not have
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        (("spec", "entryPoint"), "x", "RayJob.spec.entryPoint is not a field of RayJobSpec"),
        (("spec", "ttlSecondsAfterFinished"), "600", "RayJob.spec.ttlSecondsAfterFinished='600' is no int"),
        (("spec", "rayClusterSpec"), {"rayVersion": "1"}, "RayJob.spec.rayClusterSpec.headGroupSpec is missing"),
    ],
)
def test_the_shape_finds_planted_faults(path: tuple[str, str], value: Any, fault: str) -> None:
    job = manifest()
    job[path[0]][path[1]] = value
    assert fault in faults(job, "RayJob", "RayJob")


def test_manifest_runs_the_installed_ray_and_a_command_that_parses() -> None:
    job = manifest()
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == importlib.metadata.version("ray")
    words = shlex.split(job["spec"]["entrypoint"])
    arguments = command.parser(SWEEP).parse_args(words[words.index("sweeps/proxy_gap.py") + 1 :])
    assert arguments.preset in SWEEP.presets
    assert arguments.address == "auto"
    assert arguments.storage.startswith("s3://")
