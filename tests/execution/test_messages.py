"""What Ray prints of its servers: messages without the notes in their logs."""

from __future__ import annotations

import pytest
from npeff.execution.ray.messages import shorten_messages, without_notes
from ray._private import worker

HEADING = "Raylet is terminated. Termination is unexpected. Last 20 lines of the Raylet logs:"
ERROR = "    [2026-12-01 15:42:40,530 E 17161 17161] (raylet) agent_manager.cc:86: The raylet exited: an agent failed."
ENDED = f"""{HEADING}
    [state-dump] 	NodeManager.deadline_timer - 1 total (1 active), Execution time: mean = 0.00ms, total = 0.00ms
    [state-dump]\x20
    [2026-12-01 15:42:40,506 I 17161 17161] (raylet) accessor.cc:475: Received address and liveness notification
    Global stats: 11 total (10 active)

{ERROR}
      with a second line
    [2026-12-01 15:42:41,359 W 17161 17161] (raylet) worker_pool.cc:564: Started worker process with pid 17531
"""


def test_errors_are_kept_and_notes_are_not() -> None:
    assert without_notes(ENDED) == f"{HEADING}\n{ERROR}\n      with a second line"
    notes = "\n".join(ENDED.splitlines()[:3])
    assert without_notes(notes) == "Raylet is terminated. Termination is unexpected."
    for message in ("1 Workers (tasks / actors) killed due to memory pressure (OOM)", "a [b] c\n  d", ""):
        assert without_notes(message) == message


def test_a_message_is_printed_once_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)  # put back after the test
    shorten_messages()
    for _ in range(2):  # as Ray's listener calls it
        worker.print_to_stdstream({"lines": [ENDED], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count(HEADING) == err.count("an agent failed") == 1
    assert "state-dump" not in err
    assert "accessor.cc" not in err
