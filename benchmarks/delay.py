"""A TCP proxy that delays what passes: half the delay each way. Knows nothing of what it carries.

    python benchmarks/delay.py --to 127.0.0.1:7000 --ms 20

It prints where it listens (HOST:PORT, a line) and works until it is ended. Order is kept, nothing is limited but time:
bytes that came wait in memory. A closed end reaches the other side as late as bytes do.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from collections import deque
from functools import partial


class Way(asyncio.Protocol):
    """One end of a line: what it receives it hands to the other end, so many seconds later."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.other: Way | None = None
        self.transport: asyncio.Transport | None = None
        self._held: deque[tuple[float, bytes | None]] = deque()  # when it is due, and what; None: the end
        self._loop = asyncio.get_running_loop()
        self._timed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send small messages at once."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._held:
            self.pass_on()

    def data_received(self, data: bytes) -> None:
        """Keep it until it is due."""
        self._keep(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end comes after what was sent before it."""
        self._keep(None)

    def _keep(self, data: bytes | None) -> None:
        self._held.append((self._loop.time() + self.seconds, data))
        if not self._timed:
            self._timed = True
            self._loop.call_later(self.seconds, self.pass_on)

    def pass_on(self) -> None:
        """Hand over what is due, in its order."""
        now = self._loop.time() + 0.0002  # sooner by less than it would take to come back for it
        other = self.other
        while self._held and self._held[0][0] <= now and other is not None and other.transport is not None:
            _, data = self._held.popleft()
            if data is None:
                other.transport.close()
            elif not other.transport.is_closing():
                other.transport.write(data)
        self._timed = bool(self._held) and other is not None and other.transport is not None
        if self._timed:
            self._loop.call_at(self._held[0][0], self.pass_on)


class Near(Way):
    """The end that somebody dialled: it dials the far end."""

    def __init__(self, seconds: float, to: tuple[str, int]) -> None:
        super().__init__(seconds)
        self._to = to

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Dial; what comes meanwhile is kept."""
        super().connection_made(transport)
        self._dialling = asyncio.ensure_future(self._dial())

    async def _dial(self) -> None:
        far = Way(self.seconds)
        far.other = self
        try:
            await self._loop.create_connection(lambda: far, *self._to)
        except OSError:
            assert self.transport is not None
            self.transport.close()  # as nobody listens there
            return
        self.other = far
        self.pass_on()


async def serve(to: tuple[str, int], seconds: float, listen: tuple[str, int]) -> asyncio.Server:
    """A proxy to `to` that adds so many seconds to a round trip; its sockets say where it listens."""
    return await asyncio.get_running_loop().create_server(partial(Near, seconds / 2, to), *listen)


def place(text: str) -> tuple[str, int]:
    """HOST:PORT."""
    host, _, port = text.rpartition(":")
    return host.strip("[]") or "127.0.0.1", int(port)


async def work(to: tuple[str, int], seconds: float, listen: tuple[str, int]) -> None:
    """Serve for ever."""
    server = await serve(to, seconds, listen)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"{host}:{port}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until it is ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", type=place, required=True, help="HOST:PORT of the server")
    parser.add_argument("--ms", type=float, required=True, help="milliseconds that a round trip takes longer")
    parser.add_argument("--listen", type=place, default=("127.0.0.1", 0), help="HOST:PORT; port 0 takes a free one")
    asked = parser.parse_args()
    try:
        asyncio.run(work(asked.to, asked.ms / 1000, asked.listen))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
