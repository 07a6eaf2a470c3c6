"""The RayJob for Kubernetes: only fields that KubeRay knows, and it trains, leaves and goes on.

The fields are those of the group ray.io/v1 in KubeRay's API reference (docs/reference/api.md of
ray-project/kuberay; `authOptions` since v1.5.1, as Ray's "Configure Ray clusters to use token
authentication" says), and of pods in Kubernetes' (v1.28).
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import ray
import yaml

from elastic.core.config import JobConfig, load_job
from tests.documents import ROOT

PATH = ROOT / "docs" / "kuberay.yaml"

FIELDS = {
    "RayJob": "apiVersion kind metadata spec",
    "RayJobSpec": "activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata"
    " clusterSelector submitterConfig managedBy deletionStrategy entrypoint runtimeEnvYAML jobId"
    " submissionMode entrypointResources entrypointNumCpus entrypointNumGpus suspend"
    " ttlSecondsAfterFinished shutdownAfterJobFinishes",
    "SubmitterConfig": "backoffLimit",
    "RayClusterSpec": "suspend managedBy autoscalerOptions headServiceAnnotations headGroupSpec"
    " enableInTreeAutoscaling authOptions gcsFaultToleranceOptions rayVersion workerGroupSpecs",
    "AuthOptions": "mode",
    "HeadGroupSpec": "template headService enableIngress rayStartParams serviceType",
    "WorkerGroupSpec": "suspend groupName replicas minReplicas maxReplicas idleTimeoutSeconds"
    " rayStartParams template scaleStrategy numOfHosts",
    "PodSpec": "terminationGracePeriodSeconds containers volumes",
    "Container": "name image env resources lifecycle volumeMounts",
}
"""Of pods those that we use."""


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The ConfigMap and the RayJob."""
    config, job = yaml.safe_load_all(PATH.read_text())
    return config, job


CONFIG, RAY_JOB = documents()
SPEC = RAY_JOB["spec"]
HEAD_SPEC = SPEC["rayClusterSpec"]["headGroupSpec"]
(HOSTS,) = SPEC["rayClusterSpec"]["workerGroupSpecs"]


def unknown(job: Mapping[str, Any]) -> Iterator[str]:
    """Fields that are in none of the references: Kubernetes would drop or refuse them."""
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    head, groups = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    pods = [one["template"]["spec"] for one in (head, *groups)]
    found = [
        ("RayJob", job),
        ("RayJobSpec", spec),
        ("SubmitterConfig", spec["submitterConfig"]),
        ("RayClusterSpec", cluster),
        ("AuthOptions", cluster["authOptions"]),
        ("HeadGroupSpec", head),
        *(("WorkerGroupSpec", one) for one in groups),
        *(("PodSpec", one) for one in pods),
        *(("Container", one) for pod in pods for one in pod["containers"]),
    ]
    for kind, part in found:
        yield from set(part) - set(FIELDS[kind].split())


def test_it_is_a_ray_job_of_version_1() -> None:
    assert (RAY_JOB["apiVersion"], RAY_JOB["kind"]) == ("ray.io/v1", "RayJob")
    assert (CONFIG["apiVersion"], CONFIG["kind"]) == ("v1", "ConfigMap")
    assert list(unknown(RAY_JOB)) == []


@pytest.mark.parametrize("place", ["spec", "rayClusterSpec", "headGroupSpec", "workerGroupSpecs"])
def test_a_field_that_kuberay_does_not_know_is_found(place: str) -> None:
    wrong = documents()[1]
    at = wrong if place == "spec" else wrong["spec"]
    if place.endswith("Specs") or place == "headGroupSpec":
        at = at["rayClusterSpec"]
    target = at[place]
    (target[0] if isinstance(target, list) else target)["entryPoint"] = "x"
    assert list(unknown(wrong)) == ["entryPoint"]


def test_its_ray_is_ours() -> None:
    cluster = SPEC["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"]["mode"] in ("token", "disabled")
    for group in (HEAD_SPEC, HOSTS):
        for container in group["template"]["spec"]["containers"]:
            assert container["image"].endswith(f":ray-{ray.__version__}")
        assert all(isinstance(one, str) for one in group["rayStartParams"].values())


def job() -> JobConfig:
    return load_job(yaml.safe_load(CONFIG["data"]["job.yaml"]))


def test_the_job_has_as_many_hosts_as_there_may_be_pods() -> None:
    nodes = job().nodes
    assert HOSTS["minReplicas"] == nodes.min == HOSTS["replicas"]
    assert HOSTS["maxReplicas"] == nodes.max
    assert SPEC["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert HEAD_SPEC["rayStartParams"]["num-cpus"] == "0", "else it would be a host of the job"


@pytest.mark.parametrize("name", ["job.yaml", "train.sh", "leave.py"])
def test_every_pod_has_the_files(name: str) -> None:
    assert name in CONFIG["data"]
    for group in (HEAD_SPEC, HOSTS):
        pod = group["template"]["spec"]
        volumes = {one["name"]: one for one in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {one["mountPath"]: volumes[one["name"]] for one in container["volumeMounts"]}
        assert mounts["/lm"]["configMap"]["name"] == CONFIG["metadata"]["name"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in mounts["/shared"]


def test_it_trains_and_goes_on_where_a_cluster_was_lost() -> None:
    script = CONFIG["data"]["train.sh"]
    assert SPEC["entrypoint"] == "sh /lm/train.sh"
    assert SPEC["backoffLimit"] > 0
    assert 'exec elastic train /lm/job.yaml --run-dir "$run"' in script
    assert 'exec elastic resume "$run"' in script
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def test_a_pod_that_ends_leaves_first() -> None:
    source = CONFIG["data"]["leave.py"]
    compile(source, "leave.py", "exec")
    assert f"elastic-*/{job().name}.*" in source
    for group in (HEAD_SPEC, HOSTS):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        timeout, limit_s, *command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert (timeout, command) == ("timeout", ["python", "/lm/leave.py"])
        assert int(limit_s) < pod["terminationGracePeriodSeconds"]
        assert "POD_IP" in [one["name"] for one in container["env"]]
        assert container["resources"]["requests"] == container["resources"]["limits"]
