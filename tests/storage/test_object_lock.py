"""The lock of a run on an object store: one holder at a time, by the server's clock; who loses it writes no more."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from moto.s3 import models
from npeff.storage import object_lock, objects
from npeff.storage.buckets import guards
from npeff.storage.errors import ObjectStoreError, StoreError
from npeff.storage.location import location
from npeff.storage.object_lock import HeldError
from npeff.storage.object_lock import object_lock as hold
from npeff.storage.objects import put
from object_store import BROKEN, ObjectStore, Request

LOCK, FILE = "s3://runs/run/.lock", "s3://runs/run/a"
KEY = "run/.lock"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No renewal but those that a test asks for, and short waits."""
    monkeypatch.setattr(object_lock, "_POLL_S", 0.02)
    monkeypatch.setattr(object_lock, "RENEW_S", 1000.0)


def age(s3: ObjectStore, seconds: float) -> None:
    """As if the lock had not been renewed for so long."""
    s3.objects()[KEY].last_modified -= timedelta(seconds=seconds)


def guard() -> object_lock._ObjectLock:
    (found,) = guards.values()
    assert isinstance(found, object_lock._ObjectLock)
    return found


def test_it_is_held_while_the_body_runs_and_let_go_however_that_ends(s3: ObjectStore) -> None:
    def interrupted() -> None:
        with hold(location(LOCK), "process 1 on here"):
            assert b"process 1 on here" in s3.objects()[KEY].value
            put(location(FILE), b"")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert s3.released(KEY)
    with hold(location(LOCK), "process 2 on here"):
        assert not s3.released(KEY)
    assert s3.released(KEY)


def test_a_renewed_lock_refuses_another_holder_by_name(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_lock, "RENEW_S", 0.05)
    with (
        hold(location(LOCK), "process 1 on here"),
        pytest.raises(HeldError, match="process 1 on here"),
        hold(location(LOCK), "process 2 on there"),
    ):
        raise AssertionError


def test_a_lock_that_nobody_renews_is_taken_over_and_its_holder_writes_no_more(s3: ObjectStore) -> None:
    with hold(location(LOCK), "process 1 on here"):
        first = guard()
        put(location(FILE), b"first")
        age(s3, object_lock.STALE_S + 2)
        second = object_lock._ObjectLock(location(LOCK), "process 2 on there")
        second.acquire()
        first._renew()
        with pytest.raises(ObjectStoreError, match=r"another process \(process 2 on there"):
            put(location(FILE), b"second")
        with pytest.raises(ObjectStoreError, match="another process"):
            location(FILE).unlink()
        put(location("s3://runs/another run/a"), b"")
    assert s3.objects()["run/a"].value == b"first"
    assert b"process 2" in s3.objects()[KEY].value, "the loser leaves the lock to its holder"
    second.release()
    assert s3.released(KEY)


def test_an_error_after_a_loss_is_that_of_the_loss(s3: ObjectStore) -> None:
    """The new holder may have deleted the file that the former one reads."""

    def overtaken() -> None:
        with hold(location(LOCK), "process 1 on here"):
            age(s3, object_lock.STALE_S + 2)
            object_lock._ObjectLock(location(LOCK), "process 2 on there").acquire()
            location(FILE).read_bytes()

    with pytest.raises(ObjectStoreError, match=r"another process \(process 2 on there"):
        overtaken()


def test_an_error_without_a_loss_stays_as_it_is(s3: ObjectStore) -> None:
    with pytest.raises(StoreError, match="of the body"), hold(location(LOCK), "process 1 on here"):
        raise StoreError("of the body", "mend it", path=location(FILE))
    assert s3.released(KEY)


def test_of_two_that_take_it_over_one_succeeds(s3: ObjectStore) -> None:
    left = object_lock._ObjectLock(location(LOCK), "killed")
    left.acquire()
    age(s3, object_lock.STALE_S + 2)
    one, other = (object_lock._ObjectLock(location(LOCK), name) for name in ("one", "other"))
    found = other._look()
    assert found is not None
    one.acquire()
    assert not other._put(found.version)


