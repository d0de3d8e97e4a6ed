"""NATS: a lean requester and responder on the path of a step, nats-py for all else. Subjects, not messages.

What concerns no lease yet goes to `longrein.NAME.open`, a queue group; what concerns a lease goes to its own subject,
`longrein.NAME.INSTANCE.LEASE`, which leads to the server that holds it. Servers of one NAME tell each other how many
leases they hold (`longrein.NAME.load`), and hand what comes to the queue on to the one that holds the fewest.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import re
import secrets
import select
import socket
import ssl
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

import tenacity

from longrein.errors import ConnectError, ConnectionClosed, LeaseLost, RemoteProtocolError, TooLarge, Unauthenticated
from longrein.link.transports import Address, Buffer, ConnectOptions, Handler, ListenOptions, Peer
from longrein.link.transports import nats_wire as wire

log = logging.getLogger("longrein.nats")

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_QUEUE: Final = "longrein"
_WAIT_SECONDS: Final = 0.25
_GRACE_SECONDS: Final = 3.0  # a server may be on its way back to the broker: its leases are not lost at once
_LOAD_SECONDS: Final = 2.0  # how often a server tells its load
_LOAD_STALE_SECONDS: Final = 5.0
_READ_BYTES: Final = 1 << 18


def _subject(name: str, *rest: str) -> str:
    return ".".join(("longrein", name, *rest))


def _checked_name(address: Address) -> str:
    if not _NAME.fullmatch(address.path):
        raise ConnectError(
            f"the URL names no service: {address.path!r}", url=address.url,
            hint="write nats://host:4222/NAME/ENV; NAME has letters, digits, - and _",
        )  # fmt: skip
    return address.path


# ----------------------------------------------------------------------------------------------------- credentials


def _login(info: dict[str, Any], credentials: dict[str, str], url: str) -> dict[str, Any]:
    """The fields of CONNECT that say who we are: a user, a token, or the broker's nonce signed with an nkey."""
    fields: dict[str, Any] = {}
    if "user" in credentials:
        fields |= {"user": credentials["user"], "pass": credentials.get("password", "")}
    if "token" in credentials:
        fields["auth_token"] = credentials["token"]
    seed = _secret(credentials["nkey_seed"]) if "nkey_seed" in credentials else ""
    if "creds" in credentials:
        fields["jwt"], seed = _read_creds(Path(credentials["creds"]), url)
    if seed:
        import nkeys

        pair = nkeys.from_seed(seed.strip().encode())
        fields["sig"] = base64.urlsafe_b64encode(pair.sign(str(info.get("nonce", "")).encode())).rstrip(b"=").decode()
        if "jwt" not in fields:
            fields["nkey"] = pair.public_key.decode()
    return fields


def _secret(text: str) -> str:
    """A seed, given as itself or as the path of a file."""
    return text if text.startswith("S") and "/" not in text else Path(text).read_text()


def _read_creds(path: Path, url: str) -> tuple[str, str]:
    """The JWT and the seed of a .creds file."""
    try:
        blocks = re.findall(r"-{3,}BEGIN [^-]+-{3,}\s*(.*?)\s*-{3,}END", path.read_text(), re.DOTALL)
    except OSError as error:
        raise ConnectError(f"the credentials cannot be read: {error}", url=url) from None
    if len(blocks) < 2:
        raise ConnectError(f"{path} is no .creds file: it holds {len(blocks)} of two blocks", url=url)
    return blocks[0], blocks[1]


def _hello(info: dict[str, Any], credentials: dict[str, str], url: str, name: str) -> bytes:
    fields = {
        "verbose": False, "pedantic": False, "lang": "python", "version": "longrein", "protocol": 1, "name": name,
        "headers": True, "no_responders": True, "echo": True,
    } | _login(info, credentials, url)  # fmt: skip
    return wire.connect_line(fields) + wire.PING


def _broker_error(text: str, url: str) -> Exception:
    if "authorization" in text.lower() or "authentication" in text.lower():
        return Unauthenticated(
            f"the broker refused: {text}", url=url, hint="give credentials={'user': ..., 'password': ...}"
        )
    return ConnectionClosed(f"the broker said {text!r}", url=url)


# ---------------------------------------------------------------------------------------------------- the client's half


