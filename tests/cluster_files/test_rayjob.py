"""jobs/rayjob.yaml is what KubeRay takes, has room for a run, and is what a strict namespace admits."""

from __future__ import annotations

import jsonschema
import pytest
import yaml
from cluster_files.kuberay import SCHEMA, RayJob, schema_of_kuberay
from cluster_files.manifests import document
from npeff.runs.config import RunConfig
from pydantic import ValidationError


def test_the_rayjob_has_the_fields_of_kuberay() -> None:
    written = document("jobs/rayjob.yaml")
    job = RayJob.model_validate(written)
    assert job.spec.rayClusterSpec.authOptions.mode == "token"
    assert job.spec.shutdownAfterJobFinishes
    pod = job.spec.rayClusterSpec.headGroupSpec.template.spec
    assert {mount.name for mount in pod.containers[0].volumeMounts} == {volume.name for volume in pod.volumes}
    written["spec"]["shutdownAfterJobFinished"] = True
    with pytest.raises(ValidationError, match="shutdownAfterJobFinished"):
        RayJob.model_validate(written)


def test_a_strict_namespace_admits_the_pods_of_the_rayjob() -> None:
    """The Pod Security Standard "restricted", and what a platform wants besides."""
    spec = RayJob.model_validate(document("jobs/rayjob.yaml")).spec
    cluster, submitter = spec.rayClusterSpec, spec.submitterPodTemplate.spec  # KubeRay's own one is not admitted
    pods = [group.template.spec for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]
    assert cluster.autoscalerOptions.securityContext == pods[0].containers[0].securityContext
    for pod in (submitter, *pods):
        assert pod.securityContext.runAsNonRoot
        for container in pod.containers:
            assert not container.securityContext.allowPrivilegeEscalation
            assert container.securityContext.capabilities.drop == ["ALL"]
            assert "ephemeral-storage" in container.resources.limits
    for pod in pods:
        for container in pod.containers:
            assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
            (folder,) = [mount.mountPath for mount in container.volumeMounts if mount.name == "cache"]
            assert container.env[0].value.startswith(folder)
    head, *workers = pods
    assert "SPOT" not in head.nodeSelector.values(), "the cluster is lost with its head"
    assert "ON_DEMAND" in head.nodeSelector.values()
    assert cluster.headGroupSpec.template.metadata is not None
    assert not any(pod.automountServiceAccountToken for pod in (submitter, *workers))
    assert "ON_DEMAND" in workers[-1].nodeSelector.values()


@pytest.mark.skipif(not SCHEMA.is_file(), reason="NPEFF_SHARED_DATA names no folder with the schema of KubeRay")
def test_the_rayjob_has_the_schema_of_kuberay() -> None:
    schema = schema_of_kuberay()
    job = document("jobs/rayjob.yaml")
    jsonschema.validate(job, schema)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["securityContexts"] = head["containers"][0].pop("securityContext")
    with pytest.raises(jsonschema.ValidationError, match="'securityContexts' was unexpected"):
        jsonschema.validate(job, schema)


def test_a_mistake_is_not_repeated_and_nothing_waits_for_ever() -> None:
    """KubeRay repeats a run on a new cluster whatever its exit code was, and never after a deadline."""
    spec = RayJob.model_validate(document("jobs/rayjob.yaml")).spec
    assert spec.backoffLimit == 0
    assert spec.submissionMode == "K8sJobMode", "its submitter asks first whether the job is there"
    assert spec.submitterPodTemplate.spec.restartPolicy == "Never"
    assert spec.preRunningDeadlineSeconds < spec.activeDeadlineSeconds
    assert spec.shutdownAfterJobFinishes


def test_the_rayjob_runs_the_command_on_the_file_it_mounts() -> None:
    from ray.runtime_env import RuntimeEnv

    spec = RayJob.model_validate(document("jobs/rayjob.yaml")).spec
    mount = spec.rayClusterSpec.headGroupSpec.template.spec.containers[0].volumeMounts[0]
    assert spec.entrypoint == f"npeff run {mount.mountPath}/run.yaml"
    RuntimeEnv(**yaml.safe_load(spec.runtimeEnvYAML))


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_start_parameters_are_ones_that_ray_takes(role: str) -> None:
    from ray.scripts.scripts import start

    cluster = document("jobs/rayjob.yaml")["spec"]["rayClusterSpec"]
    group = cluster["headGroupSpec"] if role == "head" else cluster["workerGroupSpecs"][0]
    flags = {option.opts[0] for option in start.params if option.is_flag}
    # as KubeRay writes them: flags alone, where they are true
    words = [
        f"--{key}" if f"--{key}" in flags else f"--{key}={value}" for key, value in group["rayStartParams"].items()
    ]
    start.make_context("start", ["--head", *words] if role == "head" else ["--address=head:6379", *words])


def test_the_pods_of_the_rayjob_hold_the_run(run: RunConfig) -> None:
    cluster = RayJob.model_validate(document("jobs/rayjob.yaml")).spec.rayClusterSpec
    group, on_demand = cluster.workerGroupSpecs
    assert on_demand.template.spec.containers == group.template.spec.containers
    requests = group.template.spec.containers[0].resources.requests
    assert requests == group.template.spec.containers[0].resources.limits
    assert int(requests["cpu"]) >= run.executor.cpus_per_worker
    assert int(requests["nvidia.com/gpu"]) == int(group.rayStartParams["num-gpus"]) >= run.executor.gpus_per_worker
    assert group.maxReplicas * (int(requests["nvidia.com/gpu"]) // run.executor.gpus_per_worker) >= run.executor.workers
    assert (group.replicas, group.minReplicas) == (0, 0), "it scales from nothing"
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    assert run.run_dir.startswith("s3://"), "pods share no disk"
