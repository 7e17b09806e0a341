"""cluster.yaml and jobs/rayjob.yaml are what their tools take, with the versions of constraints.txt and room for a run.

`ray up` is checked by the launcher's own code: its schema, its defaults, and its preparation for AWS, with an AWS that
is simulated in this process. KubeRay's schema does not come with Ray; the models below are strict and hold the fields
of its reference (https://docs.ray.io/en/master/cluster/kubernetes/references/api.html) that the manifest uses. Where
`NPEFF_SHARED_DATA` has KubeRay's own schema, the manifest is compared with it, too.
"""

from __future__ import annotations

import copy
import gzip
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from npeff.runs.config import RunConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
PYTHON = "py311"


def document(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The run file that both are made for."""
    monkeypatch.setenv("NPEFF_BUCKET", "a-bucket")
    return RunConfig.from_yaml(ROOT / "jobs/sst2-on-gpus.yaml")


# ray up


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The launcher's module, where AWS is simulated and home is a folder of the test."""
    moto = pytest.importorskip("moto")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.chdir(ROOT)
    (tmp_path / ".ssh").mkdir()
    with moto.mock_aws():
        from ray.autoscaler._private import util
        from ray.autoscaler._private.aws import config

        monkeypatch.setattr(config.time, "sleep", lambda seconds: None)  # for what AWS takes to tell all its machines
        yield util


def test_the_launcher_takes_the_cluster_file(launcher: Any) -> None:
    prepared = launcher.prepare_config(document("cluster.yaml"))
    launcher.validate_config(prepared)
    workers = {name: kind for name, kind in prepared["available_node_types"].items() if name != "head"}
    assert all(kind["min_workers"] == 0 for kind in workers.values()), "it scales from nothing"
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    assert "spot" in str(workers["gpu-spot"]["node_config"]["InstanceMarketOptions"])
    assert workers["gpu-spot"]["priority"] > workers["gpu-on-demand"]["priority"]
    wrong = copy.deepcopy(prepared) | {"idle_timeout": 5}
    with pytest.raises(Exception, match="idle_timeout"):
        launcher.validate_config(wrong)


@pytest.mark.slow
def test_the_launcher_prepares_it_for_aws_and_the_machines_have_what_it_says(launcher: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    written = document("cluster.yaml")
    with_role = copy.deepcopy(written)  # the simulation takes half a minute to know the policies of one made anew
    with_role["available_node_types"]["head"]["node_config"]["IamInstanceProfile"] = {"Name": "a-role"}
    prepared = bootstrap_aws(launcher.prepare_config(with_role))
    for kind in prepared["available_node_types"].values():
        assert kind["node_config"]["SubnetIds"]
        assert kind["node_config"]["SecurityGroupIds"]
    for kind in prepared["available_node_types"].values():
        kind["resources"] = {}
    found = AWSNodeProvider.fillout_available_node_types_resources(prepared)["available_node_types"]
    for name, kind in written["available_node_types"].items():
        assert {resource: found[name]["resources"].get(resource, 0) for resource in kind["resources"]} == (
            kind["resources"] if name != "head" else {"CPU": 4}
        )


def test_the_nodes_of_ray_up_hold_the_run(run: RunConfig) -> None:
    kinds = document("cluster.yaml")["available_node_types"]
    for name, most in (("gpu-spot", run.executor.workers), ("gpu-on-demand", run.executor.workers)):
        assert kinds[name]["resources"]["CPU"] >= run.executor.cpus_per_worker
        assert kinds[name]["resources"]["GPU"] >= run.executor.gpus_per_worker
        assert kinds[name]["max_workers"] * (kinds[name]["resources"]["GPU"] // run.executor.gpus_per_worker) >= most
    assert document("cluster.yaml")["max_workers"] >= run.executor.workers
    assert kinds["head"]["resources"] == {"CPU": 0}, "no worker of a run is placed on a machine without a GPU"


def test_ray_up_installs_the_checkout_and_starts_with_the_token() -> None:
    cluster = document("cluster.yaml")
    install = " ".join(cluster["setup_commands"])
    folder = next(path for path, source in cluster["file_mounts"].items() if source == ".")
    assert f"cd {folder} && pip install --constraint constraints.txt" in install
    assert "~/.ray/auth_token" in cluster["file_mounts"].values()
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in commands[-1]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_start_commands_are_ones_that_ray_takes(role: str) -> None:
    from ray.scripts.scripts import start

    command = document("cluster.yaml")[f"{role}_start_ray_commands"][-1].partition("ray start ")[2]
    start.make_context("start", shlex.split(command))  # raises for an option that does not exist


# Versions


def test_versions_are_those_of_the_constraints() -> None:
    cluster, job = document("cluster.yaml"), document("jobs/rayjob.yaml")
    tag = f"{PINS['ray']}-{PYTHON}"
    assert cluster["docker"]["head_image"] == f"rayproject/ray:{tag}"
    assert cluster["docker"]["worker_image"] == f"rayproject/ray:{tag}-gpu"
    dockerfile = (ROOT / "jobs/Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE) == [f"rayproject/ray:{tag}"]
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    image = f"registry.example.com/npeff-pipeline:{version}-ray{PINS['ray']}"
    assert {container["image"] for container in containers(job)} == {image}
    assert f"-t {image} ." in dockerfile
    for source in re.findall(r"^COPY --chown=\S+ (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


# KubeRay


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class Named(Strict):
    name: Name


class Optional(Named):
    optional: bool = False


class EnvironmentSource(Strict):
    configMapRef: Named | None = None
    secretRef: Optional | None = None


class Variable(Strict):
    name: str
    value: str


class Capabilities(Strict):
    drop: list[str]


class ContainerSecurity(Strict):
    allowPrivilegeEscalation: bool
    capabilities: Capabilities


class Seccomp(Strict):
    type: Literal["RuntimeDefault", "Localhost"]


class PodSecurity(Strict):
    runAsNonRoot: bool
    runAsUser: Annotated[int, Field(gt=0)]
    runAsGroup: int
    fsGroup: int
    seccompProfile: Seccomp


class Port(Strict):
    name: Annotated[str, Field(max_length=15)]
    containerPort: Annotated[int, Field(gt=0, lt=65536)]


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class VolumeMount(Strict):
    name: Name
    mountPath: Annotated[str, Field(pattern="^/")]
    readOnly: bool = False


class Container(Strict):
    name: Name
    image: str
    securityContext: ContainerSecurity
    envFrom: list[EnvironmentSource] = []
    env: list[Variable] = []
    ports: list[Port] = []
    resources: Resources
    volumeMounts: list[VolumeMount] = []


class EmptyDir(Strict):
    sizeLimit: Quantity


class Volume(Strict):
    name: Name
    configMap: Named | None = None
    emptyDir: EmptyDir | None = None


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Strict):
    serviceAccountName: Name
    automountServiceAccountToken: bool = True
    securityContext: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(Strict):
    groupName: Name
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=1)]
    rayStartParams: dict[str, str]
    template: PodTemplate


class AuthOptions(Strict):
    mode: Literal["disabled", "token"]


class AutoscalerOptions(Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int
    securityContext: ContainerSecurity


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class SubmitterConfig(Strict):
    backoffLimit: Annotated[int, Field(ge=0)]


class RayJobSpec(Strict):
    entrypoint: str
    submitterConfig: SubmitterConfig
    activeDeadlineSeconds: Annotated[int, Field(gt=0)]
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: Annotated[int, Field(ge=0)]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    runtimeEnvYAML: str
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Named
    spec: RayJobSpec


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


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
    cluster = RayJob.model_validate(document("jobs/rayjob.yaml")).spec.rayClusterSpec
    pods = [group.template.spec for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]
    assert cluster.autoscalerOptions.securityContext == pods[0].containers[0].securityContext
    for pod in pods:
        assert pod.securityContext.runAsNonRoot
        for container in pod.containers:
            assert not container.securityContext.allowPrivilegeEscalation
            assert container.securityContext.capabilities.drop == ["ALL"]
            assert "ephemeral-storage" in container.resources.limits
            assert {mount.name for mount in container.volumeMounts} == {volume.name for volume in pod.volumes}
            (folder,) = [mount.mountPath for mount in container.volumeMounts if mount.name == "cache"]
            assert container.env[0].value.startswith(folder)
    head, *workers = pods
    assert "SPOT" not in head.nodeSelector.values(), "the cluster is lost with its head"
    assert not any(worker.automountServiceAccountToken for worker in workers)
    assert "ON_DEMAND" in workers[-1].nodeSelector.values()


SCHEMA = Path(os.environ.get("NPEFF_SHARED_DATA", "")) / "data/kuberay/ray.io_rayjobs.yaml.gz"


def strict(schema: Any) -> Any:
    """A schema that refuses unknown fields, which the server of Kubernetes drops silently."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: strict(each) for name, each in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.mark.skipif(not SCHEMA.is_file(), reason="NPEFF_SHARED_DATA names no folder with the schema of KubeRay")
def test_the_rayjob_has_the_schema_of_kuberay() -> None:
    definition = yaml.load(gzip.decompress(SCHEMA.read_bytes()), yaml.CSafeLoader)  # the other loader takes 15 s
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    job = document("jobs/rayjob.yaml")
    jsonschema.validate(job, schema)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["securityContexts"] = head["containers"][0].pop("securityContext")
    with pytest.raises(jsonschema.ValidationError, match="'securityContexts' was unexpected"):
        jsonschema.validate(job, schema)


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