class NatsConnection:
    """A requester: one connection to the broker, one inbox, used by one thread at a time."""

    def __init__(self, address: Address, options: ConnectOptions) -> None:
        self._url = address.url
        self._name = _checked_name(address)
        self._queue = _subject(self._name, "open")
        self._to = self._queue
        self._inbox = f"_INBOX.{secrets.token_hex(11)}"
        self._closed = False
        self._last = b""
        self._refused: float | None = None  # since when nobody answers on the lease's subject
        self._sock, info, self._reader = _open(address, options)
        self._secure = isinstance(self._sock, ssl.SSLSocket)
        self.max_payload = int(info.get("max_payload", 2**20))
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        self._write(wire.subscribe_line(self._inbox, 1))
        if self._secure:
            self._sock.settimeout(_WAIT_SECONDS)
        else:  # a timeout kept by the kernel: Python's own would add a poll() to every read
            self._sock.settimeout(None)
            wait = struct.pack("ll", 0, int(_WAIT_SECONDS * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 30, 0))

    def route(self, route: str, lease: str) -> None:
        if route:
            self._to = route

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: Buffer) -> None:
        if len(message) > self.max_payload:
            raise TooLarge(
                f"a message of {len(message)} bytes, and the broker carries {self.max_payload}", url=self._url,
                hint="raise max_payload in the broker's configuration, put fewer environments in a lease, or use ws://",
            )  # fmt: skip
        self._last = wire.publish(self._to, self._inbox, message)
        self._write(self._last)

    def _write(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            self._fail(f"sending failed: {error}")

    def receive(self, timeout: float | None) -> bytearray | None:
        deadline = None if not timeout else time.monotonic() + timeout
        while True:
            event = self._next_event()
            if isinstance(event, wire.Message):
                if event.status == "503":
                    self._nobody(timeout)
                    continue
                self._refused = None
                return event.payload
            wait = timeout if deadline is None else deadline - time.monotonic()
            if not self._read(wait) and timeout is not None and (deadline is None or time.monotonic() >= deadline):
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
            self._fail("nobody answers for this lease")  # whoever polls mends it where waiting delays nobody
        time.sleep(min(0.25, 0.02 + (now - self._refused) / 2))
        self._write(self._last)

    def _next_event(self) -> wire.Event | None:
        """The next event that is for the caller: the broker's own are answered here."""
        while True:
            try:
                event = self._reader.next_event()
            except RemoteProtocolError as error:
                self._fail(str(error))
            match event:
                case wire.Control("PING"):
                    self._write(wire.PONG)
                case wire.Failure(text):
                    self.close()
                    raise _broker_error(text, self._url)
                case wire.Info(fields):
                    self.max_payload = int(fields.get("max_payload", self.max_payload))
                case wire.Control():
                    pass
                case _:
                    return event

    def _read(self, wait: float | None) -> bool:
        try:
            if wait is not None and wait < _WAIT_SECONDS and not (self._secure and self._sock.pending()):  # type: ignore[attr-defined]  # an SSLSocket
                poll = select.poll()
                poll.register(self._sock, select.POLLIN)
                if not poll.poll(max(wait, 0) * 1000):
                    return False
            got = self._sock.recv_into(self._view)
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
            return False
        except (OSError, ValueError) as error:
            self._fail(f"reading failed: {error}")
        if got == 0:
            self._fail("the broker closed the connection")
        self._reader.feed(self._view[:got])
        return True

    def _fail(self, reason: str) -> None:
        self.close()
        raise ConnectionClosed(reason, url=self._url)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._sock.close()


def _open(address: Address, options: ConnectOptions) -> tuple[socket.socket, dict[str, Any], wire.Reader]:
    """A socket on which the broker has said PONG, what its INFO says, and the reader that heard it."""
    where = f"{address.host}:{address.port}"
    deadline = time.monotonic() + options.timeout
    try:
        sock = socket.create_connection((address.host, address.port or 4222), options.timeout)
    except OSError as error:
        raise ConnectError(
            f"no broker listens at {where}: {error.strerror or error}",
            url=address.url,
            hint="start one: nats-server -a 127.0.0.1 -p 4222",
        ) from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        reader = wire.Reader(options.max_message_bytes)
        info = _await(sock, reader, wire.Info, deadline, address.url).fields
        if address.secure or info.get("tls_required"):
            context = options.ssl_context or ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=address.host)
        sock.sendall(_hello(info, options.credentials, address.url, "longrein"))
        _await(sock, reader, wire.Control, deadline, address.url)
        return sock, info, reader
    except (OSError, RemoteProtocolError) as error:
        sock.close()
        raise ConnectError(f"no NATS broker answers at {where}: {error}", url=address.url) from error
    except BaseException:
        sock.close()
        raise


def _await(sock: socket.socket, reader: wire.Reader, kind: type, deadline: float, url: str) -> Any:
    while True:
        event = reader.next_event()
        if isinstance(event, wire.Failure):
            raise _broker_error(event.text, url)
        if isinstance(event, kind):
            return event
        if event is None:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            data = sock.recv(65536)
            if not data:
                raise ConnectionResetError("it closed the connection")
            reader.feed(data)


def connect(address: Address, options: ConnectOptions) -> NatsConnection:
    """Connect to the broker. Raises ConnectError where there is none, Unauthenticated where it refuses us."""
    return NatsConnection(address, options)


# ---------------------------------------------------------------------------------------------------- the server's half


class _Line:
    """One request: its answer goes to the subject that it named."""

    __slots__ = ("_owner", "_reply", "peer")
    persistent = False

    def __init__(self, owner: NatsListener, reply: str) -> None:
        self._owner = owner
        self._reply = reply
        self.peer = _PEER

    def route(self, lease: str) -> str:
        return _subject(self._owner.name, self._owner.instance, lease)

    def send(self, message: Buffer, *, final: bool = True) -> None:
        """Raises TooLarge when the broker carries no message of this length."""
        self._owner.publish(self._reply, "", message)

    def close(self, reason: str = "") -> None:
        pass


