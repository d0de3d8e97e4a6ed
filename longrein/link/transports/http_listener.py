"""HTTP/1.1, the listener: sockets, TLS, and the connections that are open. What comes over them is not its business."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping
from typing import Final

from starlette.types import ASGIApp

from longrein.errors import ConnectError
from longrein.link.transports import Address, Handler, ListenOptions
from longrein.link.transports.http_app import Application, make_app
from longrein.link.transports.http_server import REQUEST_SECONDS, HttpProtocol

SWEEP_SECONDS: Final = 1.0
"""How often connections are looked at whose request does not get whole."""


class HttpListener:
    """Listens at one address."""

    def __init__(
        self,
        address: Address,
        options: ListenOptions,
        routes: Mapping[bytes, str] | None = None,
        app: ASGIApp | None = None,
    ) -> None:
        """routes: paths of another protocol than the link's, whose POSTs the handler gets; app: for all other paths."""
        if address.secure and options.ssl_context is None:
            raise ConnectError("https needs a certificate", url=address.url, hint="give certificate=... and key=...")
        self.url = address.url
        self.options = options
        self.connections: set[HttpProtocol] = set()
        self.handler: Handler = None  # type: ignore[assignment]  # set by start, before anything can connect
        self.application: Application = None  # type: ignore[assignment]  # as above
        self.loop: asyncio.AbstractEventLoop = None  # type: ignore[assignment]  # as above
        self._address = address
        self.routes = routes
        self._app = app
        self._servers: list[asyncio.Server] = []
        self._sweeper: asyncio.TimerHandle | None = None

    def now(self) -> float:
        """The loop's clock, in seconds."""
        return self.loop.time()

    async def start(self, handler: Handler) -> None:
        """Begin to listen. Raises ConnectError."""
        self.loop = asyncio.get_running_loop()
        self.handler = handler
        self.application = Application(self._app or make_app(handler, self.options), self.loop)
        context = self.options.ssl_context if self._address.secure else None
        timeout = REQUEST_SECONDS if context is not None else None
        for line in await self._bind():
            self._servers.append(
                await self.loop.create_server(
                    lambda: HttpProtocol(self), sock=line, ssl=context, ssl_handshake_timeout=timeout, backlog=512
                )
                if line.family != getattr(socket, "AF_UNIX", None)
                else await self.loop.create_unix_server(lambda: HttpProtocol(self), sock=line, backlog=512)
            )
        self._sweep()

    async def _bind(self) -> list[socket.socket]:
        try:
            return [_unix_socket(self._address.path)] if self._address.path else await self._tcp_sockets()
        except socket.gaierror as error:
            raise ConnectError(f"the name {self._address.host!r} is not known: {error.strerror}", url=self.url,
                               hint="name an address of this machine, as 127.0.0.1") from error  # fmt: skip
        except OSError as error:
            reasons = {
                errno.EADDRINUSE: ("another server listens there already", "stop it, or choose another port; 0 is any"),
                errno.EACCES: ("this user may not listen there", "choose a port above 1023, or another path"),
                errno.EADDRNOTAVAIL: ("this machine has no such address", "use 127.0.0.1, or 0.0.0.0 for all"),
            }
            reason, hint = reasons.get(error.errno or 0, (str(error), ""))
            raise ConnectError(reason, url=self.url, hint=hint) from error

    async def _tcp_sockets(self) -> list[socket.socket]:
        """A socket for each address of the host, all at one port: a name such as localhost has two."""
        address = self._address
        port = address.port if address.port is not None else 443 if address.secure else 80
        found = await self.loop.getaddrinfo(address.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        lines: list[socket.socket] = []
        try:
            for family, host in dict.fromkeys((info[0], info[4][0]) for info in found):
                try:
                    lines.append(_tcp_socket(family, str(host), port))
                except OSError as error:
                    # A machine without IPv6 still resolves localhost to ::1.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                else:
                    port = lines[-1].getsockname()[1]
            if not lines:
                raise OSError(errno.EADDRNOTAVAIL, "no address")
        except OSError:
            for line in lines:
                line.close()
            raise
        host = f"[{address.host}]" if ":" in address.host else address.host
        self.url = f"{address.scheme}://{host}:{port}" + (f"/{address.env}" if address.env else "")
        return lines

    def _sweep(self) -> None:
        """One timer for all connections: a timer for each request would cost each step."""
        now = self.now()
        for connection in [each for each in self.connections if each.overdue(now)]:
            connection.expire()
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    async def close(self) -> None:
        """Stop listening and close all lines, at the latest after a second. May be called twice."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()
        if servers and self._address.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address.path)
        for connection in list(self.connections):
            connection.close()
        if self.application is not None:
            self.application.close()
        for _ in range(20):
            if not self.connections:
                break
            await asyncio.sleep(0.05)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)


def _tcp_socket(family: int, host: str, port: int) -> socket.socket:
    line = socket.socket(family)
    try:
        line.setblocking(False)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            line.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        line.bind((host, port))
    except OSError:
        line.close()
        raise
    return line


def _unix_socket(path: str) -> socket.socket:
    """A socket bound at `path`. One left behind by a dead server is replaced, one that answers is not."""
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError(errno.EADDRINUSE, "in use")
    line = socket.socket(socket.AF_UNIX)
    try:
        line.setblocking(False)
        line.bind(path)
    except OSError:
        line.close()
        raise
    return line
