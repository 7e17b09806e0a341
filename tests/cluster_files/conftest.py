from __future__ import annotations

import pytest
from cluster_files.manifests import ROOT
from npeff.runs.config import RunConfig


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The run file that the clusters are made for."""
    monkeypatch.setenv("NPEFF_BUCKET", "a-bucket")
    return RunConfig.from_yaml(ROOT / "jobs/sst2-on-gpus.yaml")
