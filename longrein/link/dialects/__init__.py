"""The contract of a dialect: the wire format of an older system, both ends. Which exist stands in the table.

A dialect's server half is a listener like a transport's: it turns what foreign clients say into the link's messages, so
that the allow list, the limits, the workers and the reaping of the server hold for them too. Its client half is a
`gymnasium.Env` over an existing server of the older system.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import gymnasium

from longrein.errors import ConnectError, SpecError
from longrein.link.transports import Address, Listener, ListenOptions


@dataclass(frozen=True)
class Dialect:
    """One line of the table."""

    module: str
    scheme: str  # of the URLs at which a client finds an existing server
    at: tuple[str, ...]  # schemes at which its server half can listen
    default_at: str
    extra: str | None = None  # the extra of the package that brings what it needs

    def load(self) -> DialectModule:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if self.extra is None or (error.name or "").startswith("longrein"):
                raise
            raise ConnectError(
                f"{self.scheme}:// needs the package {error.name!r}", hint=f"pip install 'longrein[{self.extra}]'"
            ) from error


class DialectModule(Protocol):
    """What a dialect's module offers."""

    listen: Callable[[Address, ListenOptions], Listener]
    connect: Callable[..., gymnasium.Env[Any, Any]]  # connect(url, **options); a DialectEnv
    spread: Callable[[str, int], list[str]]  # the URLs over which a vector environment of so many is spread


class DialectEnv(Protocol):
    """A client's environment, whose step and reset can be begun for many before the first is waited for."""

    def post_step(self, action: Any) -> None:
        """Send a step; the next `step` call takes its answer, whatever its argument."""

    def post_reset(self, seed: int | None) -> None:
        """Send a reset; the next `reset` call takes its answer."""


TABLE: dict[str, Dialect] = {
    "gymie": Dialect("longrein.link.dialects.gymie", "gymie", ("ws", "wss"), "ws://127.0.0.1:5000/gym"),
    "gym-nats": Dialect(
        "longrein.link.dialects.gym_nats", "gym-nats", ("nats", "tls"), "nats://127.0.0.1:4222", extra="nats"
    ),
    "multiserver": Dialect(
        "longrein.link.dialects.multiserver", "multiserver", ("http", "https"), "http://127.0.0.1:18000"
    ),
}


def dialect_named(name: str, schemes: list[str]) -> Dialect:
    """The dialect of that name, to listen at URLs of those schemes. Raises SpecError."""
    dialect = TABLE.get(name)
    if dialect is None:
        raise SpecError("dialect", f"{name!r} is none of {', '.join(TABLE)}", hint="leave it out for longrein's own")
    for scheme in schemes:
        if scheme not in dialect.at:
            raise SpecError("at", f"{name} is not spoken at {scheme}://", hint=f"as in --at {dialect.default_at}")
    return dialect


def dialect_of(url: str) -> Dialect | None:
    """The dialect whose servers are found at such a URL; None for the link's own."""
    scheme = urlsplit(url).scheme
    return next((dialect for dialect in TABLE.values() if dialect.scheme == scheme), None)
