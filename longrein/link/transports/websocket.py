"""WebSocket, over TCP, TLS and unix sockets: the client a blocking socket with its own frame loop, the server picows.

RFC 6455 without extensions: permessage-deflate costs 12 to 30 times the speed on observations, so it is never offered.
Whole messages in, whole messages out; a text frame carries a message of the JSON twin.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import os
import secrets
import select
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import numpy as np
import picows
from picows import WSCloseCode, WSListener, WSMsgType, WSTransport, WSUpgradeRequest

from longrein.errors import ConnectError, ConnectionClosed, Forbidden, LinkTimeout, NotFound, TooLarge, Unauthenticated
from longrein.link.transports import Address, Buffer, ConnectOptions, Handler, ListenOptions, Peer

log = logging.getLogger("longrein.websocket")
PICOWS_LOG: Final = logging.getLogger("longrein.picows")
PICOWS_LOG.setLevel(logging.WARNING)  # it has a line for each connection

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_BUFFER_BYTES: Final = 1 << 16
_WAIT_SECONDS: Final = 0.25  # how long one blocking read waits before deadlines are looked at
_ACCEPT_SECONDS: Final = 0.2  # how long one of those who wait for a system looks for all of them
_REDIAL_SECONDS: Final = (0.1, 5.0)  # the first pause and the longest
_CONTINUE, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_WHOLE: Final = b"\x81\x82"  # how a text or a binary message of one frame begins
_BRACE: Final = 0x7B
_WS_TEXT, _WS_BINARY = WSMsgType.TEXT, WSMsgType.BINARY
_SHORT_BYTES: Final = 4096
_LONG_BYTES: Final = 1 << 15

# ---------------------------------------------------------------------------------------------------- the client's half


class WebSocketConnection:
    """One open WebSocket, used by one thread at a time. A frame that it sends is masked when it is the client's end."""

    def __init__(self, sock: socket.socket, url: str, max_bytes: int, *, masks: bool, extra: bytes = b"") -> None:
        self._sock = sock
        self._url = url
        self._max_bytes = max_bytes
        self._masks = masks
        self._secure = isinstance(sock, ssl.SSLSocket)
        self._closed = False
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = len(extra)
        self._buffer[: len(extra)] = extra
        self._long = False  # the last message was a long one, so the next one will be
        self._keys = b""
        self._used = 0
        self._message: bytearray | None = None  # of a message that comes in several frames
        if self._secure:
            sock.settimeout(_WAIT_SECONDS)
        else:
            # A timeout kept by the kernel: Python's own would add a poll() to every read.
            sock.settimeout(None)
            wait = struct.pack("ll", 0, int(_WAIT_SECONDS * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 30, 0))

    def route(self, route: str, lease: str) -> None:
        pass

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Buffer) -> None:
        length = len(message)
        if 0 < length < 126 and self._masks and message[0] != _BRACE:  # the way of nearly every request
            used = self._used
            if used == len(self._keys):
                self._keys, used = os.urandom(4096), 0
            self._used = used + 4
            key = self._keys[used : used + 4]
            masked = int.from_bytes(message, "little") ^ int.from_bytes((key * 32)[:length], "little")
            try:
                self._sock.sendall(bytes((0x82, 0x80 | length)) + key + masked.to_bytes(length, "little"))
            except OSError as error:
                self._fail(f"sending failed: {error}")
            return
        self._send_frame(_TEXT if length and message[0] == _BRACE else _BINARY, message)

    def _send_frame(self, kind: int, payload: Buffer) -> None:
        length = len(payload)
        mask_bit = 0x80 if self._masks else 0
        if length < 126:
            head = bytes((0x80 | kind, mask_bit | length))
        elif length < 65536:
            head = struct.pack("!BBH", 0x80 | kind, mask_bit | 126, length)
        else:
            head = struct.pack("!BBQ", 0x80 | kind, mask_bit | 127, length)
        try:
            if self._masks:
                key = self._mask_key()
                self._sock.sendall(b"".join((head, key, _masked(payload, key))))
            elif length < 4096:
                self._sock.sendall(head + payload)
            else:
                self._sock.sendall(b"".join((head, payload)))
        except OSError as error:
            self._fail(f"sending failed: {error}")

    def _mask_key(self) -> bytes:
        """Four bytes of the system's randomness, fetched for many frames at once."""
        if self._used == len(self._keys):
            self._keys, self._used = os.urandom(4096), 0
        used = self._used
        self._used = used + 4
        return self._keys[used : used + 4]

    def receive(self, timeout: float | None) -> bytearray | None:
        if not self._end and not self._long and not self._secure and (timeout is None or timeout >= _WAIT_SECONDS):
            message = self._short_message()
            if message is not None:
                return message
        deadline = None if timeout is None or timeout == 0 else time.monotonic() + timeout
        while True:
            message = self._next_message()
            if message is not None:
                return message
            read = self._read(timeout if deadline is None else deadline - time.monotonic())
            if not read and timeout is not None and (deadline is None or time.monotonic() >= deadline):
                return None

    def _short_message(self) -> bytearray | None:
        """One read that brings one short whole message, the way of nearly every answer; else the buffer keeps it."""
        buffer = self._buffer
        try:
            got = self._sock.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            self._fail(f"reading failed: {error}")
        if got == 0:
            self._fail("the other end closed the connection")
        if got > 2 and buffer[0] in _WHOLE and buffer[1] == got - 2 < 126 and self._masks and self._message is None:
            return buffer[2:got]
        self._end = got
        return None

    def _read(self, wait: float | None) -> bool:
        """Read once into the buffer; False when nothing came within `wait` or the kernel's own wait."""
        if self._end == len(self._buffer):
            self._make_room()
        if self._long and not self._end:  # its head first, so that all the rest goes straight to where it will stay
            return self._read_into(self._view[:16], wait) > 0
        return self._read_into(self._view[self._end :], wait) > 0

    def _make_room(self) -> None:
        kept = self._end - self._start
        if self._start:
            self._buffer[:kept] = self._buffer[self._start : self._end]
        self._start, self._end = 0, kept

    def _read_into(self, view: memoryview, wait: float | None, *, count: bool = True) -> int:
        try:
            if wait is not None and wait < _WAIT_SECONDS and not (self._secure and self._sock.pending()):  # type: ignore[attr-defined]  # an SSLSocket
                if wait < 0:
                    return 0
                poll = select.poll()
                poll.register(self._sock, select.POLLIN)
                if not poll.poll(wait * 1000):
                    return 0
            got = self._sock.recv_into(view)
        except (BlockingIOError, ssl.SSLWantReadError, TimeoutError):
            return 0
        except (OSError, ValueError) as error:
            self._fail(f"reading failed: {error}")
        if got == 0:
            self._fail("the other end closed the connection")
        if count:
            self._end += got
        return got

    def _next_message(self) -> bytearray | None:
        """The next whole message that the buffer holds, or whose rest is read straight into its own memory."""
        while True:
            start, held = self._start, self._end - self._start
            if held < 2:
                return None
            first, second = self._buffer[start], self._buffer[start + 1]
            length, offset = second & 0x7F, 2
            if length == 126:
                if held < 4:
                    return None
                length, offset = int.from_bytes(self._buffer[start + 2 : start + 4], "big"), 4
            elif length == 127:
                if held < 10:
                    return None
                length, offset = int.from_bytes(self._buffer[start + 2 : start + 10], "big"), 10
            kind = first & 0x0F
            if first & 0x70 or bool(second & 0x80) == self._masks or (kind >= 8 and (length > 125 or not first & 0x80)):
                self._fail("it sent a frame that breaks RFC 6455")
            if length + len(self._message or b"") > self._max_bytes:
                self._fail(f"it sent a message of {length} bytes; this end takes {self._max_bytes}")
            key = b""
            if second & 0x80:
                if held < offset + 4:
                    return None
                key = bytes(self._buffer[start + offset : start + offset + 4])
                offset += 4
            if held < offset + length:
                if length + offset <= len(self._buffer) and not self._long:
                    if start + offset + length > len(self._buffer):
                        self._make_room()
                    return None
                payload = self._long_payload(start + offset, length)
            else:
                payload = self._buffer[start + offset : start + offset + length]
                self._start = start + offset + length
                if self._start == self._end:
                    self._start = self._end = 0
            if key:
                payload = bytearray(_masked(payload, key))
            if kind == _BINARY and first & 0x80 and self._message is None:
                return payload
            message = self._frame(kind, bool(first & 0x80), payload)
            if message is not None:
                return message

    def _long_payload(self, begin: int, length: int) -> bytearray:
        """A payload longer than the buffer: its rest is read into the memory that the caller gets."""
        self._long = length > _LONG_BYTES
        payload = bytearray(length)
        have = self._end - begin
        payload[:have] = self._view[begin : self._end]
        self._start = self._end = 0
        view = memoryview(payload)
        silent_since = time.monotonic()
        while have < length:
            got = self._read_into(view[have:], None, count=False)
            have += got
            now = time.monotonic()
            if got:
                silent_since = now
            elif now - silent_since > 30:
                self._fail("it fell silent in the middle of a message")
        return payload

    def _frame(self, kind: int, final: bool, payload: bytearray) -> bytearray | None:
        """What is not a whole binary message: text, fragments and control frames."""
        if kind in (_TEXT, _BINARY, _CONTINUE):
            if (kind == _CONTINUE) == (self._message is None):
                self._fail("it sent fragments out of order")
            if self._message is None:
                self._message = payload
            else:
                self._message += payload
            if not final:
                return None
            message, self._message = self._message, None
            return message
        if kind == _PING:
            self._send_frame(_PONG, payload)
            return bytearray()  # a sign of life
        if kind == _PONG:
            return bytearray()
        if kind == _CLOSE:
            code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
            reason = payload[2:].decode("utf-8", "replace")
            if code == WSCloseCode.MESSAGE_TOO_BIG.value:
                self.close()
                raise TooLarge(f"the server refused the message: {reason or 'too big'}", url=self._url)
            self.close()
            said = f"the other end closed the connection ({code}{': ' + reason if reason else ''})"
            raise ConnectionClosed(said, url=self._url, code=code, said=reason)
        self._fail(f"it sent a frame of kind {kind}")
        return None

    def _fail(self, reason: str) -> None:
        self.close()
        raise ConnectionClosed(reason, url=self._url)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            self._sock.settimeout(0.1)
            mask = b"\0\0\0\0" if self._masks else b""
            self._sock.sendall(bytes((0x80 | _CLOSE, 0x82 if self._masks else 0x02)) + mask + b"\x03\xe8")
        with suppress(OSError):
            self._sock.close()


