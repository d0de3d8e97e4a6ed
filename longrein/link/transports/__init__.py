"""The contract of a transport: it moves whole messages, and knows nothing of what is in them.

A message is bytes. One that begins with `{` is text (the JSON twin), any other is binary; that one byte is all that a
transport may look at. An empty message is a sign of life: the far side is still at work.

The server's half runs on an asyncio loop (but for memory), the client's half blocks: handing each step to a loop in
another thread costs more than the network does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from longrein.errors import ConnectError

if TYPE_CHECKING:
    import ssl

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Peer:
    """What a transport knows of who is at the other end."""

    address: str
    token: str | None = None  # a bearer token from a header
    certificate: str | None = None  # the subject of a verified client certificate


class Line(Protocol):
    """The server's end of one open line, or of one request where the transport has no lines (HTTP, NATS)."""

    peer: Peer
    persistent: bool  # False where a line lasts for one request only: its loss then says nothing about the client
    hears: bool  # whether a word reaches the client between its requests, too

    def route(self, lease: str) -> str:
        """Where the client must send what concerns this lease; "" where the line itself leads there."""

    def send(self, message: Buffer, *, final: bool = True) -> None:
        """Send one message. Never blocks. `final=False` marks one that is not the answer (Working, Draining)."""

    def close(self, reason: str = "") -> None:
        """Close the line. Never blocks, and may be called twice."""


class Handler(Protocol):
    """What a listener calls, always from the same thread. None of these blocks or raises."""

    def received(self, line: Line, message: Buffer) -> None:
        """A whole message came. The buffer is only valid during the call: copy what is kept."""

    def lost(self, line: Line) -> None:
        """The line is gone; nothing may be sent on it."""

    @property
    def load(self) -> int:
        """How many leases are open, so that a fleet can open the next one where it is lowest."""

    @property
    def ready(self) -> bool:
        """Whether new leases are taken: not while draining."""

    def holds(self, lease: str) -> bool:
        """Whether this lease is still open."""

    def describe(self) -> dict[str, Any]:
        """The server's version, instance, environments and limits, as plain data, for pages and discovery."""

    def metrics(self) -> bytes:
        """The counters in Prometheus' text format."""


@dataclass(frozen=True)
class ListenOptions:
    """Settings of the server's half that a transport may need."""

    max_message_bytes: int = 64 * 2**20  # a longer message is refused before memory is taken for it
    allowed_origins: tuple[str, ...] = ()  # browsers of other origins are turned away; "*" lets all in
    ssl_context: ssl.SSLContext | None = None
    credentials: dict[str, str] = field(default_factory=dict)  # for a broker: user, password, token, creds, nkey_seed
    token: str | None = None  # to show when dialling out
    instance: str = ""  # the server's own name


class Listener(Protocol):
    """The server's half."""

    url: str  # where it really listens, once started: port 0 is replaced by the real one

    async def start(self, handler: Handler) -> None:
        """Begin to listen. Raises ConnectError, with what to do, when the address cannot be had."""

    async def close(self) -> None:
        """Stop listening and close all lines. May be called twice."""


class Connection(Protocol):
    """The client's half: one open line, used by one thread at a time."""

    def send(self, message: Buffer) -> None:
        """Send one message whole. Raises ConnectionClosed, or TooLarge where the far side has said its limit."""

    def receive(self, timeout: float | None) -> bytearray | None:
        """The next whole message, in memory of its own that the caller may keep and write to.

        None when none came within `timeout` seconds (0: only what has already arrived; None: wait for ever).
        An empty bytearray is a sign of life. Raises ConnectionClosed.
        """

    def route(self, route: str, lease: str) -> None:
        """The lease that this connection serves from now on, and the route that the server's Opened gave."""

    def fileno(self) -> int:
        """Readable when something came. Messages already buffered do not show: drain with `receive(0)` first."""

    def close(self) -> None:
        """Close. May be called twice."""


@dataclass(frozen=True)
class ConnectOptions:
    """Settings of the client's half that a transport may need."""

    timeout: float = 10.0  # seconds to open the line, handshakes included
    max_message_bytes: int = 2**30
    ssl_context: ssl.SSLContext | None = None
    credentials: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # sent as a bearer token where the transport has headers
    listen: bool = False  # wait for a system that dials in, rather than dialling
    instance: str = ""  # wait for this one, whose lease is to be taken up again
    path: str = "/"  # of a WebSocket's handshake, where the server is another's


