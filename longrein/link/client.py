"""One lease seen from the client: a blocking request, deadlines, reconnection, a Fault made an error. No space."""

from __future__ import annotations

import json
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from msgspec.structs import replace as replace_fields

from longrein.errors import (
    CapacityReached,
    ConnectError,
    ConnectionClosed,
    Error,
    LinkError,
    LinkTimeout,
    RemoteProtocolError,
    SpecError,
    TooLarge,
)
from longrein.link import codec
from longrein.link import messages as m
from longrein.link.protocol import ANSWERS, Sheet, error_of
from longrein.link.transports import Address, Connection, ConnectOptions, parse_url

_MOST = 2**32 - 2  # numbers above it do not fit the short way of a step
T = TypeVar("T")
Answer = tuple[Any, bytearray, int]  # the reply, the whole message, and the offset of its columns


@dataclass(frozen=True)
class LinkOptions:
    """How a client behaves on the line; every field can be given to `connect` and `connect_vec` by name."""

    timeout: float | None = 300.0
    """Seconds to wait for one answer before LinkTimeout; None waits for ever."""
    wait: float = 10.0
    """Seconds during which a server that does not listen yet is tried again."""
    reconnect: float = 30.0
    """Seconds during which a lost connection is tried again before ConnectError."""
    pause: float = 1.0
    """Longest pause between two tries, in seconds; the first ones are shorter."""
    patience: float = 90.0
    """Seconds that an elastic vector environment waits while none of its environments is there."""
    silence: float = 10.0
    """Seconds without any word from the server, not even "working", after which a connection counts as dead."""
    token: str | None = None
    """The bearer token that the server asks for."""
    ca: str | Path | None = None
    """File of the authority that signed the server's certificate, where it is a private one."""
    certificate: str | Path | None = None
    """File of the client's certificate, where the server asks for one."""
    key: str | Path | None = None
    """File of its key."""
    credentials: Mapping[str, str] = field(default_factory=dict)
    """For a NATS broker: user, password, token, nkey_seed, creds."""
    max_message_bytes: int = 2**30
    """Longest message taken, in bytes."""
    listen: bool = False
    """Wait at the URL for a system that dials in, rather than dialling."""