def _masked(payload: Buffer, key: bytes) -> bytes:
    """XOR with the key, as RFC 6455 section 5.3 has it. Integers are quickest for short payloads, NumPy for long."""
    length = len(payload)
    if length <= 512:
        mask = key * ((length + 3) // 4)
        return (int.from_bytes(payload, "little") ^ int.from_bytes(mask[:length], "little")).to_bytes(length, "little")
    padded = bytearray(length + (-length % 4))
    padded[:length] = payload
    words = np.frombuffer(padded, np.uint32)
    words ^= np.frombuffer(key, np.uint32)
    return bytes(memoryview(padded)[:length])


def connect(address: Address, options: ConnectOptions) -> WebSocketConnection:
    """Open a WebSocket, or wait for a system that dials in.

    Raises ConnectError, Unauthenticated, Forbidden, NotFound; LinkTimeout when no system dials in.
    """
    if options.listen:
        return _hub(address, options).take(options)
    deadline = time.monotonic() + options.timeout
    sock = open_socket(address, options, default_port=443 if address.secure else 80)
    try:
        extra = _upgrade(sock, address, options, deadline)
    except (OSError, ssl.SSLError) as error:
        sock.close()
        raise ConnectError(
            f"the WebSocket handshake failed: {error}",
            url=address.url,
            hint="is this a longrein server? try: longrein ping URL",
        ) from error
    except BaseException:
        sock.close()
        raise
    return WebSocketConnection(sock, address.url, options.max_message_bytes, masks=True, extra=extra)


def open_socket(address: Address, options: ConnectOptions, default_port: int) -> socket.socket:
    """A connected stream socket with Nagle off, inside TLS where the scheme says so. Raises ConnectError."""
    where = address.path or f"{address.host}:{address.port or default_port}"
    try:
        if address.scheme.endswith("+unix"):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(options.timeout)
            sock.connect(address.path)
            return sock
        sock = socket.create_connection((address.host, address.port or default_port), options.timeout)
        keep_alive(sock)
        if not address.secure:
            return sock
        context = options.ssl_context or ssl.create_default_context()
        return context.wrap_socket(sock, server_hostname=address.host)
    except ssl.SSLError as error:
        raise ConnectError(
            f"TLS failed: {error.reason or error}",
            url=address.url,
            hint="give ca=FILE for a private authority, and certificate=, key= if it asks for yours",
        ) from error
    except socket.gaierror as error:
        raise ConnectError(f"the host {address.host!r} has no address: {error}", url=address.url) from error
    except OSError as error:
        raise ConnectError(
            f"nothing listens at {where}: {error.strerror or error}",
            url=address.url,
            hint=f"start a server: longrein serve ENV --at {address.scheme}://{where}",
        ) from error


def keep_alive(sock: Any) -> None:
    """Nagle off, and a pulled cable noticed by the kernel within a minute: a blocking client answers no pings while
    its trainer computes, so that pings of ours would cut off whoever thinks for long."""
    if sock is None or sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)


