"""The whole matrix of killed drivers, workers and heads of jobs (ten minutes); `test_jobs.py` has three of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from end_to_end import job_faults


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.timeout(3600)
def test_every_job_that_lost_something_ends_as_if_it_had_not(tmp_path: Path) -> None:
    outcomes = job_faults.play_all(job_faults.MATRIX, tmp_path)
    assert [job_faults.row(outcome) for outcome in outcomes if not job_faults.is_good(outcome)] == []