_PEER: Final = Peer("nats")


class _Responder(asyncio.Protocol):
    """One connection of the server to the broker."""

    def __init__(self, owner: NatsListener) -> None:
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
            self.greeted.set_exception(_broker_error(text, self.owner.url))
        log.warning("the broker at %s says: %s", self.owner.url, text)

    def greet(self) -> None:
        """Say who we are, and to what we listen."""
        assert self.transport is not None
        owner = self.owner
        self.transport.write(
            _hello(self.info, owner.options.credentials, owner.url, f"longrein server {owner.name}")
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


class NatsListener:
    """A responder: the server's connection to the broker, made again whenever it is lost."""

    def __init__(self, address: Address, options: ListenOptions) -> None:
        self.address = address
        self.options = options
        self.name = _checked_name(address)
        self.instance = options.instance
        self.url = f"{address.scheme}://{address.host}:{address.port}/{self.name}"
        self.max_payload = 2**20
        self.handler: Handler
        self._responder: _Responder | None = None
        self._tasks: list[asyncio.Task[None]] = []
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
        await self._connect()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._stay()), loop.create_task(self._tell())]
        await self._announce()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        where = f"{self.address.host}:{self.address.port}"
        try:
            async with asyncio.timeout(5.0):
                transport, responder = await loop.create_connection(
                    lambda: _Responder(self), self.address.host, self.address.port or 4222
                )
                if await self._wants_tls(responder):
                    context = self.options.ssl_context or ssl.create_default_context()
                    transport = await loop.start_tls(transport, responder, context, server_hostname=self.address.host)  # type: ignore[assignment]  # it gives a transport, or raises
                    responder.transport = transport
                    responder.greet()
                await responder.greeted
        except (OSError, TimeoutError) as error:
            raise ConnectError(
                f"no broker listens at {where}: {error}",
                url=self.url,
                hint="start one: nats-server -a 127.0.0.1 -p 4222",
            ) from error
        self._responder = responder

    async def _wants_tls(self, responder: _Responder) -> bool:
        """Whether TLS comes next: the broker says INFO in the clear first, whatever the scheme."""
        while not responder.info and not responder.ended.done():
            await asyncio.sleep(0.001)
        return self.address.secure or bool(responder.info.get("tls_required"))

    async def _stay(self) -> None:
        """Come back to the broker for as long as the server lives."""
        while True:
            assert self._responder is not None
            await asyncio.shield(self._responder.ended)
            self._responder = None
            log.warning("the broker at %s is gone: trying again", self.url)
            async for attempt in tenacity.AsyncRetrying(
                wait=tenacity.wait_random_exponential(multiplier=0.05, max=2.0),
                retry=tenacity.retry_if_exception_type((ConnectError, ConnectionClosed, Unauthenticated)),
            ):
                with attempt:
                    await self._connect()
            log.info("back at the broker at %s", self.url)

    async def _tell(self) -> None:
        """Tell the other servers of this name our load, now and then."""
        while True:
            self._told = -1
            self._tell_load()
            if not self.handler.ready and not self._drained:
                self._drained = True
                self._write(wire.unsubscribe_line(1))
            await asyncio.sleep(_LOAD_SECONDS if self.handler.ready else 0.2)

    def _tell_load(self) -> None:
        load = self.handler.load
        if load != self._told:
            self._told = load
            data = json.dumps({"instance": self.instance, "load": load, "ready": self.handler.ready}).encode()
            self.publish(self._load, "", data)

    def received(self, message: wire.Message) -> None:
        """A message came by one of the subscriptions."""
        if message.subject == self._load:
            self._hear_load(message.payload)
            return
        if message.subject == self._queue:
            other = self._less_loaded()
            if other is not None:
                self.publish(_subject(self.name, other, "open"), message.reply, message.payload)
                return
        if len(message.payload) > self.options.max_message_bytes or not message.reply:
            log.warning("a message of %d bytes without a place for its answer: dropped", len(message.payload))
            return
        self.handler.received(_Line(self, message.reply), message.payload)
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

    def publish(self, subject: str, reply: str, payload: Buffer) -> None:
        """Raises TooLarge. While the broker is gone it is dropped: who needs the answer asks again."""
        if len(payload) > self.max_payload:
            raise TooLarge(
                f"an answer of {len(payload)} bytes, and the broker carries {self.max_payload}", url=self.url,
                hint="raise max_payload in the broker's configuration, put fewer environments in a lease, or use ws://",
            )  # fmt: skip
        self._write(wire.publish(subject, reply, payload))

    def _write(self, data: bytes) -> None:
        responder = self._responder
        if responder is not None and responder.transport is not None and not responder.transport.is_closing():
            responder.transport.write(data)

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
        for task in self._tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._tasks = []
        if self._service is not None:
            await self._service.stop()
            await self._client.close()
            self._service = None
        responder, self._responder = self._responder, None
        if responder is not None:
            responder.end("closed")
            await responder.ended


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
        options["nkeys_seed_str"] = _secret(credentials["nkey_seed"]).strip()
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
