"""Ray's token authentication, of this process and of what it starts.

Ray reads the mode and the token from the environment and from ``~/.ray/auth_token`` when it is imported or first asks,
and keeps what it found; the servers that a process starts read them anew. Where the two differ, each refuses the other.
So whoever changes the environment lets Ray read it again, here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

_MODE, _TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"


@dataclass(frozen=True)
class Authentication:
    """What the environment says; None is what Ray does by itself."""

    mode: str | None
    token: str | None = None

    @classmethod
    def current(cls) -> Authentication:
        return cls(os.environ.get(_MODE), os.environ.get(_TOKEN))

    def use(self) -> None:
        """Have it from now on, for what is started too."""
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        for name, value in ((_MODE, self.mode), (_TOKEN, self.token)):
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
