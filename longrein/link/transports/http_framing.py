"""Where a body of HTTP/1.1 ends: digits and chunks. Bytes in, bodies out; no socket, and no header's meaning.

Both halves of the HTTP transport read bodies with this. It is stricter than RFC 9112 asks: a bare line feed, a sign or
an underscore in a number are refused, since two readers that disagree on where a body ends can be played off against
each other.
"""

from __future__ import annotations

from typing import Final

HEAD_BYTES: Final = 64 * 2**10
"""The longest head (request line or status line, and headers) that is read, in bytes."""

_LINE_BYTES: Final = 4096  # the longest line between two chunks, extensions included
_HEX: Final = b"0123456789abcdefABCDEF"


class BadFraming(ValueError):
    """These bytes do not say where the body ends."""


class BodyTooLarge(ValueError):
    """The body is over the limit."""


def content_length(value: bytes) -> int:
    """The number in a Content-Length header. Raises BadFraming."""
    digits = value.strip(b" \t")
    if not digits.isdigit() or len(digits) > 15:
        raise BadFraming(f"Content-Length is {value[:40]!r}, not a number of bytes")
    return int(digits)


class Chunks:
    """A body that comes in chunks: feed it bytes until `done`; what it has so far is in `body`."""

    def __init__(self, limit: int) -> None:
        self.body = bytearray()
        self.done = False
        self._limit = limit
        self._left = 0  # bytes that the present chunk still lacks
        self._line = bytearray()
        self._next = self._size
        self._around = 0  # bytes that were no body: sizes, extensions, trailers

    def feed(self, data: bytes, start: int = 0) -> int:
        """Take bytes from `start` on; the index of the first that is no part of this body.

        Raises BadFraming, and BodyTooLarge before memory is taken for the chunk that is too much.
        """
        while start < len(data) and not self.done:
            if self._left:
                taken = min(self._left, len(data) - start)
                self.body += memoryview(data)[start : start + taken]
                self._left -= taken
                start += taken
                if not self._left:
                    self._next = self._end
                continue
            feed = data.find(b"\n", start) + 1
            stop = feed or len(data)
            self._line += memoryview(data)[start:stop]
            self._around += stop - start
            start = stop
            # A body sent one byte a chunk has 5 bytes around each; more than 8 is not a body but a flood.
            if len(self._line) > _LINE_BYTES or self._around > HEAD_BYTES + 8 * len(self.body):
                raise BadFraming("more bytes around the chunks than in them")
            if feed:
                self._take_line()
        return start

    def _take_line(self) -> None:
        line, self._line = bytes(self._line), bytearray()
        if not line.endswith(b"\r\n"):
            raise BadFraming("a line feed without a carriage return between chunks")
        self._next(line[:-2])

    def _size(self, line: bytes) -> None:
        digits = line.partition(b";")[0].rstrip(b" \t")
        if not digits or digits.strip(_HEX) or len(digits) > 15:
            raise BadFraming(f"a chunk's size is {line[:40]!r}")
        self._left = int(digits, 16)
        if len(self.body) + self._left > self._limit:
            raise BodyTooLarge(f"more than {self._limit} bytes in chunks")
        if not self._left:
            self._next = self._trailer

    def _end(self, line: bytes) -> None:
        if line:
            raise BadFraming("a chunk is longer than its size says")
        self._next = self._size

    def _trailer(self, line: bytes) -> None:
        self.done = not line
