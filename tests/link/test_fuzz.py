"""Garbage at the door: no crash, no hang, a typed fault where an answer is due, and other clients untouched."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from environments import Counting
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import longrein
from longrein.link import codec
from longrein.link import messages as m
from longrein.link import server as server_module
from longrein.link.protocol import FAULTS
from longrein.link.transports import ConnectOptions, memory, parse_url

LEASE = "l" * 22
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture(scope="module")
def server() -> Iterator[longrein.Server]:
    limits = longrein.Limits(max_message_bytes=1 << 20)
    with longrein.Server(
        [("Counting", Counting)], at=["ws://127.0.0.1:0", "http://127.0.0.1:0"], limits=limits
    ) as server:
        yield server


def garbage(draw: random.Random) -> bytes:
    """Random bytes, or a message with something wrong in it."""
    good = bytearray(codec.encode(m.Step(LEASE, 1, draw.randrange(5)), bytes(8)))
    match draw.randrange(6):
        case 0:
            return draw.randbytes(draw.randrange(1, 300))
        case 1:
            return bytes(good[: draw.randrange(1, len(good))])
        case 2:
            good[draw.randrange(len(good))] = draw.randrange(256)
            return bytes(good)
        case 3:
            return b"{" + draw.randbytes(draw.randrange(40))
        case 4:
            return b"LR\x01\x00" + draw.randbytes(4) + draw.randbytes(40)
        case _:
            return codec.encode_json(m.Call(LEASE, 1, 1, "call", "x" * draw.randrange(50)))


def frame(payload: bytes, kind: int = 2, mask: bool = True, final: bool = True) -> bytes:
    length = len(payload)
    head = bytes([(0x80 if final else 0) | kind])
    bit = 0x80 if mask else 0
    head += bytes([bit | length]) if length < 126 else bytes([bit | 126]) + length.to_bytes(2, "big")
    return head + (b"\0\0\0\0" if mask else b"") + payload


def send_and_drain(url: str, data: bytes) -> None:
    host, _, port = url.partition("://")[2].partition(":")
    with socket.create_connection((host, int(port)), 5) as sock:
        sock.settimeout(0.02)
        try:
            sock.sendall(data)
            while sock.recv(65536):
                pass
        except OSError:
            pass


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_at_the_door_harm_nobody(server: longrein.Server, seed: int) -> None:
    draw = random.Random(seed)
    ws, http = server.urls
    witness = longrein.connect(ws)
    witness.reset()
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    for number in range(1, 101):
        match draw.randrange(5):
            case 0:
                send_and_drain(ws, draw.randbytes(draw.randrange(1, 2000)))
            case 1:
                frames = b"".join(
                    frame(
                        garbage(draw), draw.choice([0, 1, 2, 2, 2, 8, 9, 3]), draw.random() < 0.9, draw.random() < 0.9
                    )
                    for _ in range(20)
                )
                send_and_drain(ws, UPGRADE + frames)
            case 2:
                send_and_drain(http, draw.randbytes(draw.randrange(1, 2000)))
            case 3:
                body = garbage(draw)
                length = len(body) + draw.choice([0, 0, -1, 5])
                head = f"POST /v1/message HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
                send_and_drain(http, head.encode() + body)
            case 4:
                announced = b"\x82\xff" + (2**62).to_bytes(8, "big") + bytes(4)
                send_and_drain(ws, UPGRADE + announced + draw.randbytes(100))
        assert witness.step(number)[0].tolist() == [number, number, number]
    witness.close()
    assert process.memory_info().rss - before < 64 << 20


FIELDS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
    | st.lists(st.integers(-5, 5), max_size=4) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=3)
)  # fmt: skip


@pytest.fixture(scope="module")
def line() -> Iterator[Any]:
    patience = pytest.MonkeyPatch()
    patience.setattr(server_module, "BAD_MESSAGES", 10**9)  # one line is to see them all
    with longrein.Server([("Counting", Counting)], at="memory://fuzz"):
        connection = memory.connect(parse_url("memory://fuzz")[0], ConnectOptions())
        connection.send(codec.encode(m.Open(LEASE, 1, 0, "Counting")))
        assert isinstance(codec.decode_reply(connection.receive(0) or b"")[0], m.Opened)
        yield connection
    patience.undo()


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(
        [t.__struct_config__.tag for t in (m.Hello, m.Resume, m.Reset, m.Step, m.Render, m.Call, m.Ping)]
    ),
    n=st.integers(-2, 40),
    epoch=st.integers(0, 3),
    fields=st.lists(FIELDS, max_size=7),
    region=st.binary(max_size=40),
)
def test_any_fields_of_any_request_are_answered(
    line: Any, kind: str, n: int, epoch: int, fields: list[Any], region: bytes
) -> None:
    head = codec.encode_plain([kind, LEASE, epoch, n, *fields])
    data = b"LR\x01\x00" + len(head).to_bytes(4, "little") + head + bytes(-len(head) % 8) + region
    line.send(data)
    got = line.receive(0)
    assert got is not None, "no answer"
    reply, _ = codec.decode_reply(got)
    if isinstance(reply, m.Fault):
        assert reply.code in FAULTS
        assert reply.code != "internal"
    while line.receive(0) is not None:
        pass


def test_a_line_that_sends_only_garbage_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "BAD_MESSAGES", 8)
    with longrein.Server([("Counting", Counting)], at="memory://garbage"):
        connection = memory.connect(parse_url("memory://garbage")[0], ConnectOptions())
        for _ in range(server_module.BAD_MESSAGES):
            connection.send(b"garbage")
        with pytest.raises(longrein.Error, match="no message"):
            connection.send(b"garbage")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_vector_environment_survives_any_action(data: st.DataObject) -> None:
    name = "memory://vector-fuzz"
    with longrein.Server([("Counting", Counting)], at=name):
        env = longrein.connect_vec(name, num_envs=2)
        env.reset()
        action = data.draw(FIELDS)
        try:
            env.step(action)
        except (longrein.Error, ValueError, TypeError, OverflowError):
            pass
        before = env.call("add", 1)
        assert before == (11, 11)
        env.close()
