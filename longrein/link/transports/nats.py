"""NATS: a lean requester and responder on the path of a step, nats-py for all else. Subjects, not messages.

What concerns no lease yet goes to `longrein.NAME.open`, a queue group; what concerns a lease goes to its own subject,
`longrein.NAME.INSTANCE.LEASE`, which leads to the server that holds it. Servers of one NAME tell each other how many
leases they hold (`longrein.NAME.load`), and hand what comes to the queue on to the one that holds the fewest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import ssl
import time
from contextlib import suppress
from typing import Any, Final

from longrein.errors import ConnectError, LeaseLost, TooLarge
from longrein.link.transports import Address, Buffer, ConnectOptions, Handler, ListenOptions, Peer
from longrein.link.transports import nats_wire as wire
from longrein.link.transports.nats_line import BrokerLine, secret_of
from longrein.link.transports.nats_responder import Responder

log = logging.getLogger("longrein.nats")

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_QUEUE: Final = "longrein"
_GRACE_SECONDS: Final = 3.0  # a server may be on its way back to the broker: its leases are not lost at once
_LOAD_SECONDS: Final = 2.0  # how often a server tells its load
_LOAD_STALE_SECONDS: Final = 5.0


def _subject(name: str, *rest: str) -> str:
    return ".".join(("longrein", name, *rest))


def _checked_name(address: Address) -> str:
    if not _NAME.fullmatch(address.path):
        raise ConnectError(
            f"the URL names no service: {address.path!r}", url=address.url,
            hint="write nats://host:4222/NAME/ENV; NAME has letters, digits, - and _",
        )  # fmt: skip
    return address.path


# ---------------------------------------------------------------------------------------------------- the client's half


class NatsConnection:
    """A requester: one connection to the broker, one inbox, used by one thread at a time."""

    def __init__(self, address: Address, options: ConnectOptions) -> None:
        self._url = address.url
        self._name = _checked_name(address)
        self._queue = _subject(self._name, "open")
        self._to = self._queue
        self._inbox = f"_INBOX.{secrets.token_hex(11)}"
        self._last = b""
        self._refused: float | None = None  # since when nobody answers on the lease's subject
        self._line = BrokerLine(address, options)
        self._line.write(wire.subscribe_line(self._inbox, 1))

    def route(self, route: str, lease: str) -> None:
        if route:
            self._to = route

    def fileno(self) -> int:
        return self._line.fileno()

    def send(self, message: Buffer) -> None:
        if len(message) > self._line.max_payload:
            raise TooLarge(
                f"a message of {len(message)} bytes, and the broker carries {self._line.max_payload}", url=self._url,
                hint="raise max_payload in the broker's configuration, put fewer environments in a lease, or use ws://",
            )  # fmt: skip
        self._last = wire.publish(self._to, self._inbox, message)
        self._line.write(self._last)

    def receive(self, timeout: float | None) -> bytearray | None:
        deadline = None if not timeout else time.monotonic() + timeout
        while True:
            message = self._line.next_message()
            if message is not None:
                if message.status == "503":
                    self._nobody(timeout)
                    continue
                self._refused = None
                return message.payload
            wait = timeout if deadline is None else deadline - time.monotonic()
            if not self._line.read(wait) and timeout is not None and (deadline is None or time.monotonic() >= deadline):
                return None

    def _nobody(self, timeout: float | None) -> None:
        """Nobody is subscribed. For a lease that may pass: its server may be on its way back to the broker."""
        if self._to == self._queue:
            self.close()
            raise ConnectError(
                f"no server called {self._name!r} answers on this broker", url=self._url,
                hint=f"start one: longrein serve ENV --at nats://HOST:PORT/{self._name}; is the name right?",
            )  # fmt: skip
        now = time.monotonic()
        if self._refused is None:
            self._refused = now
        if now - self._refused > _GRACE_SECONDS:
            self.close()
            raise LeaseLost(
                f"the server that held the environment has not answered on the broker for {_GRACE_SECONDS:g} s",
                url=self._url, hint="connect anew; connect_vec(..., on_loss='restart') does so by itself",
            )  # fmt: skip
        if timeout == 0:
            self._line.fail("nobody answers for this lease")  # whoever polls mends it where waiting delays nobody
        time.sleep(min(0.25, 0.02 + (now - self._refused) / 2))
        self._line.write(self._last)

    def close(self) -> None:
        self._line.close()


def connect(address: Address, options: ConnectOptions) -> NatsConnection:
    """Connect to the broker. Raises ConnectError where there is none, Unauthenticated where it refuses us."""
    return NatsConnection(address, options)


# ---------------------------------------------------------------------------------------------------- the server's half


class _Line:
    """One request: its answer goes to the subject that it named."""

    __slots__ = ("_owner", "_reply", "_responder", "peer")
    persistent = False
    hears = True

    def __init__(self, owner: NatsListener, responder: Responder, reply: str) -> None:
        self._owner = owner
        self._responder = responder
        self._reply = reply
        self.peer = _PEER

    def route(self, lease: str) -> str:
        return _subject(self._owner.name, self._owner.instance, lease)

    def send(self, message: Buffer, *, final: bool = True) -> None:
        """Raises TooLarge when the broker carries no message of this length."""
        self._responder.publish(self._reply, message)

    def close(self, reason: str = "") -> None:
        pass


_PEER: Final = Peer("nats")


class NatsListener:
    """A responder: the server's connection to the broker, made again whenever it is lost."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.address = address
        self.options = options
        self.name = _checked_name(address)
        self.instance = options.instance
        self.url = f"{address.scheme}://{address.host}:{address.port}/{self.name}"
        self.handler: Handler
        self._responder = Responder(
            address, options, self.url, f"longrein server {self.name}", self.subscriptions, self.received
        )
        self._task: asyncio.Task[None] | None = None
        self._queue = _subject(self.name, "open")
        self._load = _subject(self.name, "load")
        self._others: dict[str, tuple[int, float]] = {}  # instance -> its load, and when it said so
        self._told = -1
        self._drained = False
        self._service: Any = None

    def subscriptions(self) -> list[bytes]:
        """The queue group, our own subjects, and what the others say of their loads."""
        own = [wire.subscribe_line(_subject(self.name, self.instance, "*"), 2), wire.subscribe_line(self._load, 3)]
        return own if self._drained else [wire.subscribe_line(self._queue, 1, _QUEUE), *own]

    async def start(self, handler: Handler) -> None:
        self.handler = handler
        await self._responder.start()
        self._task = asyncio.get_running_loop().create_task(self._tell())
        await self._announce()

    async def _tell(self) -> None:
        """Tell the other servers of this name our load, now and then."""
        while True:
            self._told = -1
            self._tell_load()
            if not self.handler.ready and not self._drained:
                self._drained = True
                self._responder.write(wire.unsubscribe_line(1))
            await asyncio.sleep(_LOAD_SECONDS if self.handler.ready else 0.2)

    def _tell_load(self) -> None:
        load = self.handler.load
        if load != self._told:
            self._told = load
            data = json.dumps({"instance": self.instance, "load": load, "ready": self.handler.ready}).encode()
            self._responder.publish(self._load, data)

    def received(self, message: wire.Message) -> None:
        """A message came by one of the subscriptions."""
        if message.subject == self._load:
            self._hear_load(message.payload)
            return
        if message.subject == self._queue:
            other = self._less_loaded()
            if other is not None:
                onward = wire.publish(_subject(self.name, other, "open"), message.reply, message.payload)
                self._responder.write(onward)
                return
        if len(message.payload) > self.options.max_message_bytes or not message.reply:
            log.warning("a message of %d bytes without a place for its answer: dropped", len(message.payload))
            return
        self.handler.received(_Line(self, self._responder, message.reply), message.payload)
        if self.handler.load != self._told:
            self._tell_load()

    def _hear_load(self, payload: Buffer) -> None:
        try:
            said = json.loads(bytes(payload))
            instance, load, ready = str(said["instance"]), int(said["load"]), bool(said["ready"])
        except (ValueError, KeyError, TypeError):
            log.warning("somebody who is no longrein server speaks on %s", self._load)
            return
        if instance == self.instance:
            return
        if ready:
            self._others[instance] = load, time.monotonic()
        else:
            self._others.pop(instance, None)

    def _less_loaded(self) -> str | None:
        """The server of this name that holds the fewest leases, where that is another one."""
        if not self._others:
            return None
        now = time.monotonic()
        fresh = {i: load for i, (load, when) in self._others.items() if now - when < _LOAD_STALE_SECONDS}
        best = min(fresh, key=lambda instance: fresh[instance], default=None)
        if best is None:
            return None
        return best if fresh[best] < self.handler.load or not self.handler.ready else None

    async def _announce(self) -> None:
        """Be found by NATS's service API (ADR-32): `nats micro ls`, $SRV.PING, $SRV.INFO, $SRV.STATS."""
        import nats
        import nats.micro

        about = self.handler.describe()
        metadata = {"instance": self.instance, "environments": ",".join(about["environments"])}
        try:
            client = await nats.connect(
                **_nats_py_options(self.address, self.options.credentials, self.options.ssl_context)
            )
            self._service = await nats.micro.add_service(
                client, name=self.name, version="1.0.0", description=str(about["server"]), metadata=metadata
            )
            self._client = client
        except (nats.errors.Error, OSError, ValueError) as error:
            log.warning("the server cannot be discovered at %s: %s", self.url, error)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
            self._task = None
        if self._service is not None:
            await self._service.stop()
            await self._client.close()
            self._service = None
        await self._responder.close()


