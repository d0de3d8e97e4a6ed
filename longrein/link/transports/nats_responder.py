"""A server's presence at a NATS broker: one asyncio connection, made again whenever it is lost. No subject of ours."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, cast

import tenacity

from longrein.errors import ConnectError, ConnectionClosed, RemoteProtocolError, TooLarge, Unauthenticated
from longrein.link.transports import Address, Buffer, ListenOptions
from longrein.link.transports import nats_wire as wire
from longrein.link.transports.nats_line import broker_error, greeting

log = logging.getLogger("longrein.nats")

CONNECT_SECONDS: Final = 5.0


class Responder:
    """Hears what is published to its subscriptions, in order, and answers.

    subscriptions: the SUB lines to say on each new connection. received: called with each message.
    """

    def __init__(
        self,
        address: Address,
        options: ListenOptions,
        url: str,
        name: str,
        subscriptions: Callable[[], list[bytes]],
        received: Callable[[wire.Message], None],
    ) -> None:
        self.address = address
        self.options = options
        self.url = url
        self.name = name
        self.subscriptions = subscriptions
        self.received = received
        self.max_payload = 2**20
        self._protocol: _Protocol | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises ConnectError where there is no broker, Unauthenticated where it refuses us."""
        await self._connect()
        self._task = asyncio.get_running_loop().create_task(self._stay())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        where = f"{self.address.host}:{self.address.port}"
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                transport, protocol = await loop.create_connection(
                    lambda: _Protocol(self), self.address.host, self.address.port or 4222
                )
                if await self._wants_tls(protocol):
                    context = self.options.ssl_context or ssl.create_default_context()
                    transport = await loop.start_tls(transport, protocol, context, server_hostname=self.address.host)  # type: ignore[assignment]  # it gives a transport, or raises
                    protocol.transport = transport
                    protocol.greet()
                await protocol.greeted
        except (OSError, TimeoutError) as error:
            raise ConnectError(
                f"no broker listens at {where}: {error}",
                url=self.url,
                hint="start one: nats-server -a 127.0.0.1 -p 4222",
            ) from error
        self._protocol = protocol

    async def _wants_tls(self, protocol: _Protocol) -> bool:
        """Whether TLS comes next: the broker says INFO in the clear first, whatever the scheme."""
        while not protocol.info and not protocol.ended.done():
            await asyncio.sleep(0.001)
        return self.address.secure or bool(protocol.info.get("tls_required"))

    async def _stay(self) -> None:
        """Come back to the broker for as long as the server lives."""
        while True:
            assert self._protocol is not None
            await asyncio.shield(self._protocol.ended)
            self._protocol = None
            log.warning("the broker at %s is gone: trying again", self.url)
            async for attempt in tenacity.AsyncRetrying(
                wait=tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
                retry=tenacity.retry_if_exception_type((ConnectError, ConnectionClosed, Unauthenticated)),
            ):
                with attempt:
                    await self._connect()
            log.info("back at the broker at %s", self.url)

    def publish(self, subject: str, payload: Buffer) -> None:
        """Raises TooLarge. While the broker is gone it is dropped: who needs the answer asks again."""
        if len(payload) > self.max_payload:
            raise TooLarge(
                f"an answer of {len(payload)} bytes, and the broker carries {self.max_payload}", url=self.url,
                hint="raise max_payload in the broker's configuration, put fewer environments in a lease, or use ws://",
            )  # fmt: skip
        self.write(wire.publish(subject, "", payload))

    def write(self, data: bytes) -> None:
        """Bytes of the protocol."""
        protocol = self._protocol
        if protocol is not None and protocol.transport is not None and not protocol.transport.is_closing():
            protocol.transport.write(data)

    async def close(self) -> None:
        """Leave the broker."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        protocol, self._protocol = self._protocol, None
        if protocol is not None:
            protocol.end("closed")
            await protocol.ended


class _Protocol(asyncio.Protocol):
    """One connection of the server to the broker."""

    def __init__(self, owner: Responder) -> None:
        self.owner = owner
        self.ended = asyncio.get_running_loop().create_future()
        self.greeted = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None
        self.info: dict[str, Any] = {}
        self._reader = wire.Reader(owner.options.max_message_bytes)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        reader, owner = self._reader, self.owner
        try:
            reader.feed(data)
            while (event := reader.next_event()) is not None:
                if type(event) is wire.Message:
                    owner.received(event)
                else:
                    self._control(event)
        except RemoteProtocolError as error:
            self.end(str(error))

    def _control(self, event: wire.Event) -> None:
        assert self.transport is not None
        match event:
            case wire.Control("PING"):
                self.transport.write(wire.PONG)
            case wire.Control("PONG"):
                if not self.greeted.done():
                    self.greeted.set_result(None)
            case wire.Info(fields):
                first = not self.info
                self.info = fields
                self.owner.max_payload = int(fields.get("max_payload", 2**20))
                if first and not (fields.get("tls_required") or self.owner.address.secure):
                    self.greet()
            case wire.Failure(text):
                self._failure(text)

    def _failure(self, text: str) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(broker_error(text, self.owner.url))
        log.warning("the broker at %s says: %s", self.owner.url, text)

    def greet(self) -> None:
        """Say who we are, and to what we listen."""
        assert self.transport is not None
        owner = self.owner
        self.transport.write(
            greeting(self.info, owner.options.credentials, owner.url, f"longrein server {owner.name}")
            + b"".join(owner.subscriptions())
        )

    def end(self, reason: str) -> None:
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(
                ConnectError(f"the broker closed the connection: {error or 'no reason'}", url=self.owner.url)
            )
        if not self.ended.done():
            self.ended.set_result(None)