def _upgrade(sock: socket.socket, address: Address, options: ConnectOptions, deadline: float) -> bytes:
    """The client's handshake (RFC 6455 section 4.1); what came after the answer's head."""
    key = base64.b64encode(secrets.token_bytes(16))
    host = "localhost" if not address.host else f"[{address.host}]" if ":" in address.host else address.host
    port = f":{address.port}" if address.port else ""
    lines = [
        f"GET {options.path} HTTP/1.1",
        f"Host: {host}{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key.decode()}",
        "Sec-WebSocket-Version: 13",
    ]
    if options.token:
        lines.append(f"Authorization: Bearer {options.token}")
    sock.sendall("\r\n".join([*lines, "", ""]).encode())
    head, rest = _read_head(sock, deadline)
    status, headers = _parse_head(head)
    if status == 401:
        raise Unauthenticated("the server wants a token", url=address.url, hint="give token=...")
    if status == 403:
        raise Forbidden("the server turns this client away", url=address.url)
    if status == 404:
        raise NotFound("there is a web server here, but no longrein", url=address.url)
    accept = base64.b64encode(hashlib.sha1(key + _GUID).digest()).decode()
    if status != 101 or headers.get("sec-websocket-accept") != accept:
        raise ConnectError(
            f"no WebSocket server: it answered {head.splitlines()[0][:80]!r}",
            url=address.url,
            hint="is the port right? a server of longrein over HTTP is reached by http://",
        )
    return rest


