"""The fields of RayJob that the manifest uses, as strict models, and the schema of KubeRay where it is at hand.

The schema does not come with Ray. The models hold the fields of its reference
(https://docs.ray.io/en/master/cluster/kubernetes/references/api.html). `NPEFF_SHARED_DATA` may have KubeRay's own.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

SCHEMA = Path(os.environ.get("NPEFF_SHARED_DATA", "")) / "data/kuberay/ray.io_rayjobs.yaml.gz"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]


class Named(Strict):
    name: Name


class Source(Named):
    optional: bool = False


class EnvironmentSource(Strict):
    configMapRef: Named | None = None
    secretRef: Source | None = None


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
    serviceAccountName: Name = "default"
    automountServiceAccountToken: bool = True
    restartPolicy: Literal["Always", "OnFailure", "Never"] = "Always"
    securityContext: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []


class PodMetadata(Strict):
    annotations: dict[str, str]


class PodTemplate(Strict):
    metadata: PodMetadata | None = None
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
    preRunningDeadlineSeconds: Annotated[int, Field(gt=0)]
    activeDeadlineSeconds: Annotated[int, Field(gt=0)]
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: Annotated[int, Field(ge=0)]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    runtimeEnvYAML: str
    submitterPodTemplate: PodTemplate
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Named
    spec: RayJobSpec


def schema_of_kuberay() -> dict[str, Any]:
    """The schema, with fields that it does not have refused; the server of Kubernetes drops them silently."""
    definition = yaml.load(gzip.decompress(SCHEMA.read_bytes()), yaml.CSafeLoader)  # the other loader takes 15 s
    (version,) = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(each) for name, each in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made
