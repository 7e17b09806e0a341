"""A solver's node is lost, and another one comes: it goes on with fewer workers, then with more, to the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
from end_to_end import cluster_faults
from end_to_end.commands import printed

pytestmark = [pytest.mark.process, pytest.mark.slow]  # a cluster of three nodes is started several times


@pytest.mark.timeout(600)
def test_a_node_is_lost_and_another_comes_and_the_losses_are_the_undisturbed_ones(tmp_path: Path) -> None:
    found = printed("end_to_end.cluster_faults", tmp_path)
    assert found["token_authentication"]
    events = [event for event, _ in found["events"]]
    assert events[0] == "node removed"
    assert "restarting the workers from iteration" in events[1]
    assert events[-2].startswith("more workers are available")
    assert events[-1].startswith("resuming from iteration")
    assert "node added" in events
    sent = found["sent_bytes"]
    assert 0 in sent, "one worker has nobody to send to"
    assert sent[0] == sent[-1] > 0
    assert found["n_iterations"] == [cluster_faults.ITERATIONS] * 2
    assert found["largest_difference_of_losses"] < 1e-6


@pytest.mark.timeout(600)
def test_places_that_were_lost_are_asked_for_again_so_that_an_autoscaler_starts_nodes() -> None:
    assert printed("end_to_end.lost_nodes") == {
        "whole": 0,
        "without nodes": 2,
        "places with one node": 1,
        "with one node": 1,
        "can be larger with one node": False,
        "places with two nodes": 2,
        "with two nodes": 0,
    }