def listen(address: Address, options: ListenOptions) -> NatsListener:
    """Answer on a broker."""
    return NatsListener(address, options)


# ----------------------------------------------------------------------------------------------------------- discovery


def _nats_py_options(address: Address, credentials: dict[str, str], context: ssl.SSLContext | None) -> dict[str, Any]:
    """Our settings in the words of nats-py."""
    scheme = "tls" if address.secure else "nats"
    options: dict[str, Any] = {
        "servers": f"{scheme}://{address.host}:{address.port}", "max_reconnect_attempts": -1, "connect_timeout": 5,
        "name": "longrein discovery", "tls": context, "error_cb": _say_nothing,
    }  # fmt: skip
    for ours, theirs in (("user", "user"), ("password", "password"), ("token", "token"), ("creds", "user_credentials")):
        if ours in credentials:
            options[theirs] = credentials[ours]
    if "nkey_seed" in credentials:
        options["nkeys_seed_str"] = secret_of(credentials["nkey_seed"]).strip()
    return options


async def _say_nothing(error: Exception) -> None:
    log.debug("nats-py: %s", error)


def discover(address: Address, options: ConnectOptions, timeout: float = 0.5) -> list[dict[str, Any]]:
    """The servers of a NAME that answer within `timeout` seconds, as NATS's service API describes them."""
    return asyncio.run(_discover(address, options, timeout))


async def _discover(address: Address, options: ConnectOptions, timeout: float) -> list[dict[str, Any]]:
    import nats

    client = await nats.connect(**_nats_py_options(address, options.credentials, options.ssl_context))
    found: list[dict[str, Any]] = []
    try:
        inbox = client.new_inbox()
        subscription = await client.subscribe(inbox)
        await client.publish(f"$SRV.INFO.{_checked_name(address)}", b"", reply=inbox)
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError, nats.errors.TimeoutError):
                message = await subscription.next_msg(timeout=left)
                if message.data:
                    found.append(json.loads(message.data))
    finally:
        await client.close()
    return found