def _read_head(sock: socket.socket, deadline: float) -> tuple[str, bytes]:
    """An HTTP head of at most 16 KiB, and the bytes that came behind it."""
    data = b""
    while b"\r\n\r\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer to the handshake in time")
        sock.settimeout(left)
        more = sock.recv(4096)
        if not more:
            raise ConnectionResetError("the other end closed during the handshake")
        data += more
        if len(data) > 16384:
            raise ConnectionAbortedError("a handshake of more than 16 KiB")
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode("latin-1"), rest


def _parse_head(head: str) -> tuple[int, dict[str, str]]:
    first, *lines = head.split("\r\n")
    words = first.split(" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    pairs = (line.partition(":") for line in lines)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


# ---------------------------------------------------------------------------------------------------- the server's half


class _Line(WSListener):
    """The server's end of one WebSocket."""

    persistent = True
    hears = True

    def __init__(self, owner: _Lines, peer: Peer) -> None:
        self.peer = peer
        self._owner = owner
        self._received = owner.handler.received
        self._transport: WSTransport | None = None
        self._parts: list[bytes] | None = None  # of a message that comes in several frames
        self._size = 0

    def route(self, lease: str) -> str:
        return ""

    def send(self, message: Buffer, *, final: bool = True) -> None:
        transport = self._transport
        if transport is not None:
            transport.send(_WS_TEXT if message[0] == _BRACE else _WS_BINARY, message)

    def close(self, reason: str = "") -> None:
        if self._transport is not None:
            self._transport.send_close(WSCloseCode.GOING_AWAY, reason.encode()[:120])
            self._transport.disconnect()

    def on_ws_connected(self, transport: WSTransport) -> None:
        self._transport = transport
        self._owner.lines.add(self)
        keep_alive(transport.underlying_transport.get_extra_info("socket"))
        if not self.peer.address:
            name = transport.underlying_transport.get_extra_info("peername")
            address = f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix"
            self.peer = Peer(address, self.peer.token, _certificate_subject(transport.underlying_transport))
        self._owner.connected(self)

    def on_ws_frame(self, transport: WSTransport, frame: picows.WSFrame) -> None:
        kind = frame.msg_type
        if kind is _WS_BINARY and frame.fin and self._parts is None:
            if frame.payload_size < _SHORT_BYTES:  # bytes are quicker to look into than a view
                self._received(self, frame.get_payload_as_bytes())
            else:
                self._received(self, frame.get_payload_as_memoryview())
        elif kind in (WSMsgType.BINARY, WSMsgType.TEXT, WSMsgType.CONTINUATION):
            self._fragment(transport, frame)
        elif kind is WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code(), frame.get_close_message())
            transport.disconnect()

    def _fragment(self, transport: WSTransport, frame: picows.WSFrame) -> None:
        if (frame.msg_type is WSMsgType.CONTINUATION) == (self._parts is None):
            transport.send_close(WSCloseCode.PROTOCOL_ERROR, b"fragments out of order")
            transport.disconnect()
            return
        parts = self._parts = self._parts or []
        parts.append(frame.get_payload_as_bytes())
        self._size += len(parts[-1])
        if self._size > self._owner.options.max_message_bytes:
            transport.send_close(WSCloseCode.MESSAGE_TOO_BIG, b"over the announced limit")
            transport.disconnect()
        elif frame.fin:
            self._parts, self._size = None, 0
            self._owner.handler.received(self, b"".join(parts))

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        self._transport = None
        self._owner.lines.discard(self)
        self._owner.handler.lost(self)
        self._owner.disconnected(self)