class Client:
    """A lease on `num_envs` far environments, used by one thread at a time.

    Raises, when it is made: ConnectError, Unauthenticated, NotFound, CapacityReached, VersionMismatch, RemoteEnvError.
    """

    def __init__(
        self,
        url: str,
        *,
        env_options: Mapping[str, Any] | None = None,
        num_envs: int = 1,
        autoreset: str = "disabled",
        link: LinkOptions | None = None,
    ) -> None:
        self.url = url
        self.link = link or LinkOptions()
        self._address, self._transport = parse_url(url)
        context = tls_context(self._address, self.link)
        self._connect_options = ConnectOptions(
            timeout=min(self.link.wait, 10.0) if not self.link.listen else self.link.wait,
            max_message_bytes=self.link.max_message_bytes,
            ssl_context=context,
            credentials=dict(self.link.credentials),
            token=self.link.token,
            listen=self.link.listen,
        )
        self._sheet = Sheet()
        self._found: deque[bytearray] = deque()  # messages that were received before anybody read them
        self._bare_epoch = 0
        self._bare_step: codec.Bare
        self._bare_stepped = codec.Bare(m.Stepped(self._sheet.lease, 0))
        self._connection: Connection | None = None
        self.draining = False  # whether the server has said that it is to stop
        self.lines = 0  # how many lines it has had: a descriptor's number may come again with another line
        self._route = ""
        self._closed = False
        self._heard = time.monotonic()
        self._working: float | None = None  # seconds that the server has been at our request, as far as it told
        options = query_options(self._address) | dict(env_options or {})
        wrapped = {key: codec.wrap(value) for key, value in options.items()}
        opening = m.Open(
            self._sheet.lease, 1, 0, self._address.env, wrapped, num_envs, autoreset, token=self.link.token
        )
        self.opened: m.Opened = persist(lambda: self._open(opening), self.link.wait, self.link.pause, url)
        self._sheet.window = int(self.opened.limits.get("reply_window", self._sheet.window))

    # ------------------------------------------------------------------------------------------------- one request

    def ask(
        self, kind: type[m.Request], *fields: Any, region: codec.Buffer = b"", timeout: float | None = -1
    ) -> Answer:
        """Send one request and wait for its answer. Raises what the far side's Fault stands for, LinkTimeout,
        LeaseLost when the environments are gone, ConnectError when the server cannot be reached any more."""
        return self.answer(self.post(kind, *fields, region=region), timeout)

    def post(self, kind: type[m.Request], *fields: Any, region: codec.Buffer = b"") -> int:
        """Send one request, and return its number. A line that is down is mended first."""
        if self._closed:
            raise LinkError("this environment is closed", url=self.url, hint="connect again")
        sheet = self._sheet
        n = sheet.number()
        data = codec.encode(kind(sheet.lease, sheet.epoch, n, *fields), region)
        self._send(n, kind, data)
        return n

    def _send(self, n: int, kind: type[m.Request], data: bytes) -> None:
        sheet = self._sheet
        sheet.sent(n, kind, data)
        self._working = None
        try:
            if self._connection is None:
                self.mend()
            else:
                self._connection.send(data)
            self._heard = time.monotonic()
        except ConnectionClosed:
            self._drop()
            self.mend()
        except TooLarge:  # it was never sent
            del sheet.unanswered[n]
            sheet.n -= 1
            raise

    def step(self, region: codec.Buffer) -> Answer:
        """One step of all environments, with columns alone. The answer's reply is None where it is columns alone too.

        The way of nearly every step, hence the shortest: what is out of the ordinary goes the way of `ask`.
        """
        sheet, connection = self._sheet, self._connection
        if connection is None or sheet.unanswered or sheet.n >= _MOST or self._closed:
            return self.ask(m.Step, region=region)
        if sheet.epoch != self._bare_epoch:
            self._bare_epoch = sheet.epoch
            self._bare_step = codec.Bare(m.Step(sheet.lease, sheet.epoch, 0))
        n = sheet.n = sheet.n + 1
        word, ask, tell = n.to_bytes(4, "big"), self._bare_step, self._bare_stepped
        data = b"".join((ask.front, word, ask.back, region))
        sheet.unanswered[n] = m.Step, data
        link = self.link
        wait = link.silence if link.timeout is None or link.timeout > link.silence else link.timeout
        try:
            connection.send(data)
            found = connection.receive(wait)
        except (ConnectionClosed, TooLarge) as error:
            del sheet.unanswered[n]
            if isinstance(error, TooLarge):
                sheet.n -= 1
                raise
            self._drop()
            self._send(n, m.Step, data)
            return self.answer(n)
        if found is not None:
            if found.startswith(tell.front + word + tell.back):
                del sheet.unanswered[n]
                return None, found, tell.length
            self._found.append(found)
            self._heard = time.monotonic()
            return self.answer(n)
        self._heard = time.monotonic() - wait
        return self.answer(n, None if link.timeout is None else link.timeout - wait)

    def answer(self, n: int, timeout: float | None = -1) -> Answer:
        """Wait for the answer to request `n`."""
        seconds = self.link.timeout if timeout == -1 else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise self._too_late(n, seconds or 0.0)
            try:
                found = self.poll(n, self.link.silence if left is None else min(left, self.link.silence))
            except ConnectionClosed:
                self._drop()
                self.mend(deadline)
                continue
            if found is not None:
                return found
            if time.monotonic() - self._heard >= self.link.silence:
                self._drop()  # not a word: the line is dead, or the server is
                self.mend(deadline)

    def poll(self, n: int, timeout: float) -> Answer | None:
        """The answer to request `n` if it comes within `timeout` seconds. Raises ConnectionClosed: `mend` then."""
        sheet = self._sheet
        deadline = time.monotonic() + timeout
        wait = timeout
        while True:
            connection = self._connection
            if connection is None:
                raise ConnectionClosed("it is down", url=self.url)
            data = self._found.popleft() if self._found else connection.receive(wait)
            if data is not None:
                self._heard = time.monotonic()
                if data:
                    reply, offset = codec.decode_reply(data)
                    asked = sheet.unanswered.get(n)
                    if sheet.accept(reply, n):
                        if type(reply) is m.Fault:
                            if reply.code != "gap" and reply.code != "busy":
                                raise self._error(reply)
                            self._repeat()
                        elif asked is None or type(reply) is not ANSWERS[asked[0]]:
                            raise RemoteProtocolError(f"a {type(reply).__name__} is not the answer", url=self.url)
                        else:
                            return reply, data, offset
                    elif type(reply) is m.Working and reply.n == n:
                        self._working = reply.elapsed
                    elif type(reply) is m.Draining:
                        self.draining = True
                    elif type(reply) is m.Fault and reply.lease == "":
                        raise self._error(reply)
            wait = deadline - time.monotonic()
            if wait <= 0:
                if data is None:
                    return None
                wait = 0.0  # something is arriving: look again without waiting

    def ping(self, timeout: float = 10.0) -> float:
        """One round trip with no environment in it; seconds. Raises LinkTimeout, ConnectionClosed."""
        if self._connection is None:
            self.mend()
        connection = self._connection
        assert connection is not None
        started = time.perf_counter()
        connection.send(codec.encode(m.Ping(self._sheet.lease, self._sheet.epoch, -1)))
        while (left := started + timeout - time.perf_counter()) > 0:
            data = connection.receive(left)
            if data:
                reply, _ = codec.decode_reply(data)
                self._sheet.accept(reply, -1)
                if type(reply) is m.Pong:
                    return time.perf_counter() - started
        raise LinkTimeout(f"no pong within {timeout:g} s", seconds=timeout, url=self.url)

    @property
    def working(self) -> float | None:
        """Seconds that the server has been at the last request, as far as it told."""
        return self._working

    def silent_for(self, now: float) -> float:
        """Seconds since the last word from the server, or since it was last asked. `now` is of time.monotonic()."""
        return now - self._heard

    def fileno(self) -> int:
        """Readable when something came; -1 while the line is down."""
        return -1 if self._connection is None else self._connection.fileno()

    def _too_late(self, n: int, seconds: float) -> LinkTimeout:
        silent = time.monotonic() - self._heard
        at_work = (
            f"the server is still at it, for {self._working:.1f} s"
            if self._working is not None
            else f"no word from the server for {silent:.1f} s"
        )
        return LinkTimeout(
            f"no answer to request {n} within {seconds:g} s; {at_work}",
            seconds=seconds,
            url=self.url,
            hint="the lease is still held: go on, or give a longer timeout=",
        )

    def _error(self, fault: m.Fault) -> Error:
        return error_of(fault, self.url)

    # ------------------------------------------------------------------------------------------- opening and mending

    def _open(self, opening: m.Open) -> m.Opened:
        connection = self._dial()
        connection.route("", opening.lease)  # so that a proxy can keep the lease with its server from the first word on
        try:
            welcome = self._say(connection, m.Hello("", 0, 0, [m.PROTOCOL_VERSION], token=self.link.token), m.Welcome)
            opened = self._say(connection, opening, m.Opened)
        except BaseException:
            connection.close()
            raise
        self._connect_options = replace(self._connect_options, instance=welcome.instance if self.link.listen else "")
        self._connection = connection
        self.lines += 1
        connection.route(opened.route, opening.lease)
        self._route = opened.route
        replaced: m.Opened = replace_fields(opened, limits=dict(welcome.limits))
        return replaced

    def _dial(self) -> Connection:
        return self._transport.load().connect(self._address, self._connect_options)

    def _say(self, connection: Connection, request: m.Request, wanted: type[Any]) -> Any:
        """A request outside the numbering, and its answer: Hello, Open, Resume."""
        connection.send(codec.encode(request))
        heard = time.monotonic()
        while True:
            data = connection.receive(self.link.silence)
            now = time.monotonic()
            if data is None:
                if now - heard >= self.link.silence:
                    raise ConnectionClosed(f"no word for {self.link.silence:g} s", url=self.url)
                continue
            heard = now
            if not data:
                continue
            reply, _ = codec.decode_reply(data)
            if type(reply) is wanted and reply.lease == request.lease:
                if not isinstance(reply, m.Opened) or reply.epoch == request.epoch:
                    return reply
            elif type(reply) is m.Fault and reply.lease in (request.lease, ""):
                raise self._error(reply)

    def mend(self, deadline: float | None = None) -> None:
        """Open the line again, take the lease over, and repeat what has no answer. Raises LeaseLost, ConnectError."""
        left = self.link.reconnect if deadline is None else min(self.link.reconnect, deadline - time.monotonic())
        persist(self._resume, max(left, 0.0), self.link.pause, self.url)

    def _resume(self) -> None:
        connection = self._dial()
        sheet = self._sheet
        try:
            connection.route(self._route, sheet.lease)
            if self._route == "":
                self._say(connection, m.Hello("", 0, 0, [m.PROTOCOL_VERSION], token=self.link.token), m.Welcome)
            request = m.Resume(sheet.lease, sheet.next_epoch(), 0, sheet.n, self.link.token)
            self._say(connection, request, m.Opened)
            for data in sheet.repeats():
                connection.send(data)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self.lines += 1
        self._heard = time.monotonic()

    def _repeat(self) -> None:
        """Say again, in order, all that has no answer: the server has missed something."""
        assert self._connection is not None
        time.sleep(0.01)  # a server that is busy should not be hurried
        for data in self._sheet.repeats():
            self._connection.send(data)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        self._found.clear()
        if connection is not None:
            connection.close()

    def break_line(self) -> None:
        """Close the line but keep the lease: the next request mends it."""
        self._drop()

    def close(self, timeout: float = 5.0) -> None:
        """Give the lease back. May be called twice; never raises for a server that is gone."""
        if self._closed:
            return
        try:
            if self._connection is not None and not self._sheet.unanswered:
                n = self.post(m.Close)
                self.answer(n, timeout)
            elif self._connection is not None:
                self._sheet.n += 1  # an answer is missing: ask for the end, and do not wait for it
                close = m.Close(self._sheet.lease, self._sheet.epoch, self._sheet.n)
                self._connection.send(codec.encode(close))
        except (LinkError, OSError):
            pass  # the server ends the lease by itself when its time is up
        finally:
            self._closed = True
            self._drop()


