"""A Ray of this process alone."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import psutil
import pytest
import ray
from npeff.execution.executor import ExecutorError
from npeff.execution.ray.authentication import Authentication
from npeff.execution.ray.executor import RayExecutor
from npeff.execution.ray.jobs import JobServer
from npeff.execution.ray.private import PrivateRay, _new_folder
from ray._raylet import AuthenticationMode, AuthenticationTokenLoader, get_authentication_mode

pytestmark = pytest.mark.ray

HERS = "0" * 64


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a token that this process has read, as another command of the same user left it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(HERS)
    Authentication.current().use()
    assert AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    return tmp_path


@pytest.mark.parametrize(
    "mode", [pytest.param(None, marks=pytest.mark.slow), pytest.param("token", marks=pytest.mark.slow), "disabled"]
)
def test_it_has_a_token_of_its_own_whatever_others_say_meanwhile(
    home: Path, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / ".ray/auth_token").write_text("1" * 64)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)  # of which this process's Ray does not know
    private = PrivateRay(1)
    try:
        token = os.environ["RAY_AUTH_TOKEN"]
        assert token not in (HERS, "1" * 64)
        assert get_authentication_mode() == AuthenticationMode.TOKEN
        assert ray.get(ray.remote(os.getenv).remote("RAY_AUTH_TOKEN")) == token
        servers = [process for process in psutil.Process().children() if process.name() in ("gcs_server", "raylet")]
        assert len(servers) == 2
        heard = {
            at.laddr.ip.removeprefix("::ffff:")
            for server in servers
            for at in server.net_connections("inet")
            if at.status == "LISTEN"
        }
        assert heard == {"127.0.0.1"}
        assert private.dead_server() is None
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        assert session.is_dir()
        folder = session.parents[1]
        assert folder.name.startswith("ray-")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        private.close()
    assert not folder.exists()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ.get("RAY_AUTH_MODE") == mode
    assert not ray.is_initialized()
    assert (home / ".ray/auth_token").read_text() == "1" * 64


TOO_LATE = Exception("The current node timed out during startup")
"""Ray's own exception, of no class of its own."""


@pytest.mark.parametrize(
    ("error", "n_tries"), [(RuntimeError("Failed to start GCS"), 2), (TOO_LATE, 2), (KeyboardInterrupt(), 1)]
)
def test_no_token_and_no_folder_is_left_where_it_does_not_start(
    home: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, n_tries: int
) -> None:
    folders: list[Path] = []

    def init(*, _temp_dir: str, **options: object) -> None:
        assert "RAY_AUTH_TOKEN" in os.environ
        folders.append(Path(_temp_dir))
        (Path(_temp_dir) / "session/logs").mkdir(parents=True, exist_ok=True)
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(type(error)):
        PrivateRay(1)
    assert len(folders) == n_tries
    assert not folders[0].parent.exists()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_ray_that_starts_too_late_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise TOO_LATE

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ExecutorError, match=r"^cannot start Ray on this machine \(The current node timed out"):
        RayExecutor("local", workers=1, cpus_per_worker=1, gpus_per_worker=0.0, timeout_s=60.0)


@pytest.mark.parametrize("length", [5, 200])
def test_the_paths_of_its_sockets_are_never_too_long(home: Path, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    with tempfile.TemporaryDirectory(prefix="n", dir="/tmp") as parent:
        monkeypatch.setenv("RAY_TMPDIR", f"{parent}/{'x' * length}")
        with _new_folder() as folder:
            assert len(folder) < 40
            assert (Path(folder).parent.name == "x" * length) == (length == 5)
    assert not Path(folder).exists()


@pytest.mark.parametrize("token", [None, ""])
def test_a_missing_or_empty_token_is_one_line(home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None) -> None:
    (home / ".ray/auth_token").unlink()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    Authentication.current().use()
    try:
        with pytest.raises(ExecutorError, match=r"has the authentication token of the cluster$") as caught:
            JobServer("http://127.0.0.1:1")
        assert len(str(caught.value).splitlines()) == 1
    finally:
        Authentication(None).use()
