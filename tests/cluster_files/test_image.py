"""The image and the versions are those of the constraints, in every file that names them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cluster_files.manifests import PINS, ROOT, document, image

PYTHON = "py311"


def test_the_image_is_made_of_that_of_ray_and_has_the_libraries_of_cuda_once() -> None:
    dockerfile = (ROOT / "jobs/Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert base == f"rayproject/ray:{PINS['ray']}-{PYTHON}", "with -gpu it has CUDA, as the packages of torch have"
    assert "--constraint constraints.txt '.[hf,s3]'" in dockerfile
    assert f"-t {image()} ." in dockerfile
    for source in re.findall(r"^COPY --chown=\S+ (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


@pytest.mark.parametrize("name", ["cluster.yaml", "jobs/rayjob.yaml", "docs/cluster.md"])
def test_every_file_names_the_image(name: str) -> None:
    named = re.findall(r"registry\.example\.com/[\w./:-]+", Path(ROOT / name).read_text(encoding="utf-8"))
    assert set(named) == {image()}


def test_the_rayjob_has_the_version_of_ray() -> None:
    assert document("jobs/rayjob.yaml")["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