def persist(attempt: Callable[[], T], seconds: float, pause: float, url: str) -> T:
    """Try again, with growing pauses, while the far side does not listen or is only just going away."""
    started = time.monotonic()
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(seconds),
        wait=tenacity.wait_random_exponential(multiplier=0.01, max=pause),
        retry=tenacity.retry_if_exception(_is_passing),
        reraise=True,
    )
    try:
        return retrying(attempt)
    except (ConnectError, ConnectionClosed) as error:
        tried = time.monotonic() - started
        text = str(error).removeprefix(f"{url}: ").partition("\n  hint: ")
        raise ConnectError(f"{text[0]} (tried for {tried:.1f} s)", url=url, hint=text[2]) from error


def _is_passing(error: BaseException) -> bool:
    """Whether trying again may help: nobody listens yet, or a line broke; a refusal stands."""
    return isinstance(error, (ConnectError, ConnectionClosed)) and not isinstance(error, CapacityReached)


def query_options(address: Address) -> dict[str, Any]:
    """The options in a URL: each value is JSON where it is that (true, 10, [1, 2]), else the text itself."""
    options: dict[str, Any] = {}
    for name, text in address.options.items():
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options


def tls_context(address: Address, link: LinkOptions) -> ssl.SSLContext | None:
    """The TLS settings of the client's end; of the listening end where it waits for a system to dial in."""
    if not address.secure:
        return None
    try:
        if link.listen:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        else:
            context = ssl.create_default_context(cafile=str(link.ca) if link.ca else None)
        if link.certificate is not None:
            context.load_cert_chain(link.certificate, link.key)
        elif link.listen:
            raise SpecError("certificate", f"{address.url} needs one to wait at", hint="certificate=FILE, key=FILE")
    except (OSError, ssl.SSLError) as error:
        raise SpecError("ca", f"the TLS files cannot be used: {error}") from None
    return context


def link_options(options: Mapping[str, Any]) -> tuple[LinkOptions, dict[str, Any]]:
    """Part the keyword arguments of `connect`: those of the link, and those for the environment's maker."""
    names = LinkOptions.__dataclass_fields__.keys()
    return LinkOptions(**{k: v for k, v in options.items() if k in names}), {
        k: v for k, v in options.items() if k not in names
    }


def listening(url: str, link: LinkOptions) -> tuple[str, LinkOptions]:
    """ws+listen://... is ws://... with `listen` on."""
    scheme, separator, rest = url.partition("+listen://")
    return (f"{scheme}://{rest}", replace(link, listen=True)) if separator else (url, link)
