"""Client and server in one process: sending a message is a call. The reference that other transports are held to."""

from __future__ import annotations

import os
import select
import threading
from collections import deque

from longrein.errors import ConnectError, ConnectionClosed, TooLarge
from longrein.link.transports import Address, Buffer, ConnectOptions, Handler, ListenOptions, Peer

_listeners: dict[str, MemoryListener] = {}


class MemoryListener:
    """The server's half: a name in this process."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.url = f"memory://{address.path}"
        self.options = options
        self.handler: Handler | None = None
        self.lock = threading.RLock()  # one call at a time, from whichever thread
        self._name = address.path
        self._lines: set[MemoryLine] = set()

    async def start(self, handler: Handler) -> None:
        if self._name in _listeners:
            raise ConnectError("another server of this process has this name", url=self.url, hint="choose another name")
        self.handler = handler
        _listeners[self._name] = self

    async def close(self) -> None:
        if _listeners.get(self._name) is self:
            del _listeners[self._name]
        for line in list(self._lines):
            line.close("the server closed")

    def joined(self, line: MemoryLine) -> None:
        self._lines.add(line)

    def left(self, line: MemoryLine) -> None:
        with self.lock:
            if line in self._lines:
                self._lines.discard(line)
                assert self.handler is not None
                self.handler.lost(line)


class MemoryLine:
    """The server's end of a line: what it sends lies in the connection's queue."""

    persistent = True
    hears = True

    def __init__(self, connection: MemoryConnection) -> None:
        self.peer = Peer("memory", token=connection.token)
        self._connection = connection

    def route(self, lease: str) -> str:
        return ""

    def send(self, message: Buffer, *, final: bool = True) -> None:
        self._connection.put(bytearray(message))

    def close(self, reason: str = "") -> None:
        self._connection.ended(reason or "closed")


class MemoryConnection:
    """The client's half."""

    def __init__(self, listener: MemoryListener, options: ConnectOptions) -> None:
        self.token = options.token
        self._listener = listener
        self._messages: deque[bytearray] = deque()
        self._reason: str | None = None
        self._pipe: tuple[int, int] | None = None  # made when somebody asks for a descriptor to wait on
        self._line = MemoryLine(self)
        listener.joined(self._line)

    def send(self, message: Buffer) -> None:
        if self._reason is not None:
            raise ConnectionClosed(self._reason, url=self._listener.url)
        if len(message) > self._listener.options.max_message_bytes:
            raise TooLarge(
                f"a message of {len(message)} bytes; the server takes {self._listener.options.max_message_bytes}",
                url=self._listener.url,
            )
        with self._listener.lock:
            assert self._listener.handler is not None
            self._listener.handler.received(self._line, message)

    def receive(self, timeout: float | None) -> bytearray | None:
        if not self._messages:
            if self._reason is not None:
                raise ConnectionClosed(self._reason, url=self._listener.url)
            if timeout != 0:
                select.select([self.fileno()], [], [], timeout)
            if not self._messages:
                return None
        message = self._messages.popleft()
        if self._pipe is not None:
            os.read(self._pipe[0], 1)
        return message

    def put(self, message: bytearray) -> None:
        self._messages.append(message)
        self._signal()

    def _signal(self) -> None:
        if self._pipe is not None:
            os.write(self._pipe[1], b"!")

    def ended(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._signal()
        self._listener.left(self._line)

    def route(self, route: str, lease: str) -> None:
        pass

    def fileno(self) -> int:
        if self._pipe is None:
            self._pipe = os.pipe()
            os.write(self._pipe[1], b"!" * len(self._messages))
        return self._pipe[0]

    def close(self) -> None:
        self.ended("closed by this end")
        if self._pipe is not None:
            for descriptor in self._pipe:
                os.close(descriptor)
            self._pipe = None


def connect(address: Address, options: ConnectOptions) -> MemoryConnection:
    """Open a line to a server of this process."""
    listener = _listeners.get(address.path)
    if listener is None:
        raise ConnectError(
            "no server of this process has this name",
            url=address.url,
            hint=f"start one first: longrein.Server(env, at='memory://{address.path}').start()",
        )
    return MemoryConnection(listener, options)


def listen(address: Address, options: ListenOptions) -> MemoryListener:
    """Serve under a name in this process."""
    return MemoryListener(address, options)
