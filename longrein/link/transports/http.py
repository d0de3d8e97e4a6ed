"""HTTP/1.1, the client's half: one POST a message, written and read on a blocking socket.

The server's half is in `http_listener` and `http_server`, which need packages that a client does not.

A head that was seen before is not read again: both ends of a kept-alive line say the same few heads all the time, so a
dictionary from the head's bytes to what they mean replaces the parsing.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import socket
import ssl
import struct
import time
from dataclasses import dataclass
from typing import Final

from longrein.errors import (
    ConnectError,
    ConnectionClosed,
    Forbidden,
    LinkError,
    NotFound,
    RateLimited,
    RemoteProtocolError,
    TooLarge,
    Unauthenticated,
)
from longrein.link.transports import Address, Buffer, ConnectOptions, Listener, ListenOptions
from longrein.link.transports.http_framing import HEAD_BYTES, BadFraming, BodyTooLarge, Chunks, content_length
from longrein.link.transports.http_json import MESSAGE_PATH

BINARY_TYPE: Final = "application/vnd.longrein"
"""The media type of a message in the binary form; one of the JSON twin is application/json."""

_READ_BYTES: Final = 2**16
_JOIN_BYTES: Final = 2**16  # up to here a copy is cheaper than a second buffer
_HEADS_KEPT: Final = 32
_TIMEVAL: Final = struct.Struct("ll")  # seconds, microseconds: what SO_RCVTIMEO takes on a POSIX system


def connect(address: Address, options: ConnectOptions, *, any_status: bool = False) -> HttpConnection:
    """Open a line. Raises ConnectError, with what to do."""
    if options.listen:
        raise ConnectError("HTTP cannot wait for a system that dials in", url=address.url, hint="use ws+listen://")
    token = options.token or ""
    if not token.isascii() or not token.isprintable():
        raise ConnectError("the token holds characters that no header can carry", url=address.url)
    try:
        line = _dial(address, options)
    except UnicodeError as error:  # a host such as "a..b", which cannot be asked for
        raise ConnectError(f"{address.host!r} is no host's name: {error}", url=address.url) from error
    except OSError as error:
        raise _refusal(address, options, error) from error
    return HttpConnection(line, address, options, any_status=any_status)


def listen(address: Address, options: ListenOptions) -> Listener:
    """A listener, not yet started. Raises ConnectError when https has no certificate, or a package is missing."""
    # By name and late, so that a client needs neither httptools nor uvicorn nor starlette.
    try:
        half = importlib.import_module("longrein.link.transports.http_listener")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("longrein"):
            raise
        raise ConnectError(
            f"serving by HTTP needs the package {error.name!r}", url=address.url, hint=f"pip install {error.name}"
        ) from error
    listener: Listener = half.HttpListener(address, options)
    return listener


# -------------------------------------------------------------------------------------------------------- opening


def _dial(address: Address, options: ConnectOptions) -> socket.socket:
    if address.scheme.endswith("+unix"):
        line = socket.socket(socket.AF_UNIX)
        try:
            line.settimeout(options.timeout)
            line.connect(address.path)
        except OSError:
            line.close()
            raise
        return line
    deadline = time.monotonic() + options.timeout
    line = socket.create_connection((address.host, _port(address)), options.timeout)
    try:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if address.secure:
            context = options.ssl_context or ssl.create_default_context()
            line.settimeout(max(deadline - time.monotonic(), 0.001))
            line = context.wrap_socket(line, server_hostname=address.host)
    except OSError:
        line.close()
        raise
    return line


def _port(address: Address) -> int:
    return address.port if address.port is not None else 443 if address.secure else 80


def _refusal(address: Address, options: ConnectOptions, error: OSError) -> ConnectError:
    place = address.path or f"{address.host}:{_port(address)}"
    serve = f"start one: longrein serve {address.env or 'ENV'} --at {address.url.split('?')[0]}"
    match error:
        case socket.gaierror():
            return ConnectError(f"the name {address.host!r} is not known: {error.strerror}", url=address.url,
                                hint="check the spelling, or write the address in numbers")  # fmt: skip
        case ssl.SSLCertVerificationError():
            return ConnectError(f"the server's certificate is not trusted: {error.verify_message}", url=address.url,
                                hint="give the authority that signed it (ca=FILE, or an ssl_context)")  # fmt: skip
        case ssl.SSLError():
            return ConnectError(f"the TLS handshake failed: {error}", url=address.url,
                                hint="is this port served as https://, and does it ask for a certificate?")  # fmt: skip
        case TimeoutError():
            return ConnectError(f"{place} did not answer within {options.timeout:g} s", url=address.url,
                                hint="is the host up, and does a firewall let you through?")  # fmt: skip
        case ConnectionRefusedError() | FileNotFoundError():
            return ConnectError(f"no server listens at {place}", url=address.url, hint=serve)
        case _:
            return ConnectError(f"no line to {place}: {error}", url=address.url, hint=serve)


# ------------------------------------------------------------------------------------------------------- the line


@dataclass(frozen=True, slots=True)
class Head:
    """What the head of a response says."""

    status: int
    length: int  # bytes of the body
    chunked: bool
    close: bool  # the server ends the connection after this response
    plain: bool  # a 200 with a Content-Length on a line that is kept
    carried: bytes = b""  # a 1xx may carry a message that is no answer


class HttpConnection:
    """The client's end of a kept-alive line. Responses come in the order of the requests, as HTTP/1.1 has it."""

    def __init__(
        self, line: socket.socket, address: Address, options: ConnectOptions, *, any_status: bool = False
    ) -> None:
        """any_status: `receive` gives every answer's body, and `status` says what it was."""
        self.status = 0  # of the last answer
        self._any_status = any_status
        self._socket = line
        self._url = address.url
        self._address = address
        self._options = options
        self._tls = isinstance(line, ssl.SSLSocket)
        self._wait: float | None = None  # the timeout that the socket has now, in seconds
        line.settimeout(None)
        if not self._tls:
            # A Python timeout costs a poll() before each read; the kernel's own costs nothing.
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(options.timeout))
        self._data = b""  # what came and belongs to no body yet
        self._heads: dict[bytes, Head] = {}
        self._head: Head | None = None  # of the response whose body is underway
        self._body = bytearray()
        self._filled = 0
        self._chunks: Chunks | None = None
        self._over = ""  # why the line is over
        self._binary, self._text = self._request_heads("")
        self._posts: dict[str, bytes] = {}

    def _request_heads(self, lease: str, path: str = MESSAGE_PATH) -> tuple[bytes, bytes]:
        """The heads of a request in the binary form and in JSON, up to the number of bytes."""
        host = self._address.host or "localhost"
        if ":" in host:
            host = f"[{host}]"
        if self._address.port is not None:
            host = f"{host}:{self._address.port}"
        lines = [f"POST {path} HTTP/1.1", f"Host: {host}"]
        if path == MESSAGE_PATH:
            lines.append("Longrein-Interim: 102")
        if self._options.token:
            lines.append(f"Authorization: Bearer {self._options.token}")
        if lease.isascii() and lease.isprintable() and lease:
            lines.append(f"Longrein-Lease: {lease}")
        binary, text = (
            "\r\n".join([*lines, f"Content-Type: {kind}", "Content-Length: "]).encode("ascii")
            for kind in (BINARY_TYPE, "application/json")
        )
        return binary, text

    @property
    def over(self) -> bool:
        """Whether the line has ended."""
        return bool(self._over)

    def post(self, path: str, body: bytes) -> None:
        """One POST of JSON to another path than that of messages."""
        heads = self._posts.get(path)
        if heads is None:
            heads = self._posts[path] = self._request_heads("", path)[1]
        if self._over:
            raise ConnectionClosed(self._over, url=self._url)
        try:
            self._socket.sendall(b"%b%d\r\n\r\n%b" % (heads, len(body), body))
        except OSError as error:
            raise self._send_failure(error) from error

    def send(self, message: Buffer) -> None:
        """One POST, in one write. Raises ConnectionClosed, or what the server refused it with."""
        if self._over:
            raise ConnectionClosed(self._over, url=self._url)
        size = len(message)
        start = self._text if message[:1] == b"{" else self._binary
        try:
            if size <= _JOIN_BYTES and not self._tls:
                self._socket.sendall(b"%b%d\r\n\r\n%b" % (start, size, bytes(message)))
                return
            head = b"%b%d\r\n\r\n" % (start, size)
            if self._tls and self._wait != self._options.timeout:
                self._socket.settimeout(self._options.timeout)
                self._wait = self._options.timeout
            if self._tls:
                self._socket.sendall(head)
                self._socket.sendall(message)
            else:
                sent = self._socket.sendmsg((head, message))
                if sent < len(head):
                    self._socket.sendall(head[sent:])
                    sent = len(head)
                self._socket.sendall(memoryview(message)[sent - len(head) :])
        except OSError as error:
            raise self._send_failure(error) from error

    def _send_failure(self, error: OSError) -> LinkError:
        """A server that refuses a large message says so and closes, while we still write: look for what it said."""
        while not self._over:
            try:
                if self.receive(0) is None:
                    break
            except ConnectionClosed:
                break
            except LinkError as refusal:
                self._end("the server refused the last message")
                return refusal
        slow = isinstance(error, (BlockingIOError, TimeoutError))
        self._end(f"the server took no bytes for {self._options.timeout:g} s" if slow else str(error))
        return ConnectionClosed(self._over, url=self._url)

    def receive(self, timeout: float | None) -> bytearray | None:
        """The next response's body; for a 1xx what it carries, or nothing. Raises what another status stands for."""
        deadline = time.monotonic() + timeout if timeout else 0.0
        wait = timeout
        if self._data or self._head is not None:
            message = self._take()
            if message is not None:
                return message
        while self._read(wait):
            message = self._take()
            if message is not None:
                return message
            if deadline:
                # What has arrived by now is still read, so that a slow body cannot starve the caller's clock.
                wait = max(deadline - time.monotonic(), 0)
        return None

    def _read(self, wait: float | None) -> bool:
        """Read once. False when nothing came within `wait` seconds."""
        if self._over:
            raise ConnectionClosed(self._over, url=self._url)
        try:
            flags = 0
            if self._tls:
                if wait != self._wait:
                    self._socket.settimeout(None if wait is None else max(wait, 0.0))
                    self._wait = wait
            elif wait is not None and wait <= 0:
                flags = socket.MSG_DONTWAIT
            elif wait != self._wait:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(wait))
                self._wait = wait
            if self._head is not None and self._chunks is None:
                count = self._socket.recv_into(memoryview(self._body)[self._filled :], 0, flags)
                self._filled += count
            else:
                data = self._socket.recv(_READ_BYTES, flags)
                self._data = self._data + data if self._data else data
                count = len(data)
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            self._end(str(error))
            raise ConnectionClosed(self._over, url=self._url) from error
        if not count:
            half = self._data or self._head is not None
            self._end("the server closed it in the middle of an answer" if half else "the server closed it")
            raise ConnectionClosed(self._over, url=self._url)
        return True

    def _take(self) -> bytearray | None:
        """The next whole response in what has come, or None."""
        head = self._head
        if head is None:
            data = self._data
            end = data.find(b"\r\n\r\n") + 4
            if end < 4:
                if len(data) > HEAD_BYTES or not b"HTTP/1.".startswith(data[:7]):
                    raise self._garbage(f"the answer begins with {data[:40]!r}")
                return None
            text = data[:end]
            head = self._heads.get(text) or self._read_head(text)
            stop = end + head.length
            if stop == len(data) and head.plain:  # the common case
                self._data = b""
                self.status = 200
                return bytearray(data[end:])
            if stop <= len(data) and not head.chunked:
                self._data = data[stop:]
                return self._finish(head, bytearray(memoryview(data)[end:stop]))
            self._head = head
            self._data = data[end:]
            if head.chunked:
                self._chunks = Chunks(self._options.max_message_bytes)
            else:
                self._body = bytearray(head.length)
                self._filled = len(self._data)
                self._body[: self._filled] = self._data
                self._data = b""
        if self._chunks is not None:
            try:
                self._data = self._data[self._chunks.feed(self._data) :]
            except BodyTooLarge as error:
                raise self._too_large(str(error)) from None
            except BadFraming as error:
                raise self._garbage(str(error)) from None
            if not self._chunks.done:
                return None
            body, self._chunks = self._chunks.body, None
        elif self._filled < head.length:
            return None
        else:
            body, self._body = self._body, bytearray()
        self._head = None
        return self._finish(head, body)

    def _read_head(self, text: bytes) -> Head:
        version, _, status = text.partition(b"\r\n")[0].partition(b" ")
        if not version.startswith(b"HTTP/1.") or not status[:3].isdigit():
            raise self._garbage(f"the answer begins with {text[:40]!r}")
        code = int(status[:3])
        length, chunked, close, carried = -1, False, version == b"HTTP/1.0", b""
        for line in text.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            name, value = name.lower(), value.strip(b" \t")
            if name == b"content-length":
                try:
                    length = content_length(value)
                except BadFraming as error:
                    raise self._garbage(str(error)) from None
            elif name == b"transfer-encoding":
                chunked = value.lower() == b"chunked"
            elif name == b"longrein-message" and 100 < code < 200:
                carried = _carried(value)
            elif name == b"connection":
                close = b"close" in value.lower() or (close and b"keep-alive" not in value.lower())
        if 100 <= code < 200 or code in (204, 304):
            length, chunked = 0, False
        elif length < 0 and not chunked:
            length, close = 0, True  # a body up to the end of the line: we do not wait for it
            if code == 200:
                raise self._garbage("an answer whose length is not said")
        if length > self._options.max_message_bytes:
            raise self._too_large(f"an answer of {length} bytes; the limit here is {self._options.max_message_bytes}")
        head = Head(code, 0 if chunked else length, chunked, close, code == 200 and not chunked and not close, carried)
        if len(self._heads) >= _HEADS_KEPT:
            self._heads.clear()
        if len(text) < 2048 and not carried:
            self._heads[text] = head
        return head

    def _finish(self, head: Head, body: bytearray) -> bytearray:
        """A response that is not a plain 200: a sign of life, the last one, or a refusal."""
        if head.close:
            self._end("the server ended it after its last answer")
        self.status = head.status
        if head.status == 200 or (self._any_status and head.status >= 300):
            return body
        if head.status < 200 and head.status != 101:
            return bytearray(head.carried)
        raise self._refused(head.status, body[:300].decode("utf-8", "replace").strip())

    def _refused(self, status: int, text: str) -> LinkError:
        said = f" ({text})" if text and not text.startswith("<") else ""
        if status == 401:
            return Unauthenticated(f"the server refused the token{said}", url=self._url, hint="give token=...")
        if status == 403:
            return Forbidden(f"the server does not allow this{said}", url=self._url, hint="ask its owner for access")
        if status == 404:
            return NotFound(f"this is no longrein server: it has no {MESSAGE_PATH}", url=self._url,
                            hint="check host and port")  # fmt: skip
        if status == 413:
            return TooLarge(f"the message is over the server's limit{said}", url=self._url,
                            hint="send less at once, or raise max_message_bytes at the server")  # fmt: skip
        if status == 429:
            return RateLimited(f"too much at once{said}", url=self._url, hint="try again later")
        if status == 408 or status >= 500:
            self._end(f"the server answered with status {status}{said}")
            return ConnectionClosed(self._over, url=self._url)
        self._end(f"status {status}")
        return RemoteProtocolError(f"the server answered with status {status}{said}", url=self._url,
                                   hint="is there a proxy between, or another kind of server?")  # fmt: skip

    def _garbage(self, text: str) -> ConnectionClosed:
        self._end(f"what came is not HTTP: {text}")
        return ConnectionClosed(self._over, url=self._url, hint="is this a longrein server, and is it http or https?")

    def _too_large(self, text: str) -> TooLarge:
        self._end(text)
        return TooLarge(text, url=self._url, hint="raise max_message_bytes, or ask for less at once")

    def _end(self, reason: str) -> None:
        """The line is over; what was read already can still be had."""
        if not self._over:
            self._over = reason
        self._socket.close()

    def route(self, route: str, lease: str) -> None:
        """Name the lease in a header from now on, so that a proxy can keep it with its server."""
        self._binary, self._text = self._request_heads(lease)

    def fileno(self) -> int:
        """The socket's; -1 once closed."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close. May be called twice."""
        self._end("this end closed it")
        self._data, self._head = b"", None


def _carried(value: bytes) -> bytes:
    """The message in the header Longrein-Message; a damaged one is as good as none."""
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        return b""


def _timeval(seconds: float | None) -> bytes:
    if seconds is None:
        return _TIMEVAL.pack(0, 0)  # for ever
    whole = int(seconds)
    return _TIMEVAL.pack(whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))
