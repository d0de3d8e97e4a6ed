"""A transport that behaves as badly as it may: it drops, doubles, reorders and delays messages, and cuts lines.

It is the memory transport with a seeded demon in between, installed by one line in the transports' table, as any
transport is. The demon sees whole messages; what a cut in the middle of a message does is tested over real sockets.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from longrein.errors import ConnectionClosed
from longrein.link.transports import Address, Buffer, ConnectOptions, ListenOptions, memory


@dataclass
class Demon:
    """What goes wrong, and how often, in each direction."""

    seed: int
    drop: float = 0.0
    double: float = 0.0
    late: float = 0.0  # held back until the next message has passed
    cut: float = 0.0
    done: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("drop", "double", "late", "cut"), 0))

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def fate(self) -> str:
        """What happens to the next message."""
        draw = self.random.random()
        for name in ("drop", "double", "late", "cut"):
            draw -= getattr(self, name)
            if draw < 0:
                self.done[name] += 1
                return name
        return ""


demon = Demon(0)  # the tests put another in its place


class HostileConnection:
    """A memory connection with the demon on it."""

    def __init__(self, inner: memory.MemoryConnection) -> None:
        self.inner = inner
        self.held_out: list[bytes] = []
        self.held_in: list[bytearray] = []
        self.ready: list[bytearray] = []

    def send(self, message: Buffer) -> None:
        fate = demon.fate()
        if fate == "cut":
            self._cut()
        later, self.held_out = self.held_out, []
        if fate == "late":
            self.held_out.append(bytes(message))
        elif fate != "drop":
            for _ in range(2 if fate == "double" else 1):
                self.inner.send(message)
        for old in later:
            self.inner.send(old)

    def receive(self, timeout: float | None) -> bytearray | None:
        if self.ready:
            return self.ready.pop(0)
        message = self.inner.receive(timeout)
        if message is None:
            return None
        fate = demon.fate()
        if fate == "cut":
            self._cut()
        later, self.held_in = self.held_in, []
        if fate == "late":
            self.held_in.append(message)
        elif fate != "drop":
            self.ready += [message, bytearray(message)] if fate == "double" else [message]
        self.ready += later
        return self.ready.pop(0) if self.ready else bytearray()

    def _cut(self) -> None:
        self.inner.close()
        raise ConnectionClosed("the demon cut it")

    def route(self, route: str, lease: str) -> None:
        self.inner.route(route, lease)

    def fileno(self) -> int:
        return self.inner.fileno()

    def close(self) -> None:
        self.inner.close()


def connect(address: Address, options: ConnectOptions) -> HostileConnection:
    """A line to the memory server of this name, with the demon on it."""
    plain = Address(address.url, "memory", "", None, address.host, address.env, address.options)
    return HostileConnection(memory.connect(plain, options))


def listen(address: Address, options: ListenOptions) -> memory.MemoryListener:
    """Nobody listens here: the server is a memory server."""
    raise NotImplementedError