class _Lines:
    """What listening and dialling out share: the open lines, and the handler behind them."""

    handler: Handler

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.url = address.url
        self.address = address
        self.options = options
        self.lines: set[_Line] = set()

    def connected(self, line: _Line) -> None:
        """A line opened."""

    def disconnected(self, line: _Line) -> None:
        """A line ended."""

    def settings(self) -> dict[str, Any]:
        """What picows is told at both ends. A frame over the limit is refused by its length, before memory is taken."""
        return {
            "max_frame_size": self.options.max_message_bytes,
            "logger_name": PICOWS_LOG,
            "read_buffer_init_size": 4096,  # it grows with the messages; an idle lease should cost little
        }

    async def _close_lines(self) -> None:
        for line in list(self.lines):
            line.close("the server closed")


class WebSocketListener(_Lines):
    """Listens at a port or at a unix socket."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        super().__init__(address, options)
        self._server: asyncio.Server | None = None
        self._bound_path: Path | None = None

    async def start(self, handler: Handler) -> None:
        self.handler = handler
        where: dict[str, Any]
        if self.address.scheme == "ws+unix":
            self._bound_path = free_socket_path(self.address)
            where = {"sock": _bind_unix(self._bound_path)}
        else:
            where = {"host": self.address.host, "port": self.address.port or 0}
        try:
            self._server = await picows.ws_create_server(
                self._welcome, ssl=self.options.ssl_context if self.address.secure else None, **where, **self.settings()
            )
        except OSError as error:
            raise ConnectError(
                f"cannot listen here: {error.strerror or error}",
                url=self.url,
                hint="is the port in use? port 0 takes a free one",
            ) from error
        if self._bound_path is None:
            self.url = listening_url(self.address, self._server)

    def _welcome(self, request: WSUpgradeRequest) -> Any:
        headers = request.headers
        plain_upgrade(request)
        origin = headers.get("Origin")
        if not origin_allowed(origin, self.options.allowed_origins):
            response = picows.WSUpgradeResponse.create_error_response(
                HTTPStatus.FORBIDDEN, f"origin {origin} is not allowed here: --allow-origin".encode()
            )
            return picows.WSUpgradeResponseWithListener(response, None)
        return _Line(self, Peer("", bearer(headers.get("Authorization"))))

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._close_lines()
            self._server = None
        if self._bound_path is not None:
            self._bound_path.unlink(missing_ok=True)


def plain_upgrade(request: WSUpgradeRequest) -> None:
    """Firefox says `Connection: keep-alive, Upgrade`, which is right; picows wants to read `Upgrade` alone."""
    if "upgrade" in (word.strip().lower() for word in request.headers.get("Connection", "").split(",")):
        request.headers["Connection"] = "Upgrade"


class _UnixSocket(socket.socket):
    """A unix socket that lets settings of TCP pass: picows makes them on each socket that it is given."""

    def accept(self) -> tuple[socket.socket, Any]:
        descriptor, address = self._accept()  # type: ignore[attr-defined]  # as socket.socket.accept does it
        accepted = _UnixSocket(self.family, self.type, self.proto, fileno=descriptor)
        accepted.setblocking(False)
        return accepted, address

    def setsockopt(self, level: int, *args: Any) -> None:
        if level != socket.IPPROTO_TCP:
            super().setsockopt(level, *args)

    def getsockopt(self, level: int, *args: Any) -> Any:
        return 0 if level == socket.IPPROTO_TCP else super().getsockopt(level, *args)


def _bind_unix(path: Path) -> socket.socket:
    sock = _UnixSocket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(path))
    except OSError:
        sock.close()
        raise
    path.chmod(0o600)  # whoever may open the file may use the server
    sock.listen(128)
    sock.setblocking(False)
    return sock


def free_socket_path(address: Address) -> Path:
    """The path of a unix socket, cleared of one that a dead server left behind. Raises ConnectError if one lives."""
    path = Path(address.path)
    if path.is_socket():
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink(missing_ok=True)
        else:
            raise ConnectError("a server listens at this socket already", url=address.url)
        finally:
            probe.close()
    return path


def listening_url(address: Address, server: asyncio.AbstractServer) -> str:
    """The URL with the port that was really taken."""
    name = server.sockets[0].getsockname()  # type: ignore[attr-defined]  # both asyncio's and uvloop's have it
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{address.scheme}://{host}:{name[1]}"


def origin_allowed(origin: str | None, allowed: tuple[str, ...]) -> bool:
    """Browsers say where a page came from; a page of elsewhere must not reach a server on its visitor's machine."""
    return origin is None or "*" in allowed or origin in allowed