def test_of_two_that_take_what_was_released_one_succeeds(s3: ObjectStore) -> None:
    with hold(location(LOCK), "process 1 on here"):
        pass
    one, other = (object_lock._ObjectLock(location(LOCK), name) for name in ("one", "other"))
    found = other._look()
    assert found is not None
    assert found.token == ""
    one.acquire()
    assert not other._put(found.version)
    one.release()
    other._lost_to = None
    other.acquire()
    one.release()
    assert not s3.released(KEY), "who has released it does not release that of the next"
    other.release()


def test_a_younger_lock_is_waited_for_until_it_is_old(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_lock, "STALE_S", 1.0)
    object_lock._ObjectLock(location(LOCK), "killed").acquire()
    with hold(location(LOCK), "process 2 on here"):
        assert b"process 2" in s3.objects()[KEY].value


@pytest.mark.parametrize("behind_s", [-7200, 7200])
def test_the_clock_of_this_machine_plays_no_part(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, behind_s: float
) -> None:
    now = models.utcnow
    monkeypatch.setattr(models, "utcnow", lambda: now() - timedelta(seconds=behind_s))  # the server's clock
    lock = object_lock._ObjectLock(location(LOCK), "process 1 on here")
    lock.acquire()
    found = lock._look()
    assert found is not None
    assert abs(lock._age_s(found)) <= 2
    age(s3, 30)
    found = lock._look()
    assert found is not None
    assert 28 <= lock._age_s(found) <= 32


def test_an_answer_that_was_lost_is_recognised(s3: ObjectStore) -> None:
    lock = object_lock._ObjectLock(location(LOCK), "process 1 on here")
    lock.acquire()
    version = lock._version
    lock._renew()
    lock._version = version  # as if the answer had not come, and obstore had asked again
    lock._renew()
    lock._renew()
    assert lock._lost_to is None
    lock.acquire()
    lock.release()
    assert s3.released(KEY)


def test_a_holder_that_cannot_renew_waits_and_then_stops(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_lock, "STALE_S", 0.2)

    def of_the_lock(request: Request) -> bool:
        return request.key == KEY and request.method == "PUT"

    with hold(location(LOCK), "process 1 on here"):
        guard()._renewed_at -= 1
        with s3.failing(BROKEN, of_the_lock), pytest.raises(ObjectStoreError, match="could not be renewed"):
            put(location(FILE), b"")
        guard()._renew()
        put(location(FILE), b"")


def test_an_upload_in_parts_is_not_completed_after_the_lock_is_lost(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class LostAfterTwoParts:
        def confirm(self) -> None:
            asked.append(len(asked))
            if len(asked) > 2:
                raise ObjectStoreError("another process took over")

    monkeypatch.setattr(objects, "PART_BYTES", 5 * 2**20)
    monkeypatch.setitem(guards, "s3://runs/run/", LostAfterTwoParts())
    with pytest.raises(ObjectStoreError, match="took over"):
        put(location(FILE), bytes(21 * 2**20))
    assert "run/a" not in s3.objects()


@pytest.mark.process
def test_it_holds_between_processes(s3: ObjectStore, tmp_path: Path) -> None:
    script = (
        "import sys, npeff.storage.object_lock as l; from npeff.storage.location import location\n"
        "l._POLL_S = 0.02\n"
        f"try:\n with l.object_lock(location({LOCK!r}), 'process 2'): pass\n"
        "except l.HeldError as error: sys.exit(f'held by {error}')"
    )
    with hold(location(LOCK), "process 1"):
        other = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
        while other.poll() is None:
            guard()._renew()
            time.sleep(0.01)
        assert other.stderr is not None
        said = other.stderr.read()
        assert "held by process 1" in said
        waiting = r"waiting for the lock of s3://runs/run: unless process 1 renews it, it is free in (59|60) s\n"
        assert re.match(waiting, said), said
