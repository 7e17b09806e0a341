"""The whole matrix of killed drivers, workers and heads of jobs, on request; `test_jobs.py` has three of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from end_to_end import job_faults


@pytest.mark.skipif(
    os.environ.get("NPEFF_SLOW_TESTS") != "1",
    reason="kills 18 jobs or their clusters, and lets them be resumed, ten minutes: set NPEFF_SLOW_TESTS=1",
)
@pytest.mark.timeout(3600)
def test_every_job_that_lost_something_ends_as_if_it_had_not(tmp_path: Path) -> None:
    outcomes = job_faults.play_all(job_faults.MATRIX, tmp_path)
    assert [job_faults.row(outcome) for outcome in outcomes if not job_faults.is_good(outcome)] == []