@dataclass(frozen=True)
class Address:
    """A URL, taken apart. `env` is the path: which environment to open; `options` the query: its maker's options."""

    url: str
    scheme: str
    host: str
    port: int | None
    path: str  # of a unix socket; the NAME of a NATS service or of a memory server
    env: str
    options: dict[str, str]

    @property
    def secure(self) -> bool:
        return self.scheme in ("wss", "https", "tls")


@dataclass(frozen=True)
class Transport:
    """One line of the table: where the two halves are."""

    module: str
    schemes: tuple[str, ...]
    extra: str | None = None  # the extra of the package that brings what it needs

    def load(self) -> TransportModule:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if self.extra is None or (error.name or "").startswith("longrein"):
                raise
            raise ConnectError(
                f"{self.schemes[0]}:// needs the package {error.name!r}",
                hint=f"pip install 'longrein[{self.extra}]'",
            ) from error


class TransportModule(Protocol):
    """What a transport's module offers."""

    connect: Callable[[Address, ConnectOptions], Connection]
    listen: Callable[[Address, ListenOptions], Listener]


TABLE: dict[str, Transport] = {
    "memory": Transport("longrein.link.transports.memory", ("memory",)),
    "websocket": Transport("longrein.link.transports.websocket", ("ws", "wss", "ws+unix")),
    "http": Transport("longrein.link.transports.http", ("http", "https", "http+unix")),
    "nats": Transport("longrein.link.transports.nats", ("nats", "tls"), extra="nats"),
}


def transports() -> dict[str, Transport]:
    """The table with what other packages add to it by the entry point `longrein.transports`."""
    from importlib.metadata import entry_points

    found: dict[str, Any] = {point.name: point.load() for point in entry_points(group="longrein.transports")}
    return TABLE | found


def parse_url(url: str) -> tuple[Address, Transport]:
    """Take a URL apart and find its transport. Raises ConnectError on a URL that none can serve."""
    parts = urlsplit(url)
    table = transports()
    known = {scheme: transport for transport in table.values() for scheme in transport.schemes}
    if parts.scheme not in known:
        raise ConnectError(
            f"the scheme {parts.scheme!r} is not one that longrein speaks" if parts.scheme else "the URL has no scheme",
            url=url,
            hint=f"write one of {', '.join(s + '://' for s in known)}, as in ws://127.0.0.1:5000/CartPole-v1",
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if any(key in options for key in ("token", "password", "access_token")) or parts.password:
        raise ConnectError(
            "a secret does not belong in a URL, where it is logged and shown",
            url=url.split("?")[0].split("@")[-1],
            hint="give it as token=..., credentials=... or --token-file",
        )
    try:
        port = parts.port
    except ValueError as error:
        raise ConnectError(f"the port is not a number from 0 to 65535: {error}", url=url) from None
    path = unquote(parts.path).lstrip("/") if not parts.scheme.endswith("+unix") else unquote(parts.path)
    if parts.scheme.endswith("+unix"):
        socket_path, _, env = path.partition(":/")  # ws+unix:///run/x.sock:/CartPole-v1
        if not socket_path:
            raise ConnectError("the URL names no socket", url=url, hint="write ws+unix:///path/to/socket")
        return Address(url, parts.scheme, "", None, socket_path, env, options), known[parts.scheme]
    if parts.scheme in ("nats", "tls"):
        name, _, env = path.partition("/")  # nats://host:port/NAME/ENV
        return Address(url, parts.scheme, parts.hostname or "127.0.0.1", port or 4222, name, env, options), known[
            "nats"
        ]
    if parts.scheme == "memory":
        return Address(url, "memory", "", None, parts.netloc, path, options), known["memory"]
    if not parts.hostname:
        raise ConnectError("the URL names no host", url=url, hint=f"write {parts.scheme}://127.0.0.1:5000/ENV")
    return Address(url, parts.scheme, parts.hostname, port, "", path, options), known[parts.scheme]
