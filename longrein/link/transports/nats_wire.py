"""The text protocol of NATS, bytes in, events out. No socket, no subject of ours.

Of the client protocol (docs.nats.io, "Client Protocol") what a requester and a responder need: INFO, CONNECT, SUB,
UNSUB, PUB, MSG, HMSG, PING, PONG, +OK, -ERR.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from longrein.errors import RemoteProtocolError

MAX_LINE_BYTES = 1 << 16  # a line of control longer than this is no NATS
CRLF = b"\r\n"
PING, PONG = b"PING\r\n", b"PONG\r\n"


@dataclass(frozen=True, slots=True)
class Message:
    """A message that came for one of our subscriptions."""

    subject: str
    reply: str
    status: str  # of a status line without a message: "503" when nobody is subscribed
    payload: bytearray


@dataclass(frozen=True, slots=True)
class Info:
    """What the broker says of itself."""

    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """-ERR: why the broker is not content."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """PING or PONG."""

    word: str


Event = Message | Info | Failure | Control


class Reader:
    """Bytes in, whole events out."""

    def __init__(self, max_payload: int) -> None:
        self.max_payload = max_payload
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take more bytes."""
        if self._start and self._start == len(self._buffer):
            self._buffer.clear()
            self._start = 0
        self._buffer += data

    def next_event(self) -> Event | None:
        """The next whole event, or None. Raises RemoteProtocolError on what is no NATS."""
        buffer, start = self._buffer, self._start
        while True:
            end = buffer.find(CRLF, start)
            if end < 0:
                if len(buffer) - start > MAX_LINE_BYTES:
                    raise RemoteProtocolError("the broker sent a line without an end: this is no NATS")
                return None
            line = bytes(buffer[start:end])
            if line[:4] == b"MSG " or line[:5] == b"HMSG ":
                return self._message(line, end + 2)
            self._start = start = end + 2
            event = _control(line)
            if event is not None:
                self._shrink()
                return event

    def _message(self, line: bytes, body: int) -> Event | None:
        words = line.decode("latin-1").split()
        headed = words[0] == "HMSG"
        sizes = 2 if headed else 1
        if len(words) not in (3 + sizes, 4 + sizes):
            raise RemoteProtocolError(f"the broker sent {line[:80]!r}: this is no NATS")
        try:
            total = int(words[-1])
            head = int(words[-2]) if headed else 0
        except ValueError:
            raise RemoteProtocolError(f"the broker sent {line[:80]!r}: this is no NATS") from None
        if not 0 <= head <= total <= self.max_payload + MAX_LINE_BYTES:
            raise RemoteProtocolError(f"the broker sent a message of {total} bytes, over {self.max_payload}")
        end = body + total
        if len(self._buffer) < end + 2:
            return None
        payload = self._buffer[body + head : end]
        status = ""
        if headed:
            first = bytes(self._buffer[body : body + head]).split(CRLF, 1)[0].split()
            status = first[1].decode("latin-1") if len(first) > 1 else ""
        self._start = end + 2
        self._shrink()
        reply = words[3] if len(words) == 4 + sizes else ""
        return Message(words[1], reply, status, payload)

    def _shrink(self) -> None:
        if self._start == len(self._buffer):
            self._buffer.clear()
            self._start = 0
        elif self._start > 1 << 20:
            del self._buffer[: self._start]
            self._start = 0


def _control(line: bytes) -> Event | None:
    word = line[:5].upper()
    if word[:4] == b"PING":
        return Control("PING")
    if word[:4] == b"PONG":
        return Control("PONG")
    if word == b"INFO ":
        try:
            fields = json.loads(line[5:])
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise RemoteProtocolError("the broker's INFO is no JSON object: this is no NATS")
        return Info(fields)
    if word[:4] == b"-ERR":
        return Failure(line[4:].decode("utf-8", "replace").strip().strip("'"))
    if word[:3] == b"+OK" or not line:
        return None
    raise RemoteProtocolError(f"the broker sent {line[:80]!r}: this is no NATS")


def connect_line(fields: dict[str, Any]) -> bytes:
    """CONNECT."""
    return b"CONNECT " + json.dumps(fields, separators=(",", ":")).encode() + CRLF


def subscribe_line(subject: str, number: int, queue: str = "") -> bytes:
    """SUB, with a queue group where one is given."""
    return f"SUB {subject} {queue} {number}\r\n".replace("  ", " ").encode()


def unsubscribe_line(number: int) -> bytes:
    """UNSUB."""
    return f"UNSUB {number}\r\n".encode()


def publish(subject: str, reply: str, payload: bytes | bytearray | memoryview) -> bytes:
    """PUB with its payload, as one piece."""
    return b"".join((f"PUB {subject} {reply} {len(payload)}\r\n".encode(), payload, CRLF))
