"""What the lock of a run does on the object store of every provider."""

from __future__ import annotations

from pathlib import Path

import pytest
from npeff.storage import object_lock
from npeff.storage.errors import ObjectStoreError


def assert_a_lock_changes_hands(lock: Path) -> None:
    """It is held by one process, released, and held by another one, which the first one notices."""
    one, other = (object_lock._ObjectLock(lock, name) for name in ("one", "other"))
    one.acquire()
    found = other._look()
    assert found is not None
    assert found.owner == "one"
    assert abs(other._age_s(found)) <= 2
    one._renew()
    assert not other._put(found.version), "it was renewed since"
    one.release()
    other.acquire()
    one._renew()
    with pytest.raises(ObjectStoreError, match="another process"):
        one.confirm()
    other.release()
