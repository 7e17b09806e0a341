"""Ray's token authentication, for this process and the processes that it starts.

Ray reads the mode and the token from the environment and from ``~/.ray/auth_token`` on import or on first use, and
caches them. The servers that a process starts read them again. If the values differ, process and servers refuse each
other's requests. Code that changes the environment must therefore make Ray read it again; `Authentication.use` does so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"


@dataclass(frozen=True)
class Authentication:
    """Authentication settings of the environment. None means Ray's default."""

    mode: str | None
    token: str | None = None

    @classmethod
    def current(cls) -> Authentication:
        return cls(os.environ.get(_MODE), os.environ.get(_TOKEN))

    def use(self) -> None:
        """Apply these settings to this process and to the processes that it starts from now on."""
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        for name, value in ((_MODE, self.mode), (_TOKEN, self.token)):
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