def bearer(header: str | None) -> str | None:
    """The token of an Authorization header."""
    scheme, _, token = (header or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _certificate_subject(transport: asyncio.BaseTransport) -> str | None:
    certificate = transport.get_extra_info("peercert")
    if not certificate:
        return None
    return ", ".join(f"{key}={value}" for part in certificate.get("subject", ()) for key, value in part)


def listen(address: Address, options: ListenOptions) -> WebSocketListener:
    """Listen for WebSockets."""
    return WebSocketListener(address, options)


# ------------------------------------------------------------------------------------- a system dials out to a trainer


class WebSocketDialler(_Lines):
    """The server's half, dialling out to a trainer that waits, again and again for as long as it runs."""

    async def start(self, handler: Handler) -> None:
        self.handler = handler
        self._gone = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._keep_dialling())

    async def _keep_dialling(self) -> None:
        pause, longest = _REDIAL_SECONDS
        wait, told = pause, False
        while True:
            self._gone.clear()
            try:
                await self._dial()
            except (OSError, picows.WSError, TimeoutError) as error:
                if not told:
                    log.info("no trainer waits at %s yet (%s): trying again", self.url, error)
                    told = True
                await asyncio.sleep(wait)
                wait = min(2 * wait, longest)
                continue
            log.info("connected to the trainer at %s", self.url)
            wait, told = pause, False
            await self._gone.wait()
            await asyncio.sleep(pause)

    async def _dial(self) -> None:
        headers = {"Longrein-Instance": self.options.instance}
        if self.options.token:
            headers["Authorization"] = f"Bearer {self.options.token}"
        context = self.options.ssl_context or (ssl.create_default_context() if self.address.secure else None)
        settings = self.settings() | {
            "extra_headers": headers,
            "ssl_context": context,
            "websocket_handshake_timeout": 10,
        }
        await picows.ws_connect(lambda: _Line(self, Peer("trainer")), self.url, **settings)

    def disconnected(self, line: _Line) -> None:
        self._gone.set()

    async def close(self) -> None:
        if hasattr(self, "_task"):
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self._close_lines()


