"""HTTP/1.1, one connection at the server: the paths that carry messages, on a small asyncio protocol.

The rules of a connection:

 1. `POST /v1/message` and `POST /v1/KIND` (see `http_json`) are answered here. The first request of any other kind
    takes the whole connection over to the ASGI application (see `http_app`), once all before it are answered.
 2. Requests may be pipelined; answers go out in the order of the requests, whenever they come. Each request is a Line
    of its own, so that an answer cannot reach another request. A request that is never answered holds up all behind it.
 3. A body over the limit, an origin that is not allowed, a head that is no HTTP: an answer with a status, and the end.
 4. A request that is not whole within REQUEST_SECONDS ends the connection; so does a head over HEAD_BYTES.
 5. At most PENDING requests wait for their answers; then nothing more is read. Nothing is read either while the client
    does not read its answers.
 6. What is no answer (Working, Draining) is a 102 with the message in base64 as the header Longrein-Message, and only
    for a client that asks for it (`Longrein-Interim: 102`): many clients take any 1xx but 100 for the answer.

A head that was seen before on this connection is not read again: see `http`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import httptools

from longrein.link.transports import Buffer, Peer, http_json
from longrein.link.transports.http_framing import HEAD_BYTES, BadFraming, BodyTooLarge, Chunks, content_length

if TYPE_CHECKING:
    from collections.abc import Callable

    from longrein.link.transports.http_listener import HttpListener

REQUEST_SECONDS: Final = 30.0
"""Within this time a request must be whole, and a new connection must have sent its first."""

PENDING: Final = 64
"""Requests on one connection that may wait for their answers."""

_LINGER_SECONDS: Final = 1.0  # a refusal is lost if the line is reset while the client still writes
_JOIN_BYTES: Final = 2**16
_HEADS_KEPT: Final = 32
_SENT: Final = (b"",)  # the answer of a request whose answer went out at once
_CARRIED_BYTES: Final = 4096  # proxies allow a header about twice that
_BINARY_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.longrein\r\n"
_JSON: Final = b"Content-Type: application/json\r\n"
_JSON_OK: Final = b"HTTP/1.1 200 OK\r\n" + _JSON
_LENGTH: Final = b"Content-Length: "
_PHRASES: Final = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 408: "Request Timeout",
    409: "Conflict", 410: "Gone", 413: "Content Too Large", 422: "Unprocessable Content", 429: "Too Many Requests",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


@dataclass(slots=True)
class Head:
    """What the head of a request says, and what follows from it."""

    kind: str  # the path's type of message, "" for MESSAGE_PATH; of a foreign route its name
    peer: Peer
    foreign: bool = False  # a route that is not the link's: its bodies and answers pass as they are
    headers: dict[bytes, bytes] = field(default_factory=dict)  # by lower-case name; the last of a name
    length: int = 0
    chunked: bool = False
    keep_alive: bool = True
    expects: bool = False  # waits for 100 Continue before it sends the body
    interim: bool = False  # wants 102 as a sign of life
    extra: bytes = b""  # header lines that each answer to this head gets
    refusal: tuple[int, str] | None = None
    simple: bool = False  # a whole message with a Content-Length on a line that is kept: nothing to look at twice
    binary_start: bytes = _BINARY_OK + _LENGTH  # how a plain answer begins, up to the number of its bytes
    text_start: bytes = _JSON_OK + _LENGTH


class RequestLine:
    """One request that waits for its answer."""

    __slots__ = ("_connection", "answer", "head", "last", "peer")
    persistent: bool = False
    hears: bool = False

    def __init__(self, connection: HttpProtocol, head: Head) -> None:
        self.peer = head.peer
        self.head = head
        self.answer: tuple[bytes, ...] | None = None  # what goes out, once it is known; () where the line ends instead
        self.last = not head.keep_alive  # the connection ends with this answer
        self._connection = connection

    def route(self, lease: str) -> str:
        """The path is the same for all; a proxy can go by the header Longrein-Lease."""
        return ""

    def send(self, message: Buffer, *, final: bool = True) -> None:
        """Answer. A second answer to one request is dropped; what is not final becomes a 102."""
        if self.answer is None:
            if final:
                self._connection.answer(self, message)
            else:
                self._connection.sign_of_life(message)

    def reply(self, status: int, body: bytes) -> None:
        """Answer a foreign route with a JSON object."""
        if self.answer is None:
            self._connection.answer(self, body, status)

    def close(self, reason: str = "") -> None:
        """End the connection in place of an answer. Nothing happens once the answer is given."""
        if self.answer is None:
            self._connection.end_at(self)


class HttpProtocol(asyncio.Protocol):
    """The server's end of one connection."""

    def __init__(self, listener: HttpListener) -> None:
        self._listener = listener
        self._options = listener.options
        self._received: Callable[[Any, Buffer], None] = listener.handler.received
        self._transport: asyncio.Transport = None  # type: ignore[assignment]  # set by connection_made, which is first
        self._peer = Peer("")
        self._heads: dict[bytes, Head] = {}
        self._lines: deque[RequestLine] = deque()  # without an answer that has gone out, oldest first
        self._rest = b""  # what came and is not taken yet
        self._head: Head | None = None  # of the request whose body is underway
        self._body = bytearray()
        self._chunks: Chunks | None = None
        self._since = 0.0  # when the request that is not whole yet began; 0: none is underway
        self._ending = False  # nothing more is taken
        self._handing_over = False
        self._full = False  # the client does not read its answers
        self._paused = False

    # -------------------------------------------------------------------------------- what asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # no pipe comes here
        self._transport = transport
        # A client with a window of requests may write while large answers wait: pausing early would lock both.
        transport.set_write_buffer_limits(high=self._options.max_message_bytes)
        line = transport.get_extra_info("socket")
        if line is not None and line.family != getattr(socket, "AF_UNIX", None):
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._peer = Peer(address_of(transport), None, subject_of(transport.get_extra_info("peercert")))
        self._since = self._listener.now()
        self._listener.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._listener.connections.discard(self)
        self._ending = True
        lines, self._lines = self._lines, deque()
        for line in lines:
            if not line.answer:
                line.answer = ()
                self._listener.handler.lost(line)

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        if not self._rest and self._head is None:
            # The common case in few words, each of which costs a step: one whole request, with a head seen before.
            end = data.find(b"\r\n\r\n") + 4
            head = self._heads.get(data[:end])
            if head is not None and head.simple and len(data) - end == head.length and not self._lines:
                self._since = 0.0
                line = RequestLine(self, head)
                self._lines.append(line)
                self._received(line, data[end:])
                return
        self._advance(self._rest + data if self._rest else data)

    def eof_received(self) -> None:
        """The end, even if the client would still read: a closed client looks the same, and would be kept for ever."""

    def pause_writing(self) -> None:
        self._full = True
        self._hold()

    def resume_writing(self) -> None:
        self._full = False
        self._listener.loop.call_soon(self._go_on)

    # -------------------------------------------------------------------------------------- reading requests

    def _advance(self, data: bytes) -> None:
        """Take what is whole in `data`, keep the rest."""
        start = 0
        size = len(data)
        self._rest = b""
        while start < size and not self._ending:
            if self._head is not None:
                start = self._take_body(data, start)
                continue
            if self._full or self._handing_over or len(self._lines) >= PENDING:
                self._rest = data[start:]
                self._hold()
                return
            end = data.find(b"\r\n\r\n", start) + 4
            if end < 4 or end - start > HEAD_BYTES:
                self._rest = data[start:]
                self._check_partial(self._rest)
                break
            text = data[start:end]
            head = self._heads.get(text)
            if head is None:
                head = self._read_head(text)
                if head is None:  # of another kind: the application's from here on
                    self._rest = data[start:]
                    self._hand_over()
                    return
            start = end
            if head.refusal is not None:
                self._refuse(*head.refusal, head)
                return
            stop = start + head.length
            if stop <= size and not head.chunked:
                self._since = 0.0
                self._deliver(head, memoryview(data)[start:stop])
                start = stop
                continue
            self._head = head
            self._body = bytearray()
            if head.chunked:
                self._chunks = Chunks(self._options.max_message_bytes)
            if head.expects and not self._lines and start == size:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if (self._rest or self._head is not None) and not self._since:
            self._since = self._listener.now()

    def _take_body(self, data: bytes, start: int) -> int:
        """Take bytes of the body that is underway; the index of the first byte behind it."""
        head = self._head
        assert head is not None
        if self._chunks is not None:
            try:
                start = self._chunks.feed(data, start)
            except BodyTooLarge as error:
                self._refuse(413, str(error), head)
                return len(data)
            except BadFraming as error:
                self._refuse(400, str(error), head)
                return len(data)
            if not self._chunks.done:
                return start
            body, self._chunks = self._chunks.body, None
        else:
            stop = min(len(data), start + head.length - len(self._body))
            self._body += memoryview(data)[start:stop]
            start = stop
            if len(self._body) < head.length:
                return start
            body, self._body = self._body, bytearray()
        self._head = None
        self._since = 0.0
        self._deliver(head, body)
        return start

    def _deliver(self, head: Head, body: Buffer) -> None:
        line = RequestLine(self, head)
        self._lines.append(line)
        if not head.keep_alive:
            self._ending = True  # its last request: what follows is not taken
        if head.foreign:
            pass
        elif head.kind:
            try:
                body = http_json.to_message(head.kind, body, head.headers)
            except http_json.BadBody as error:
                line.send(http_json.fault("bad_message", str(error)))
                return
        elif not len(body):
            line.send(http_json.fault("bad_message", "the body is empty: it must be one message"))
            return
        self._received(line, body)

    def _check_partial(self, data: bytes) -> None:
        """Refuse what can become no request, without waiting for its end."""
        if len(data) > HEAD_BYTES:
            self._refuse(431, f"a head of more than {HEAD_BYTES} bytes")
            return
        first, whole, _ = data.lstrip(b"\r\n")[:4096].partition(b"\n")
        method, space, _ = first.partition(b" ")
        names_method = method.replace(b"-", b"").isalpha() and method.isupper() and len(method) <= 32
        if (first and not names_method) or (whole and not (space and b" HTTP/1." in first and first.endswith(b"\r"))):
            self._refuse(400, "this is not HTTP/1.1")

    def _read_head(self, text: bytes) -> Head | None:
        """The head's meaning; None where it is the application's to answer."""
        routes, foreign = (self._listener.routes, True) if self._listener.routes else (http_json.PATHS, False)
        if not text.startswith(b"POST /" if foreign else b"POST /v1/"):
            return None
        reader = HeadReader()
        try:
            reader.read(text)
        except httptools.HttpParserError as error:
            return Head("", self._peer, refusal=(400, f"this is not HTTP/1.1: {error}"), keep_alive=False)
        kind = routes.get(reader.url)
        if kind is None:
            return None
        head = self._judge(kind, reader)
        head.foreign = foreign
        head.simple = head.simple and not (kind and not foreign)
        # Without a bound on both, a client could have us keep any number of bytes for it.
        if len(text) < 2048:
            if len(self._heads) >= _HEADS_KEPT:
                self._heads.clear()
            self._heads[text] = head
        return head

    def _judge(self, kind: str, reader: HeadReader) -> Head:
        headers = dict(reader.headers)
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        peer = self._peer
        if scheme.lower() == b"bearer":
            peer = Peer(peer.address, token.strip().decode("latin-1"), peer.certificate)
        head = Head(kind, peer, headers=headers, keep_alive=reader.keep_alive)
        head.interim = headers.get(b"longrein-interim") == b"102"
        head.expects = headers.get(b"expect", b"").lower() == b"100-continue"
        origin = headers.get(b"origin")
        if origin is not None:
            allowed = self._options.allowed_origins
            if "*" not in allowed and origin.decode("latin-1") not in allowed:
                head.refusal = 403, f"the origin {origin.decode('latin-1')[:200]} is not allowed here"
                return head
            head.extra = b"Access-Control-Allow-Origin: %b\r\nVary: Origin\r\n" % origin
        try:
            head.length = content_length(headers.get(b"content-length", b"0"))
        except BadFraming as error:
            head.refusal = 400, str(error)
            return head
        coding = headers.get(b"transfer-encoding")
        if coding is not None:
            head.chunked = True
            if coding.lower() != b"chunked":
                head.refusal = 501, "the only transfer coding understood is 'chunked'"
            elif b"content-length" in headers:
                head.refusal = 400, "Content-Length beside Transfer-Encoding"
        elif head.length > self._options.max_message_bytes:
            head.refusal = 413, f"a body of {head.length} bytes; the limit is {self._options.max_message_bytes}"
        head.simple = head.refusal is None and not (head.chunked or not head.length) and head.keep_alive
        head.binary_start = _BINARY_OK + head.extra + _LENGTH
        head.text_start = _JSON_OK + head.extra + _LENGTH
        return head

    # ------------------------------------------------------------------------------------------ writing answers

    def answer(self, line: RequestLine, message: Buffer, status: int = 200) -> None:
        """The answer to one request: out now if it is the oldest, kept until then otherwise."""
        lines = self._lines
        head = line.head
        text = message[:1] == b"{"
        size = len(message)
        alone = len(lines) == 1 and lines[0] is line
        if head.simple and status == 200 and size <= _JOIN_BYTES and alone and not line.last:
            line.answer = _SENT
            if not self._transport.is_closing():
                lines.clear()
                start = head.text_start if text else head.binary_start
                self._transport.write(b"%b%d\r\n\r\n%b" % (start, size, message))  # type: ignore[str-format]  # %b takes any buffer
                if self._paused:
                    self._listener.loop.call_soon(self._go_on)
            return
        if head.kind and text and not head.foreign:
            status = http_json.status_of(message)
        if status != 200:
            first = b"HTTP/1.1 %d %b\r\n%b" % (status, _PHRASES[status].encode(), _JSON)
        else:
            first = _JSON_OK if text else _BINARY_OK
        close = b"Connection: close\r\n" if line.last else b""
        start = b"%b%b%b%b%d\r\n\r\n" % (first, head.extra, close, _LENGTH, size)
        if size <= _JOIN_BYTES:
            line.answer = (start + message,)
        else:
            # The transport may keep what it cannot write at once: the handler's buffer must not change under it.
            line.answer = start, message if type(message) is bytes else bytes(message)
        if lines and lines[0] is line:
            self._flush()

    def sign_of_life(self, message: Buffer) -> None:
        """To the oldest request: HTTP knows no other place for it."""
        if self._lines and self._lines[0].head.interim and not self._full and not self._transport.is_closing():
            carried = b"Longrein-Message: %b\r\n" % base64.b64encode(message) if len(message) <= _CARRIED_BYTES else b""
            self._transport.write(b"HTTP/1.1 102 Processing\r\n%b\r\n" % carried)

    def end_at(self, line: RequestLine) -> None:
        """End the connection when all requests before this one are answered."""
        line.answer = ()
        self._ending = True
        self._flush()

    def _flush(self) -> None:
        lines, transport = self._lines, self._transport
        if transport.is_closing():
            return
        while lines and (answer := lines[0].answer) is not None:
            if not answer:  # it stays in the row, for connection_lost to tell the handler
                transport.close()
                return
            for part in answer:
                transport.write(part)
            if lines.popleft().last:
                transport.close()
                return
        if self._paused and (not lines or len(lines) < PENDING // 2):
            self._listener.loop.call_soon(self._go_on)

    def _refuse(self, status: int, text: str, head: Head | None = None) -> None:
        """Answer with a status in place of the handler, and end the connection after it."""
        self._ending = True
        self._rest, self._head, self._chunks, self._body = b"", None, None, bytearray()
        body = text.encode()
        line = RequestLine(self, Head("", self._peer))
        line.answer = (
            b"HTTP/1.1 %d %b\r\nContent-Type: text/plain; charset=utf-8\r\n%bContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n%b"
            % (status, _PHRASES[status].encode(), head.extra if head is not None else b"", len(body), body),
        )
        self._lines.append(line)
        self._flush()
        if not self._lines:
            self._linger()
        else:
            line.last = True  # goes out behind the answers that are still due

    def _linger(self) -> None:
        """Let the refusal arrive: read on and drop it for a moment, since closing with unread bytes resets the line."""
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):
                self._transport.write_eof()
        self._listener.loop.call_later(_LINGER_SECONDS, self._transport.close)

    # ------------------------------------------------------------------------------------- holding, handing over

    def _hold(self) -> None:
        """Read no more for now: what is wrong is the client's to mend, or comes with the next answer."""
        self._since = 0.0
        if not self._paused and not self._transport.is_closing():
            self._paused = True
            self._transport.pause_reading()

    def _go_on(self) -> None:
        if not self._paused or self._transport.is_closing() or self._full:
            return
        if self._handing_over:
            self._hand_over()
            return
        if len(self._lines) >= PENDING:
            return
        self._paused = False
        self._transport.resume_reading()
        if not self._ending and self._rest:
            self._advance(self._rest)

    def _hand_over(self) -> None:
        """Give the connection to the application for good, once all answers are out."""
        self._handing_over = True
        if self._lines:
            self._hold()
            return
        self._ending = True
        self._listener.connections.discard(self)
        data, self._rest = self._rest, b""
        self._listener.application.take_over(self._transport, self._peer, data)
        if self._paused:
            self._transport.resume_reading()

    def overdue(self, now: float) -> bool:
        """Whether a request is underway for too long."""
        return 0.0 < self._since < now - REQUEST_SECONDS

    def expire(self) -> None:
        """End a connection whose request does not get whole."""
        if self._ending:
            self._transport.abort()
        else:
            self._refuse(408, f"no whole request within {REQUEST_SECONDS:g} s")

    def close(self) -> None:
        """The listener closes."""
        self._ending = True
        self._transport.close()

    def abort(self) -> None:
        """The listener has closed, and the client does not read."""
        self._transport.abort()


