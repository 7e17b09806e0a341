"""cluster.yaml is what `ray up` takes, has room for a run, and is what a platform with rules admits.

It is checked by the launcher's own code: its schema, its defaults, and its preparation for AWS, with an AWS that is
simulated in this process.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_files.manifests import ROOT, document, image
from npeff.runs.config import RunConfig


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
    prepared = bootstrap_aws(launcher.prepare_config(copy.deepcopy(written)))
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


def test_a_node_installs_nothing_and_starts_with_the_token(launcher: Any) -> None:
    prepared = launcher.prepare_config(document("cluster.yaml"))
    assert prepared["docker"]["image"] == image()
    assert not any(prepared[f"{of}setup_commands"] for of in ("", "head_", "worker_")), "Ray's defaults install"
    assert "~/.ray/auth_token" in document("cluster.yaml")["file_mounts"].values()
    for commands in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        assert "export RAY_AUTH_MODE=token" in commands[-1]
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]


def test_the_machines_have_roles_encrypted_disks_tags_and_the_second_metadata_service() -> None:
    for name, kind in document("cluster.yaml")["available_node_types"].items():
        node = kind["node_config"]
        assert node["IamInstanceProfile"]["Name"] == ("npeff-head" if name == "head" else "npeff-worker")
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
        assert [each["ResourceType"] for each in node["TagSpecifications"]] == ["instance", "volume"]
        assert all({tag["Key"] for tag in each["Tags"]} == {"project", "owner"} for each in node["TagSpecifications"])


def test_machines_as_described_are_started(launcher: Any) -> None:
    """The words are those of AWS: its client checks them, and the simulated AWS encrypts and tags the disks."""
    import boto3

    node = document("cluster.yaml")["available_node_types"]["gpu-spot"]["node_config"]
    ec2 = boto3.client("ec2", region_name="us-west-2")
    known = ec2.describe_images()["Images"][0]["ImageId"]
    role = boto3.client("iam").create_instance_profile(InstanceProfileName="npeff-worker")
    assert role["InstanceProfile"]["InstanceProfileName"] == node["IamInstanceProfile"]["Name"]
    (machine,) = ec2.run_instances(MinCount=1, MaxCount=1, **node | {"ImageId": known})["Instances"]
    (disk,) = ec2.describe_volumes(Filters=[{"Name": "attachment.instance-id", "Values": [machine["InstanceId"]]}])[
        "Volumes"
    ]
    assert disk["Encrypted"]
    assert {"Key": "project", "Value": "npeff"} in disk["Tags"]
    with pytest.raises(Exception, match="HttpToken"):
        ec2.run_instances(MinCount=1, MaxCount=1, ImageId=known, MetadataOptions={"HttpToken": "required"})


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_start_commands_are_ones_that_ray_takes(role: str) -> None:
    from ray.scripts.scripts import start

    command = document("cluster.yaml")[f"{role}_start_ray_commands"][-1].partition("ray start ")[2]
    start.make_context("start", shlex.split(command))  # raises for an option that does not exist