def dial(address: Address, options: ListenOptions) -> WebSocketDialler:
    """Dial out to a trainer that waits."""
    return WebSocketDialler(address, options)


class _Hub:
    """The trainer's side of dialling in: one listening socket for a URL, shared by all connections of the process."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._changed = threading.Condition()
        self._awaited: list[str] = []  # systems whose lease somebody is to take up again
        self._accepting = False  # one thread accepts for all that wait, a moment at a time
        self._waiting: deque[tuple[str, socket.socket, bytes]] = deque()
        try:
            if address.scheme == "ws+unix":
                self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._listening.bind(str(free_socket_path(address)))
                self._listening.listen(128)
            else:
                self._listening = socket.create_server((address.host, address.port or 0), backlog=128)
        except OSError as error:
            raise ConnectError(
                f"cannot wait here: {error.strerror or error}", url=address.url, hint="is the port in use?"
            ) from error

    def take(self, options: ConnectOptions) -> WebSocketConnection:
        """The next system that dials in. Raises LinkTimeout when none does."""
        deadline = time.monotonic() + options.timeout
        with self._changed, self._awaiting(options.instance):
            while (found := self._wanted(options.instance)) is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise LinkTimeout(
                        f"no system dialled in within {options.timeout:g} s",
                        seconds=options.timeout,
                        url=self.address.url,
                        hint=f"start it: longrein serve ENV --dial {self.address.url}",
                    )
                if self._accepting:
                    self._changed.wait(left)
                else:
                    self._accept(min(left, _ACCEPT_SECONDS), options)
            self._waiting.remove(found)
            _, sock, extra = found
        return WebSocketConnection(sock, self.address.url, options.max_message_bytes, masks=False, extra=extra)

    @contextmanager
    def _awaiting(self, instance: str) -> Iterator[None]:
        self._awaited.append(instance or "-")
        try:
            yield
        finally:
            self._awaited.remove(instance or "-")

    def _accept(self, seconds: float, options: ConnectOptions) -> None:
        """Let one system in, while others wait for theirs."""
        self._accepting = True
        self._changed.release()
        try:
            self._listening.settimeout(seconds)
            sock, _ = self._listening.accept()
            self._greet(sock, options)
        except TimeoutError:
            pass  # whoever is let in next may be another's
        finally:
            self._changed.acquire()
            self._accepting = False
            self._changed.notify_all()

    def _wanted(self, instance: str) -> tuple[str, socket.socket, bytes] | None:
        """The system that waited longest, or the latest line of the one that is wanted."""
        if not instance:
            return next((one for one in self._waiting if one[0] not in self._awaited), None)
        return next((one for one in reversed(self._waiting) if one[0] == instance), None)

    def _greet(self, sock: socket.socket, options: ConnectOptions) -> None:
        """The server's side of the handshake (RFC 6455 section 4.2); a stranger is sent away."""
        try:
            sock.settimeout(5.0)
            keep_alive(sock)
            if options.ssl_context is not None:
                sock = options.ssl_context.wrap_socket(sock, server_side=True)
            head, extra = _read_head(sock, time.monotonic() + 5.0)
            _, headers = _parse_head(head)
            key = headers.get("sec-websocket-key")
            shown = bearer(headers.get("authorization")) or ""
            if key is None or headers.get("origin") is not None:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                sock.close()
                return
            if options.token is not None and not secrets.compare_digest(shown, options.token):
                sock.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                sock.close()
                return
            accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest())
            sock.sendall(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
            )
        except (OSError, ssl.SSLError) as error:
            log.info("a system that dialled in at %s left during the handshake: %s", self.address.url, error)
            sock.close()
            return
        self._waiting.append((headers.get("longrein-instance", ""), sock, extra))


_hubs: dict[str, _Hub] = {}
_hubs_lock = threading.Lock()


def _hub(address: Address, options: ConnectOptions) -> _Hub:
    place = f"{address.scheme}:{address.host}:{address.port}:{address.path}"
    with _hubs_lock:
        if place not in _hubs:
            _hubs[place] = _Hub(address)
        return _hubs[place]
