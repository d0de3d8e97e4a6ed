"""A server at each transport, for the tests that hold all of them to the same contract."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import longrein

if TYPE_CHECKING:
    from longrein.link.transports.nats_broker import Broker

# Started in the background of a shell, this process would ignore Ctrl-C, and so would the servers that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TRANSPORTS = ("memory", "websocket", "unix", "http", "nats")
Serve = Callable[..., longrein.Server]


@pytest.fixture(scope="session")
def broker() -> Iterator[Broker]:
    """A real broker of this run's own, on a free port."""
    from longrein.link.transports.nats_broker import start_broker

    with start_broker() as broker:
        yield broker


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """The name of each transport in turn."""
    return str(request.param)


@pytest.fixture
def address(transport: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Where to listen by that transport."""
    match transport:
        case "memory":
            return f"memory://{tmp_path.name}"
        case "websocket":
            return "ws://127.0.0.1:0"
        case "unix":
            return f"ws+unix://{tmp_path}/s"
        case "http":
            return "http://127.0.0.1:0"
        case "nats":
            broker: Broker = request.getfixturevalue("broker")
            return f"{broker.url}/{tmp_path.name}"
    raise AssertionError(transport)


@pytest.fixture
def serve(address: str) -> Iterator[Serve]:
    """Start a server there: `serve(things, **options)`; it is closed when the test ends."""
    servers: list[longrein.Server] = []

    def start(things: Any, **options: Any) -> longrein.Server:
        servers.append(longrein.Server(things, at=address, **options).start())
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def env_url(server: longrein.Server, env: str = "") -> str:
    """The URL of one environment at a server."""
    url = server.urls[0]
    if not env:
        return url
    return f"{url}:/{env}" if "+unix" in url else f"{url}/{env}"
