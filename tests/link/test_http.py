"""The HTTP transport: framing, order, refusals, the paths for curl, the application, TLS, and what hostile bytes do."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrein.errors import (
    ConnectError,
    ConnectionClosed,
    Forbidden,
    NotFound,
    RemoteProtocolError,
    TooLarge,
    Unauthenticated,
)
from longrein.link import codec
from longrein.link import messages as m
from longrein.link.protocol import FAULTS
from longrein.link.transports import ConnectOptions, Line, ListenOptions, http, http_json, http_server, parse_url
from longrein.link.transports.http_framing import BadFraming, BodyTooLarge, Chunks
from longrein.link.transports.http_server import subject_of

BINARY = b"LR\x01\x00 and some bytes"


class Fake:
    """A handler that answers at once with what came, unless `answer` says otherwise."""

    def __init__(self, answer: Callable[[Line, bytes], None] | None = None) -> None:
        self._answer = answer
        self.came: list[tuple[Line, bytes]] = []
        self.gone: list[Line] = []
        self.load = 0
        self.ready = True

    def received(self, line: Line, message: bytes | bytearray | memoryview) -> None:
        kept = bytes(message)
        self.came.append((line, kept))
        if self._answer is not None:
            self._answer(line, kept)
        else:
            line.send(kept)

    def lost(self, line: Line) -> None:
        self.gone.append(line)

    def describe(self) -> dict[str, Any]:
        return {"server": "fake <1>", "environments": ["CartPole-v1"]}

    def metrics(self) -> bytes:
        return b"longrein_steps_total 7\n"


class Serving:
    """A listener with its loop in a thread."""

    def __init__(self, handler: Any, url: str, options: ListenOptions, new_loop: Callable[[], Any]) -> None:
        self.handler = handler
        self.loop: asyncio.AbstractEventLoop = new_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.listener: Any = http.listen(parse_url(url)[0], options)
        try:
            self.call(self.listener.start(handler))
        except BaseException:
            self._stop()
            raise
        self.url: str = self.listener.url
        self._lines: list[Any] = []

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def soon(self, function: Callable[..., Any], *args: Any) -> None:
        self.loop.call_soon_threadsafe(function, *args)

    def connect(self, **options: Any) -> Any:
        self._lines.append(http.connect(parse_url(self.url)[0], ConnectOptions(**options)))
        return self._lines[-1]

    def raw(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        line = socket.create_connection((host, int(port)), 5)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines.append(line)
        return line

    def close(self) -> None:
        self.call(self.listener.close())
        self.call(self.listener.close())  # twice is allowed
        for line in self._lines:
            line.close()
        self._stop()

    def _stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self.loop.close()


LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@contextlib.contextmanager
def serving(
    handler: Any = None, url: str = "http://127.0.0.1:0", loop: str = "uvloop", **options: Any
) -> Iterator[Serving]:
    server = Serving(handler or Fake(), url, ListenOptions(**options), LOOPS[loop])
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(params=list(LOOPS))
def server(request: pytest.FixtureRequest) -> Iterator[Serving]:
    with serving(loop=request.param) as server:
        yield server


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def read_response(line: socket.socket, kept: bytearray | None = None) -> tuple[int, dict[str, str], bytes]:
    """One response; what came after it stays in `kept`."""
    data = kept if kept is not None else bytearray()
    while b"\r\n\r\n" not in data:
        more = line.recv(65536)
        assert more, f"closed after {bytes(data)!r}"
        data += more
    head, _, rest = bytes(data).partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (each.split(": ", 1) for each in lines)}
    size = int(headers.get("content-length", 0))
    while len(rest) < size:
        more = line.recv(65536)
        assert more
        rest += more
    data[:] = rest[size:]
    return int(first.split()[1]), headers, rest[:size]


def ask(connection: Any, message: bytes) -> bytearray | None:
    """One request and its answer."""
    connection.send(message)
    answer: bytearray | None = connection.receive(5)
    return answer


def closed(line: socket.socket) -> bool:
    """Whether the server has closed: reads what is left."""
    try:
        while line.recv(65536):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def wait_for(condition: Callable[[], Any], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------------- the contract


def test_a_message_comes_back_in_memory_of_its_own(server: Serving) -> None:
    connection = server.connect()
    connection.send(BINARY)
    first = connection.receive(5)
    assert first == BINARY
    assert type(first) is bytearray
    connection.send(b"LR other")
    assert connection.receive(5) == b"LR other"
    first[0] = 0  # the caller's to write to
    connection.close()
    connection.close()
    with pytest.raises(ConnectionClosed):
        connection.send(BINARY)
    with pytest.raises(ConnectionClosed):
        connection.receive(0)
    assert connection.fileno() == -1


@pytest.mark.parametrize("size", [1, 65_000, 65_536, 70_000, 1_000_000, 9_000_000])
@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_any_size_passes(server: Serving, size: int, buffer: Callable[[bytes], Any]) -> None:
    message = b"L" + os.urandom(size - 1)
    connection = server.connect()
    connection.send(buffer(message))
    assert connection.receive(10) == message
    connection.close()


def test_json_and_binary_are_told_apart_by_the_first_byte() -> None:
    with serving() as server:
        connection = server.connect()
        for message in (b'{"type":"ping"}', BINARY):
            connection.send(message)
            assert connection.receive(5) == message
        line = server.raw()
        line.sendall(post("/v1/message", b'{"a":1}') + post("/v1/message", BINARY))
        kept = bytearray()
        assert read_response(line, kept)[1]["content-type"] == "application/json"
        assert read_response(line, kept)[1]["content-type"] == "application/vnd.longrein"
        line.close()


def test_nothing_within_the_timeout_is_none_and_the_answer_still_comes() -> None:
    fake = Fake(lambda line, message: None)
    with serving(fake) as server:
        connection = server.connect()
        connection.send(BINARY)
        assert connection.receive(0) is None
        started = time.monotonic()
        assert connection.receive(0.05) is None
        assert 0.04 < time.monotonic() - started < 1
        server.soon(fake.came[0][0].send, b"LR late")
        assert connection.receive(None) == b"LR late"
        connection.close()


def test_fileno_is_readable_when_an_answer_is_there(server: Serving) -> None:
    import select

    connection = server.connect()
    assert select.select([connection.fileno()], [], [], 0)[0] == []
    connection.send(BINARY)
    assert select.select([connection.fileno()], [], [], 5)[0]
    assert connection.receive(0) == BINARY
    connection.close()


def test_pipelined_requests_are_answered_in_order_however_late_the_first() -> None:
    fake = Fake(lambda line, message: None)
    with serving(fake) as server:
        connection = server.connect()
        for message in (b"LR 1", b"LR 2", b"LR 3"):
            connection.send(message)
        wait_for(lambda: len(fake.came) == 3)
        lines = [line for line, _ in fake.came]
        assert len(set(lines)) == 3
        assert not lines[0].persistent
        server.soon(lines[2].send, b"LR c")
        server.soon(lines[1].send, b"LR b")
        assert connection.receive(0.05) is None
        server.soon(lines[0].send, b"LR a")
        server.soon(lines[0].send, b"LR a second answer is dropped")
        assert [connection.receive(5) for _ in range(3)] == [b"LR a", b"LR b", b"LR c"]
        assert connection.receive(0.05) is None
        connection.close()


def test_more_pipelined_requests_than_may_wait_are_all_answered_in_the_end() -> None:
    fake = Fake(lambda line, message: None)
    with serving(fake) as server:
        line = server.raw()
        count = 3 * http_server.PENDING
        line.sendall(b"".join(post("/v1/message", b"L%d" % n) for n in range(count)))
        wait_for(lambda: len(fake.came) == http_server.PENDING)
        time.sleep(0.05)
        assert len(fake.came) == http_server.PENDING
        kept = bytearray()
        for n in range(count):
            wait_for(functools.partial(lambda n: len(fake.came) > n, n))
            server.soon(fake.came[n][0].send, fake.came[n][1])
            assert read_response(line, kept)[2] == b"L%d" % n
        line.close()


def test_what_is_not_final_is_a_sign_of_life() -> None:
    def answer(line: Line, message: bytes) -> None:
        line.send(b"LR working", final=False)
        line.send(b"LR working", final=False)
        if b"long" in message:
            line.send(b"L" * 5000, final=False)
        line.send(message)

    with serving(Fake(answer)) as server:
        connection = server.connect()
        connection.send(BINARY)
        assert [connection.receive(5) for _ in range(3)] == [b"LR working", b"LR working", BINARY]
        connection.close()
        connection = server.connect()
        connection.send(b"LR long")
        assert [connection.receive(5) for _ in range(4)][2:] == [b"", b"LR long"]
        # Many clients take a 102 for the answer: only who asks for it gets it.
        line = server.raw()
        line.sendall(post("/v1/message", BINARY))
        assert read_response(line)[0] == 200
        line.sendall(post("/v1/message", BINARY, "Longrein-Interim: 102"))
        kept = bytearray()
        assert [read_response(line, kept)[0] for _ in range(3)] == [102, 102, 200]
        line.close()


def test_the_handler_hears_of_a_lost_line_only_while_an_answer_is_due() -> None:
    fake = Fake(lambda line, message: line.send(message) if b"now" in message else None)
    with serving(fake) as server:
        connection = server.connect()
        connection.send(b"LR now")
        assert connection.receive(5) == b"LR now"
        connection.send(b"LR later")
        wait_for(lambda: len(fake.came) == 2)
        connection.close()
        wait_for(lambda: fake.gone)
        assert fake.gone == [fake.came[1][0]]
        server.soon(fake.came[1][0].send, b"LR to nobody")
        server.soon(fake.came[1][0].close)


def test_closing_a_line_closes_the_connection() -> None:
    fake = Fake(lambda line, message: line.close("enough"))
    with serving(fake) as server:
        connection = server.connect()
        connection.send(BINARY)
        with pytest.raises(ConnectionClosed):
            connection.receive(5)
        wait_for(lambda: fake.gone)
        assert fake.gone == [fake.came[0][0]]


def test_closing_the_listener_closes_the_lines() -> None:
    with serving(Fake(lambda line, message: None)) as server:
        connection = server.connect()
        connection.send(BINARY)
        server.call(server.listener.close())
        with pytest.raises(ConnectionClosed):
            connection.receive(5)
        with pytest.raises(ConnectError, match="no server listens"):
            server.connect()


def test_a_line_that_idled_away_is_closed_for_the_caller_to_open_again() -> None:
    with serving() as server:
        connection = server.connect()
        connection.send(BINARY)
        connection.receive(5)
        for each in list(server.listener.connections):
            server.soon(each.close)
        wait_for(lambda: not server.listener.connections)
        with pytest.raises(ConnectionClosed):
            ask(connection, BINARY)


def test_the_token_and_the_address_reach_the_handler() -> None:
    fake = Fake()
    with serving(fake) as server:
        connection = server.connect(token="s3cret%d")
        connection.send(BINARY)
        assert connection.receive(5) == BINARY
        peer = fake.came[0][0].peer
        assert peer.token == "s3cret%d"
        assert peer.address.startswith("127.0.0.1:")
        assert peer.certificate is None
        connection.close()


def test_a_lease_is_named_in_a_header_once_it_has_a_route() -> None:
    head: list[bytes] = []
    with canned(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nL", head) as url:
        connection = http.connect(parse_url(url)[0], ConnectOptions())
        connection.route("", "a-lease")
        connection.send(BINARY)
        assert bytes(connection.receive(5) or b"") == b"L"
        connection.close()
    assert b"\r\nLongrein-Lease: a-lease\r\n" in head[0]


def test_a_unix_socket_serves_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()  # as a killed server leaves it
    for loop in LOOPS:
        with serving(url=f"http+unix://{path}", loop=loop) as server:
            connection = server.connect()
            connection.send(BINARY)
            assert connection.receive(5) == BINARY
            connection.close()
            with pytest.raises(ConnectError, match="another server"):
                Serving(Fake(), f"http+unix://{path}", ListenOptions(), asyncio.new_event_loop)
        assert not path.exists()
    with pytest.raises(ConnectError, match="no server listens"):
        http.connect(parse_url(f"http+unix://{path}")[0], ConnectOptions())


# ------------------------------------------------------------------------------------------------- opening, failing


def test_a_refused_line_says_where_and_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectError, match=rf"no server listens at 127.0.0.1:{port}") as refusal:
        http.connect(parse_url(f"http://127.0.0.1:{port}/CartPole-v1")[0], ConnectOptions())
    assert "longrein serve CartPole-v1 --at" in refusal.value.hint


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b"])
def test_an_unknown_name_is_a_connect_error(host: str) -> None:
    with pytest.raises(ConnectError, match=r"is not known|no host's name"):
        http.connect(parse_url(f"http://{host}:5000")[0], ConnectOptions(timeout=2))


def test_a_token_that_no_header_can_carry_is_refused() -> None:
    with pytest.raises(ConnectError, match="token"):
        http.connect(parse_url("http://127.0.0.1:1")[0], ConnectOptions(token="a\r\nX: y"))


def test_a_taken_port_is_a_connect_error() -> None:
    with serving() as server, pytest.raises(ConnectError, match="another server listens"):
        Serving(Fake(), server.url, ListenOptions(), asyncio.new_event_loop)
    with pytest.raises(ConnectError, match="certificate"):
        http.listen(parse_url("https://127.0.0.1:0")[0], ListenOptions())


@contextlib.contextmanager
def canned(answer: bytes, heads: list[bytes] | None = None, pieces: int = 0) -> Iterator[str]:
    """A server that answers anything with the same bytes, `pieces` at a time, and closes."""
    listening = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with contextlib.suppress(OSError), listening.accept()[0] as line:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            data = line.recv(65536)
            if heads is not None:
                heads.append(data)
            for start in range(0, len(answer), pieces or len(answer) or 1):
                line.sendall(answer[start : start + (pieces or len(answer) or 1)])
                time.sleep(0.001 if pieces else 0)
            line.shutdown(socket.SHUT_WR)
            line.recv(1)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()
        thread.join(5)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, Unauthenticated), (403, Forbidden), (404, NotFound), (413, TooLarge), (500, ConnectionClosed),
        (503, ConnectionClosed), (302, RemoteProtocolError), (400, RemoteProtocolError), (101, RemoteProtocolError),
    ],
)  # fmt: skip
def test_a_status_other_than_200_is_the_fitting_error(status: int, error: type[Exception]) -> None:
    with canned(b"HTTP/1.1 %d Why\r\nContent-Length: 4\r\n\r\nsaid" % status) as url:
        connection = http.connect(parse_url(url)[0], ConnectOptions())
        connection.send(BINARY)
        with pytest.raises(error):
            connection.receive(5)
        connection.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9\r\n", b"\x15\x03\x01\x00\x02\x02F", b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nup to the end", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b"HTT",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", b"HTTP/1.1 abc\r\n\r\n", b"",
    ],
)  # fmt: skip
def test_an_answer_that_is_no_http_closes_the_line(answer: bytes) -> None:
    with canned(answer) as url:
        connection = http.connect(parse_url(url)[0], ConnectOptions())
        connection.send(BINARY)
        with pytest.raises(ConnectionClosed):
            connection.receive(5)
        with pytest.raises(ConnectionClosed):
            connection.send(BINARY)


@pytest.mark.parametrize("pieces", [0, 1, 7])
def test_the_client_reads_chunks_interims_and_odd_headers(pieces: int) -> None:
    answer = (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nLongrein-Message: *\r\n\r\n"
        b"HTTP/1.1 200\r\ntransfer-ENCODING:  Chunked\r\n\r\n3\r\nLR \r\n4;ext=1\r\nmore\r\n0\r\nTrailer: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\nCONTENT-LENGTH:2\r\nConnection: close\r\n\r\nL2"
    )
    with canned(answer, pieces=pieces) as url:
        connection = http.connect(parse_url(url)[0], ConnectOptions())
        connection.send(BINARY)
        assert [bytes(connection.receive(5) or b"") for _ in range(4)] == [b"", b"", b"LR more", b"L2"]
        with pytest.raises(ConnectionClosed, match="ended it"):
            connection.receive(5)


def test_an_answer_over_the_clients_limit_is_too_large() -> None:
    for answer in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n",
    ):
        with canned(answer) as url:
            connection = http.connect(parse_url(url)[0], ConnectOptions(max_message_bytes=999))
            connection.send(BINARY)
            with pytest.raises(TooLarge):
                connection.receive(5)


# ------------------------------------------------------------------------------------------- requests, byte by byte


def test_a_request_may_come_byte_by_byte(server: Serving) -> None:
    line = server.raw()
    data = post("/v1/message", BINARY) + post("/v1/message", b"LR 2") + post("/healthz", b"")
    for index in range(len(data)):
        line.sendall(data[index : index + 1])
    kept = bytearray()
    assert read_response(line, kept)[2] == BINARY
    assert read_response(line, kept)[2] == b"LR 2"
    assert read_response(line, kept)[0] == 405
    line.close()


def test_a_chunked_body_is_one_message_in_any_cut(server: Serving) -> None:
    head = b"POST /v1/message HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"3\r\nLR \r\n00a;x=y\r\n0123456789\r\n0\r\nSome: trailer\r\n\r\n" + post("/v1/message", b"LR after")
    line = server.raw()
    for step in (len(data), 1, 5):
        for start in range(0, len(data), step):
            line.sendall(data[start : start + step])
        kept = bytearray()
        assert read_response(line, kept)[2] == b"LR 0123456789"
        assert read_response(line, kept)[2] == b"LR after"
    line.close()


@given(body=st.binary(max_size=300), cuts=st.lists(st.integers(1, 60), max_size=12), tail=st.binary(max_size=20))
def test_chunks_give_back_the_body_and_stop_at_its_end(body: bytes, cuts: list[int], tail: bytes) -> None:
    wire, rest = b"", body
    for cut in cuts:
        if rest[:cut]:
            wire += b"%x\r\n%b\r\n" % (len(rest[:cut]), rest[:cut])
        rest = rest[cut:]
    wire += (b"%X\r\n%b\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"
    whole = Chunks(300)
    assert whole.feed(wire + tail) == len(wire)
    assert whole.done
    assert whole.body == body
    pieces = Chunks(300)
    for index in range(len(wire)):
        pieces.feed(wire[index : index + 1])
    assert pieces.done
    assert pieces.body == body


@pytest.mark.parametrize(
    "wire", [b"-1\r\n", b"0x3\r\n", b"1_0\r\n", b"\r\n", b"3\nabc", b"2\r\nabc\r\n", b"1;" + b"x" * 5000]
)
def test_chunks_that_two_readers_could_read_differently_are_refused(wire: bytes) -> None:
    with pytest.raises(BadFraming):
        Chunks(10**9).feed(wire)
    with pytest.raises(BodyTooLarge):
        Chunks(9).feed(b"a\r\n")


def test_a_body_over_the_limit_is_refused_before_it_is_sent() -> None:
    fake = Fake()
    with serving(fake, max_message_bytes=1000) as server:
        for wire in (
            b"POST /v1/message HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n",
            b"POST /v1/message HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n",
            post("/v1/step", b"{" * 1001),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST /v1/message HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\nPOST /v1/message HTTP/1.1\r\nHost: x\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
        ):
            line = server.raw()
            line.sendall(wire)
            kept = bytearray()
            response = read_response(line, kept)
            if wire.startswith(b"GET"):
                response = read_response(line, kept)
            assert response[0] == 413
            assert response[1]["connection"] == "close"
            assert closed(line)
        connection = server.connect()
        connection.send(b"L" * 1000)
        assert connection.receive(5) == b"L" * 1000
        with pytest.raises(TooLarge, match="1001"):
            ask(connection, b"L" * 1001)
        connection = server.connect()
        with pytest.raises(TooLarge):  # while we are still writing
            ask(connection, b"L" * 30_000_000)
        assert len(fake.came) == 1


def test_a_client_that_expects_100_gets_it(server: Serving) -> None:
    line = server.raw()
    line.sendall(b"POST /v1/message HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    assert read_response(line)[0] == 100
    line.sendall(b"LR e")
    assert read_response(line)[2] == b"LR e"
    line.close()


def test_a_client_that_wants_no_other_answer_is_let_go(server: Serving) -> None:
    for wire in (
        post("/v1/message", BINARY, "Connection: close"),
        b"POST /v1/message HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(BINARY), BINARY),
    ):
        line = server.raw()
        line.sendall(wire + post("/v1/message", b"LR not taken"))
        status, headers, body = read_response(line)
        assert (status, headers["connection"], body) == (200, "close", BINARY)
        assert closed(line)


# ------------------------------------------------------------------------------------------------------- hostile bytes


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00", 400), (b"hello\r\n", 400), (b"GET\r\n", 400), (b"\x00" * 50, 400),
        (b"POST /v1/message HTTP/1.1\nHost: x\n", 400), (b"{}", 400), (b"GET / FTP/1.1\r\n\r\n", 400),
        (b"POST /v1/message HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n", 400),
        (b"POST /v1/message HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
        (b"POST /v1/message HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST /v1/message HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"POST /v1/message HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"POST /v1/message HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST /v1/message HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /v1/message HTTP/1.1\r\nX: " + b"a" * 70_000, 431),
        (b"POST /v1/message HTTP/1.1\r\n" + b"X: a\r\n" * 15_000, 431),
        (b"POST /v1/" + b"a" * 70_000, 431),
    ],
)  # fmt: skip
def test_what_is_no_request_gets_a_status_and_the_end(server: Serving, wire: bytes, status: int) -> None:
    line = server.raw()
    line.sendall(wire)
    got, headers, _ = read_response(line)
    assert got == status
    assert headers["connection"] == "close"
    assert closed(line)
    assert server.handler.came == []


def flood(line: socket.socket) -> bool:
    """Whether the server closes within three seconds of headers that do not end."""
    try:
        for _ in range(300):
            line.sendall(b"X: " + b"a" * 10_000 + b"\r\n")
            time.sleep(0.01)
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_flood_of_headers_is_cut_off(first: bytes) -> None:
    with serving() as server:
        line = server.raw()
        line.sendall(first)
        if first:
            assert read_response(line)[0] == 200
        line.sendall(b"GET / HTTP/1.1\r\n")
        assert flood(line)
        line.close()


@pytest.mark.parametrize(
    "wire",
    [b"", b"POST /v1/message HT", post("/v1/message", BINARY)[:-1], b"GET /healthz HTTP/1.1\r\n\r\nGET /"],
)
def test_a_request_that_does_not_get_whole_ends_the_line(monkeypatch: pytest.MonkeyPatch, wire: bytes) -> None:
    from longrein.link.transports import http_app, http_listener

    monkeypatch.setattr(http_server, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(http_app, "REQUEST_SECONDS", 0.2)
    monkeypatch.setattr(http_listener, "SWEEP_SECONDS", 0.05)
    fake = Fake()
    with serving(fake) as server:
        patient = server.connect()
        patient.send(BINARY)
        patient.receive(5)
        line = server.raw()
        line.sendall(wire)
        assert closed(line)
        patient.send(BINARY)  # idle between two requests is another thing
        assert patient.receive(5) == BINARY
        patient.close()
    assert len(fake.came) == 2


def test_a_client_that_reads_no_answers_is_not_read_either() -> None:
    fake = Fake(lambda line, message: line.send(b"L" * 1_000_000))
    with serving(fake, max_message_bytes=2_000_000) as server:
        line = server.raw()
        line.settimeout(0.3)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 2000:
                line.sendall(post("/v1/message", b"L" * 20_000))
                sent += 1
        assert sent < 2000
        assert len(fake.came) < 40
        line.settimeout(5)
        kept = bytearray()
        for _ in range(len(fake.came)):
            assert len(read_response(line, kept)[2]) == 1_000_000
        line.close()


@pytest.fixture(scope="module")
def hostile() -> Iterator[Serving]:
    with serving(max_message_bytes=5000) as server:
        yield server


_PIECES = st.sampled_from(
    [
        b"POST /v1/message HTTP/1.1\r\n", b"POST /v1/step HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n", b"\r\n", b"Host: x\r\n",
        b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"Transfer-Encoding: chunked\r\n", b"LRabc", b'{"a": 1}',
        b"5\r\nLRabc\r\n", b"0\r\n\r\n", b"Connection: close\r\n", b"Upgrade: websocket\r\nConnection: Upgrade\r\n",
        b"Expect: 100-continue\r\n", b"OPTIONS /v1/step HTTP/1.1\r\nOrigin: http://a\r\n", b"Longrein-Number: x\r\n",
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    wire=st.one_of(
        st.binary(max_size=200), st.lists(st.one_of(_PIECES, st.binary(max_size=8)), max_size=12).map(b"".join)
    )
)
def test_no_bytes_hurt_the_server(hostile: Serving, wire: bytes) -> None:
    with hostile.raw() as line:
        with contextlib.suppress(OSError):
            line.sendall(wire)
            line.shutdown(socket.SHUT_WR)
        closed(line)
    connection = hostile.connect()
    connection.send(BINARY)
    assert connection.receive(5) == BINARY
    connection.close()


def test_garbage_behind_a_request_of_the_application_is_no_error_of_ours(
    hostile: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        with hostile.raw() as line:
            line.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + post("/v1/message", BINARY) + b"\0\0\0")
            closed(line)
    assert "Traceback" not in caplog.text
    assert "Exception" not in caplog.text


def test_nothing_is_kept_of_a_line_that_is_gone(hostile: Serving) -> None:
    wait_for(lambda: not hostile.listener.connections)


# ------------------------------------------------------------------------------------------------ the paths for curl


def test_a_path_and_headers_are_the_envelope() -> None:
    fake = Fake(lambda line, message: line.send(b'{"type":"stepped","lease":"abc","n":7}'))
    with serving(fake) as server:
        line = server.raw()
        headers = ("Longrein-Lease: abc", "Longrein-Number: 7", "Authorization: bearer T")
        for _ in range(2):  # the second time on the application's side
            line.sendall(post("/v1/step", b'{"actions": [1, 2.5, null]}', *headers))
            status, answer, body = read_response(line)
            assert status == 200
            assert answer["content-type"] == "application/json"
            assert body == b'{"type":"stepped","lease":"abc","n":7}'
            line.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert read_response(line)[0] == 200
        assert len(fake.came) == 2
        for peer_line, message in fake.came:
            assert codec.decode_request(message)[0] == m.Step("abc", 1, 7, [1, 2.5, None])
            assert peer_line.peer.token == "T"
            assert not peer_line.persistent
        line.close()


def test_what_the_body_says_of_the_envelope_goes_first() -> None:
    body = b'{"lease": "b", "epoch": 3, "n": 9, "type": "close"}'
    headers = {b"longrein-lease": b"h", b"longrein-epoch": b"2", b"longrein-number": b"1"}
    assert json.loads(http_json.to_message("reset", body, headers)) == {
        "type": "reset",
        "lease": "b",
        "epoch": 3,
        "n": 9,
    }
    assert json.loads(http_json.to_message("ping", b"", headers)) == {"type": "ping", "lease": "h", "epoch": 2, "n": 1}
    assert json.loads(http_json.to_message("ping", b"{}", {})) == {"type": "ping", "lease": "", "epoch": 1, "n": 0}


@pytest.mark.parametrize("body", [b"[1]", b"{", b"nonsense", b'"x"', b"\xff\xfe", b"[" * 3000])
def test_a_body_that_is_no_object_is_a_fault(server: Serving, body: bytes) -> None:
    line = server.raw()
    for first in (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
        kept = bytearray()
        line.sendall(first + post("/v1/reset", body))
        if first:
            read_response(line, kept)
        status, _, answer = read_response(line, kept)
        assert status == 422
        fault = codec.decode_reply(answer)[0]
        assert isinstance(fault, m.Fault)
        assert fault.code == "bad_message"
    line.sendall(post("/v1/ping", b"", "Longrein-Number: -1"))
    assert read_response(line)[0] == 422
    line.sendall(post("/v1/message", b""))
    assert b"bad_message" in read_response(line)[2]
    line.close()
    assert server.handler.came == []


@pytest.mark.parametrize("code", [*FAULTS, "unheard_of"])
def test_a_fault_has_its_status_on_the_paths_for_curl_only(code: str) -> None:
    fault = codec.encode_json(m.Fault("x", 1, code, "why"))
    expected = http_json.FAULT_STATUS.get(code, 500)
    with serving(Fake(lambda line, message: line.send(fault))) as server:
        line = server.raw()
        line.sendall(
            post("/v1/step", b"{}") + post("/v1/message", b"{}") + post("/elsewhere", b"") + post("/v1/step", b"{}")
        )
        kept = bytearray()
        assert [read_response(line, kept)[0] for _ in range(4)] == [expected, 200, 404, expected]
        line.close()
    assert set(http_json.FAULT_STATUS) <= set(FAULTS)


# -------------------------------------------------------------------------------------------------- the application


def get(line: socket.socket, path: str, *headers: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    line.sendall("\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode())
    return read_response(line)


def test_health_readiness_metrics_and_the_page(server: Serving) -> None:
    line = server.raw()
    assert get(line, "/healthz")[0] == 200
    assert get(line, "/readyz")[0] == 200
    server.handler.ready = False
    assert get(line, "/readyz")[0] == 503
    assert get(line, "/healthz")[0] == 200
    status, headers, body = get(line, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    assert b"longrein_steps_total 7" in body
    status, headers, body = get(line, "/")
    assert headers["content-type"].startswith("text/html")
    assert b"CartPole-v1" in body
    assert b"fake &lt;1&gt;" in body
    assert get(line, "/nothing")[0] == 404
    assert get(line, "/v1/step")[0] == 405
    line.sendall(post("/v1/message", BINARY))
    assert read_response(line)[2] == BINARY
    line.close()


def test_a_connection_is_handed_over_only_when_all_before_is_answered() -> None:
    fake = Fake(lambda line, message: None)
    with serving(fake) as server:
        line = server.raw()
        line.sendall(
            post("/v1/message", BINARY) + b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" + post("/v1/message", b"LR 2")
        )
        wait_for(lambda: fake.came)
        line.settimeout(0.05)
        with pytest.raises(TimeoutError):
            line.recv(1)
        line.settimeout(5)
        server.soon(fake.came[0][0].send, b"LR first")
        kept = bytearray()
        assert read_response(line, kept)[2] == b"LR first"
        assert read_response(line, kept)[2] == b"ok\n"
        wait_for(lambda: len(fake.came) == 2)
        server.soon(fake.came[1][0].send, b"LR second")
        assert read_response(line, kept)[2] == b"LR second"
        line.close()


def test_a_client_gone_from_the_application_is_lost() -> None:
    fake = Fake(lambda line, message: line.close() if b"close" in message else None)
    with serving(fake) as server:
        line = server.raw()
        get(line, "/healthz")
        line.sendall(post("/v1/message", BINARY))
        wait_for(lambda: fake.came)
        line.close()
        wait_for(lambda: fake.gone)
        line = server.raw()
        get(line, "/healthz")
        line.sendall(post("/v1/message", b"LR close"))
        assert read_response(line)[0] == 503
        assert closed(line)
        assert fake.gone == [each for each, _ in fake.came]


def test_the_description_is_whole() -> None:
    with serving() as server:
        line = server.raw()
        status, _, body = get(line, "/openapi.json")
        line.close()
    assert status == 200
    spec = json.loads(body)
    assert re.fullmatch(r"3\.1\.\d", spec["openapi"])
    assert spec["info"]["title"]
    assert spec["info"]["version"]
    assert {path.decode() for path in http_json.PATHS} < spec["paths"].keys()
    schemas = spec["components"]["schemas"]
    ids = []
    for path, item in spec["paths"].items():
        assert path.startswith("/")
        for method, operation in item.items():
            assert method in ("get", "post")
            ids.append(operation["operationId"])
            assert operation["responses"]
            for status_key, response in operation["responses"].items():
                assert status_key == "default" or re.fullmatch(r"[1-5]\d\d", status_key)
                assert response["description"]
            for parameter in operation.get("parameters", ()):
                assert parameter["in"] == "header"
                assert parameter["name"]
                assert "schema" in parameter
    assert len(set(ids)) == len(ids)

    def refs(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from refs(value)
        elif isinstance(node, list):
            for value in node:
                yield from refs(value)

    for ref in refs(spec):
        assert ref.removeprefix("#/components/schemas/") in schemas
    for schema in schemas.values():
        assert schema["type"] == "object"
        assert schema["properties"]
    assert not schemas["StepBody"]["required"]
    assert schemas["OpenBody"]["required"] == ["env"]
    assert schemas["Stepped"]["properties"]["type"] == {"enum": ["stepped"]}
    assert set(schemas["StepBody"]["properties"]) == set(m.Step.__struct_fields__)


# ---------------------------------------------------------------------------------------------------------- origins


def test_browsers_of_other_origins_are_turned_away() -> None:
    fake = Fake()
    with serving(fake, allowed_origins=("https://lab.example",)) as server:
        for first in (False, True):
            line = server.raw()
            if first:
                get(line, "/healthz")
            line.sendall(post("/v1/message", BINARY, "Origin: https://evil.example"))
            status, headers, _ = read_response(line)
            assert status == 403
            assert "access-control-allow-origin" not in headers
            assert closed(line)
        assert fake.came == []
        for first in (False, True):
            line = server.raw()
            if first:
                get(line, "/healthz")
            line.sendall(post("/v1/message", BINARY, "Origin: https://lab.example"))
            status, headers, body = read_response(line)
            assert status == 200
            assert body == BINARY
            assert headers["access-control-allow-origin"] == "https://lab.example"
            assert headers["vary"] == "Origin"
            line.close()
        line = server.raw()
        asks = ("Origin: https://lab.example", "Access-Control-Request-Method: POST")
        status, headers, _ = get(line, "/v1/step", *asks, method="OPTIONS")
        assert status == 204
        assert headers["access-control-allow-origin"] == "https://lab.example"
        assert "POST" in headers["access-control-allow-methods"]
        assert "longrein-lease" in headers["access-control-allow-headers"]
        status, _, _ = get(line, "/v1/step", "Origin: null", "Access-Control-Request-Method: POST", method="OPTIONS")
        assert status == 403
        line.close()
    with serving(allowed_origins=("*",)) as server:
        line = server.raw()
        line.sendall(post("/v1/message", BINARY, "Origin: http://anything"))
        assert read_response(line)[0] == 200
        line.close()


# -------------------------------------------------------------------------------------------------------------- TLS


class Authority:
    """A certificate authority of the test's own, and what it signed, as files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        builder = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), critical=True)
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
        self.file = self._write(
            "ca.pem", builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )  # fmt: skip

    def _write(self, name: str, data: bytes) -> str:
        (self._folder / name).write_bytes(data)
        return str(self._folder / name)

    def sign(self, name: str, organization: str) -> tuple[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization)]
        )
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        )
        uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        signed = (
            self._builder(subject, key).add_extension(names, critical=False).add_extension(uses, critical=False)
            .sign(self._key, hashes.SHA256())
        )  # fmt: skip
        secret = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return (
            self._write(f"{name}.pem", signed.public_bytes(serialization.Encoding.PEM)),
            self._write(f"{name}.key", secret),
        )


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.mark.parametrize("loop", list(LOOPS))
def test_tls_with_client_certificates(authority: Authority, loop: str) -> None:
    inside = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.file)
    inside.load_cert_chain(*authority.sign("server", "lab"))
    inside.verify_mode = ssl.CERT_OPTIONAL
    outside = ssl.create_default_context(cafile=authority.file)
    fake = Fake(lambda line, message: line.send(message) if b"wait" not in message else None)
    with serving(fake, "https://127.0.0.1:0/ENV", loop=loop, ssl_context=inside) as server:
        assert server.url.startswith("https://127.0.0.1:")
        assert server.url.endswith("/ENV")
        with pytest.raises(ConnectError, match="not trusted"):
            server.connect(ssl_context=ssl.create_default_context())
        connection = server.connect(ssl_context=outside)
        for message in (BINARY, b"L" * 70_000, b"L" * 1_000_000):
            connection.send(message)
            assert connection.receive(10) == message
        connection.send(b"LR wait")
        assert connection.receive(0) is None
        assert connection.receive(0.05) is None
        server.soon(fake.came[-1][0].send, b"LR late")
        assert connection.receive(None) == b"LR late"
        for message in (b"LR 1", b"LR 2", b"LR 3"):
            connection.send(message)
        got = [connection.receive(5)]
        while len(got) < 3:
            got.append(connection.receive(0) or connection.receive(5))
        assert got == [b"LR 1", b"LR 2", b"LR 3"]
        assert fake.came[0][0].peer.certificate is None
        connection.close()

        outside.load_cert_chain(*authority.sign("alice", "lab, east"))
        connection = server.connect(ssl_context=outside)
        connection.send(BINARY)
        assert connection.receive(5) == BINARY
        assert fake.came[-1][0].peer.certificate == "CN=alice,O=lab\\, east"
        connection.close()

        port = int(server.url.split(":")[2].split("/")[0])
        line = outside.wrap_socket(socket.create_connection(("127.0.0.1", port), 5), server_hostname="localhost")
        assert get(line, "/healthz")[0] == 200  # handed over, and the certificate is still known
        line.sendall(post("/v1/message", BINARY))
        assert read_response(line)[2] == BINARY
        assert fake.came[-1][0].peer.certificate == "CN=alice,O=lab\\, east"
        line.close()


def test_tls_against_a_plain_server_says_so() -> None:
    with serving() as server:
        address = parse_url(server.url.replace("http:", "https:"))[0]
        with pytest.raises(ConnectError, match="TLS handshake failed"):
            http.connect(address, ConnectOptions(timeout=3))


def test_a_subject_that_nobody_verified_is_none() -> None:
    assert subject_of(None) is None
    assert subject_of({}) is None