class HeadReader:
    """One head, read by httptools. httptools holds it to the grammar; which headers may meet is judged above."""

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self.keep_alive = False
        self._parser = httptools.HttpRequestParser(self)

    def read(self, text: bytes) -> None:
        """`text` is the head with its empty line. Raises httptools.HttpParserError."""
        with contextlib.suppress(httptools.HttpParserUpgrade):  # an offer, which a server may leave
            self._parser.feed_data(text)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.keep_alive = self._parser.should_keep_alive() and self._parser.get_http_version() == "1.1"


def address_of(transport: asyncio.BaseTransport) -> str:
    """host:port of the far end; "unix" where it has none."""
    name = transport.get_extra_info("peername")
    return f"{name[0]}:{name[1]}" if isinstance(name, tuple) else "unix"


_SHORT: Final = {
    "commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C",
    "stateOrProvinceName": "ST", "localityName": "L", "emailAddress": "emailAddress",
}  # fmt: skip


def subject_of(certificate: dict[str, Any] | None) -> str | None:
    """The subject of a verified certificate, as "CN=alice,O=lab"; None where there is none.

    certificate: as SSLSocket.getpeercert() gives it, which is empty for one that was not verified.
    """
    if not certificate:
        return None
    pairs = [pair for part in certificate.get("subject", ()) for pair in part]
    escaped = [(_SHORT.get(name, name), value.replace("\\", "\\\\").replace(",", "\\,")) for name, value in pairs]
    return ",".join(f"{name}={value}" for name, value in escaped)
