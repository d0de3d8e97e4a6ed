"""Leases over listening transports: one host for each lease, from a recipe on the allow list; limits and deadlines.

It knows who asked, what for and when; what is in an observation it does not know, and how bytes move neither.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_options
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import uvloop
from msgspec.structs import replace

from longrein.errors import ConnectError, RemoteProtocolError, SpaceError, SpecError, TooLarge
from longrein.link import codec, host, workers
from longrein.link import messages as m
from longrein.link.access import (
    ANYONE,
    Principal,
    Tokens,
    calling_tls,
    listening_tls,
    one_token,
    read_tokens,
    refuse_open_door,
)
from longrein.link.dialects import dialect_named
from longrein.link.host import Host, RequestFault, encode_reply
from longrein.link.metrics import Metrics, Reading
from longrein.link.policy_host import PolicyHost
from longrein.link.protocol import AUTORESET_MODES, FAULTS, MIN_LEASE_CHARS, REPLY_WINDOW, Ledger, Verdict
from longrein.link.served import OptionRefused, Served, serve_list
from longrein.link.transports import Address, Buffer, Line, Listener, ListenOptions, Transport, parse_url

log = logging.getLogger("longrein.server")

SERVER_VERSION = f"longrein/{version('longrein')}"
TICK_SECONDS = 0.25
BAD_MESSAGES = 8  # so many on one line, and the line is closed
REMEMBERED_ENDS = 1024  # ended leases whose reason is kept, for a client that comes back


@dataclass(frozen=True)
class Limits:
    """What a server allows; all of it is announced in Welcome, and each has a fault of its own."""

    max_message_bytes: int = 64 * 2**20
    """Longest message taken, in bytes."""
    max_leases: int = 1024
    """Open leases at once."""
    max_leases_per_client: int = 1024
    """Open leases at once of one token, or of one address where there are no tokens."""
    max_envs_per_lease: int = 4096
    """Environments in one lease."""
    lease_ttl: float = 60.0
    """Seconds that a lease outlives its lost connection."""
    idle_seconds: float = 1800.0
    """Seconds without a request after which a lease is closed."""
    step_seconds: float = 300.0
    """Seconds that one request may take in the environment."""
    working_seconds: float = 1.0
    """Seconds between two Working messages."""
    drain_seconds: float = 30.0
    """Seconds that live leases get to finish once the server is told to stop."""
    reply_window: int = REPLY_WINDOW
    """Answers kept for each lease."""


@dataclass(slots=True, eq=False)
class Lease:
    """One client's exclusive hold on environments, as the server keeps it."""

    name: str
    served: Served
    num_envs: int
    owner: str
    principal: Principal
    opening: m.Open
    ledger: Ledger
    worker: workers.Worker
    line: Line | None
    born: float
    seen: float
    lost: float | None = None
    opened: m.Opened | None = None  # once the environments are made
    text: bool = False
    queue: deque[tuple[m.Request, bytes, int, float]] = field(default_factory=deque)
    asked: dict[int, list[Line]] = field(
        default_factory=dict
    )  # who waits for which answer, where a line is one request
    running: m.Request | None = None
    since: float = 0.0
    told: float = 0.0
    steps: int = 0
    quick_steps: int = 0  # those that went the short way since the last tick
    requests: int = 0  # other than steps
    seconds: float = 0.0  # in the environment
    bare: codec.Bare | None = None  # recognises its steps of columns alone, in the present epoch


class Server:
    """Serves environments at one or more URLs, on a thread of its own.

    things: what may be opened, and nothing else; see `longrein.link.served` for what a thing can be.
    at: URLs to listen at; port 0 takes a free one, and `urls` tells which. dial: URLs of trainers that wait.
    options: fixed options for the environments' makers. allow_options: further ones that a client may pass.
    token, token_file: who may connect. certificate, key, client_ca: files for TLS and for client certificates.
    ca: file of the authority that signed a broker's or a waiting trainer's certificate. credentials: for a broker.
    dialect: speak the wire format of an older system: "gymie", "gym-nats" or "multiserver".
    workers: "auto" (a thread pool, and inline what is measured to be cheap), "inline", "thread" (a thread of its own
    for each lease) or "process" (a process of its own for each lease).

    Raises SpecError where an argument cannot be, ConnectError where an address cannot be had.
    """

    def __init__(
        self,
        things: Any,
        *,
        at: str | Sequence[str] = (),
        dial: str | Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        allow_options: Sequence[str] = (),
        token: str | None = None,
        token_file: str | Path | None = None,
        certificate: str | Path | None = None,
        key: str | Path | None = None,
        client_ca: str | Path | None = None,
        ca: str | Path | None = None,
        credentials: Mapping[str, str] | None = None,
        allowed_origins: Sequence[str] = (),
        insecure: bool = False,
        workers: str = "auto",
        limits: Limits | None = None,
        dialect: str | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.instance = secrets.token_hex(6)
        self._served = serve_list(_listed(things), options, allow_options)
        self._tokens = read_tokens(Path(token_file)) if token_file else one_token(token) if token else Tokens()
        self._workers = _checked_kind(workers)
        addresses = [parse_url(url) for url in _urls(at)]
        dials = [parse_url(url) for url in _urls(dial)]
        spoken = None
        if dialect is not None:
            spoken = dialect_named(dialect, [address.scheme for address, _ in addresses])
            _refuse_in_dialect(dialect, bool(self._tokens) or client_ca is not None, bool(dials))
        if not addresses and not dials:
            raise SpecError("at", "no URL to listen at", hint="at='ws://127.0.0.1:5000'")
        context = listening_tls(certificate, key, client_ca)
        guarded = bool(self._tokens) or client_ca is not None
        for address, _ in addresses:
            refuse_open_door(address, guarded, insecure, context, tokens=dialect is None)
        self._memory = any(address.scheme == "memory" for address, _ in addresses)
        if self._memory and len(addresses) + len(dials) > 1:
            raise SpecError("at", "memory:// stands alone: it runs in its caller's thread", hint="use a second server")
        calling = calling_tls(ca, certificate, key)
        listen_options = ListenOptions(
            self.limits.max_message_bytes,
            tuple(allowed_origins),
            context,
            dict(credentials or {}),
            token,
            self.instance,
        )
        call_options = replace_options(listen_options, ssl_context=calling)
        self._listeners: list[Listener] = [
            (spoken or t).load().listen(a, call_options if a.scheme in ("nats", "tls") else listen_options)
            for a, t in addresses
        ]
        self._listeners += [_dial_of(t)(a, call_options) for a, t in dials]
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._leases: dict[str, Lease] = {}
        self._bare: dict[bytes, Lease] = {}  # by the beginning of their bare steps
        self._ends: dict[str, str] = {}
        self._principals: dict[Line, Principal] = {}
        self._bad: Counter[Line] = Counter()
        self._held: dict[Line, set[str]] = {}
        self._draining: float | None = None
        self.counts: Counter[str] = Counter()
        self.fault_counts: Counter[str] = Counter()
        self.seconds: dict[str, float] = {"environment": 0.0, "queue": 0.0}  # "environment", "queue"
        self._metrics = Metrics(self._reading)

    # ------------------------------------------------------------------------------------------------ its life

    @property
    def urls(self) -> list[str]:
        """Where it really listens."""
        return [listener.url for listener in self._listeners]

    @property
    def ended(self) -> bool:
        """Whether it has stopped serving, for instance because it was drained."""
        return self._stopped.is_set()

    def start(self) -> Self:
        """Listen, and return. Raises ConnectError when an address cannot be had."""
        if self._memory:
            _run_at_once(self._listeners[0].start(self))
            return self
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True, name="longrein-server")
        self._thread.start()
        started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once: the leases end, the environments are closed. May be called twice."""
        if self._memory:
            self._end_all("the server closed")
            _run_at_once(self._listeners[0].close())
            self._stopped.set()
            return
        loop = self._loop
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(self._stop)
            except RuntimeError:
                pass  # the loop closed in between: that is what was wanted
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def drain(self) -> None:
        """Take no new leases, tell the clients, and close when the live leases have ended or their time is up."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._drain)
        else:
            self._draining = time.monotonic()

    def wait(self) -> None:
        """Wait until it is closed. In the main thread SIGTERM drains, Ctrl-C closes, and a second one too."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.signal(signal.SIGTERM, lambda *_: self.drain())
        else:
            previous = None
        try:
            while not self._stopped.wait(0.5):
                pass
        except KeyboardInterrupt:
            log.info("interrupted: closing")
        finally:
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
            self.close()

    def _run(self, started: threading.Event) -> None:
        loop = self._loop = uvloop.new_event_loop()
        asyncio.set_event_loop(loop)
        self._pool = ThreadPoolExecutor(self.limits.max_leases, thread_name_prefix="longrein-env")
        self._ending = asyncio.Event()
        try:
            for listener in self._listeners:
                loop.run_until_complete(listener.start(self))
        except BaseException as error:  # handed to the thread that called start()
            self._failure = error
            for listener in self._listeners:
                loop.run_until_complete(listener.close())
            loop.close()
            started.set()
            return
        started.set()
        loop.create_task(self._ticks())
        loop.run_until_complete(self._ending.wait())
        self._end_all("the server closed")
        for listener in self._listeners:
            loop.run_until_complete(listener.close())
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        self._pool.shutdown(wait=False)
        loop.run_until_complete(loop.shutdown_default_executor(5.0))
        loop.close()
        self._stopped.set()

    def _stop(self) -> None:
        self._ending.set()

    def _drain(self) -> None:
        if self._draining is None:
            self._draining = time.monotonic()
            log.info("draining: %d leases have %.0f s to finish", len(self._leases), self.limits.drain_seconds)
            for lease in self._leases.values():
                if lease.line is not None and lease.line.hears:
                    reply = m.Draining(lease.name, 0, self.limits.drain_seconds)
                    lease.line.send(encode_reply(reply, lease.text), final=False)

    async def _ticks(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            for lease in list(self._leases.values()):
                self._tick(lease, now)
            if self._draining is not None and (not self._leases or now - self._draining > self.limits.drain_seconds):
                self._stop()

    def _tick(self, lease: Lease, now: float) -> None:
        limits, request = self.limits, lease.running
        if lease.quick_steps:
            lease.seen = now
            self._settle(lease)
        if request is not None:
            elapsed = now - lease.since
            if elapsed > limits.step_seconds:
                text = f"{type(request).__name__} took longer than the {limits.step_seconds:g} s that are allowed"
                fault = m.Fault(lease.name, request.n, "env_timeout", text, applied=None)
                self._send(lease, request.n, encode_reply(fault, lease.text))
                self._end(lease, f"the environment hung: {text}")
            elif now - max(lease.told, lease.since) >= limits.working_seconds and lease.line is not None:
                lease.told = now
                waiting = lease.asked.get(request.n)
                line = waiting[-1] if waiting else lease.line
                line.send(encode_reply(m.Working(lease.name, request.n, elapsed), lease.text), final=False)
        elif lease.lost is not None and now - lease.lost > limits.lease_ttl:
            self._end(lease, f"the connection was lost for more than {limits.lease_ttl:g} s")
        elif now - lease.seen > limits.idle_seconds:
            self._end(lease, f"idle for more than {limits.idle_seconds:g} s")

    # ------------------------------------------------------------------------- what the transports call (Handler)

    @property
    def load(self) -> int:
        """How many leases are open."""
        return len(self._leases)

    @property
    def ready(self) -> bool:
        """Whether new leases are taken."""
        return self._draining is None

    def holds(self, lease: str) -> bool:
        """Whether this lease is still open."""
        return lease in self._leases

    def describe(self) -> dict[str, Any]:
        """The server in plain data."""
        return {
            "server": SERVER_VERSION,
            "instance": self.instance,
            "protocol": m.PROTOCOL_VERSION,
            "environments": sorted(self._served),
            "leases": len(self._leases),
            "limits": asdict(self.limits),
        }

    def metrics(self) -> bytes:
        """The counters in Prometheus' text format."""
        return self._metrics.text()

    def received(self, line: Line, message: Buffer) -> None:
        """A message came: judge it, and answer it now or later."""
        lease = self._bare.get(bytes(message[:_BARE_FRONT]))
        if lease is not None and self._step_now(line, lease, message):
            return
        try:
            request, offset = codec.decode_request(message)
        except RemoteProtocolError as error:
            self._bad_message(line, message, error)
            return
        lease = self._leases.get(request.lease)
        if lease is None or type(request) in _DESK:
            self._at_desk(line, request, lease, codec.is_json(message))
            return
        if lease.line is not line and not self._may_use(line, lease, request, codec.is_json(message)):
            return
        verdict, code = lease.ledger.judge(request)
        if verdict is Verdict.TAKE:
            now = lease.seen = time.monotonic()
            lease.line = line
            if not line.persistent:
                lease.asked[request.n] = [line]
            if not code and (type(request) in _SCOPES):
                code = "" if _SCOPES[type(request)] in lease.principal.scopes else "forbidden"
            if code:
                lease.ledger.last = request.n
                fault = self._fault(lease.name, request.n, code, _REASONS[code].format(kind=type(request).__name__))
                self._answer(lease, request.n, encode_reply(fault, codec.is_json(message)))
                return
            lease.ledger.take(request)
            if lease.running is None and not lease.queue:
                self._work(lease, request, message, offset, now)
            else:
                lease.queue.append((request, bytes(message), offset, now))
        else:
            self._not_taken(lease, line, request, verdict, code, codec.is_json(message))

    def _step_now(self, line: Line, lease: Lease, message: Buffer) -> bool:
        """The short way of nearly every step: the next one, of columns alone, of a lease that is idle and quick."""
        ledger, bare = lease.ledger, lease.bare
        assert bare is not None
        n = int.from_bytes(message[_BARE_FRONT : _BARE_FRONT + 4], "big")
        if (
            n != ledger.last + 1
            or ledger.answered != ledger.last
            or message[_BARE_FRONT + 4 : bare.length] != bare.back
            or ledger.phase != "reset"
            or lease.queue
            or (lease.line is not line and (line.persistent or self._tokens))
        ):
            return False
        reply = lease.worker.step_now(lease.name, n, message, bare.length)
        if reply is None:
            return False
        ledger.last = ledger.answered = n
        ledger.answers[n] = reply
        ledger.answers.pop(n - ledger.window, None)
        lease.quick_steps += 1
        lease.line = line
        try:
            line.send(reply)
        except TooLarge:
            self._send_on(lease, line, n, reply)
        return True

    def lost(self, line: Line) -> None:
        """A line is gone: its leases wait for their clients."""
        self._principals.pop(line, None)
        self._bad.pop(line, None)
        now = time.monotonic()
        for name in self._held.pop(line, ()):
            lease = self._leases.get(name)
            if lease is not None and lease.line is line:
                lease.line, lease.lost = None, now

    # ------------------------------------------------------------------------------------------- requests of a lease

    def _work(self, lease: Lease, request: m.Request, data: Buffer, offset: int, now: float) -> None:
        lease.running, lease.since = request, now
        if type(request) is m.Close:
            lease.running = None
            self._answer(lease, request.n, encode_reply(m.Closed(lease.name, request.n), codec.is_json(data)))
            self._end(lease, "its client closed it")
            return
        reply = lease.worker.run(request, data, offset, functools.partial(self._done, lease, request))
        if reply is not None:
            self._done(lease, request, reply)

    def _done(self, lease: Lease, request: m.Request, reply: bytes) -> None:
        if lease.running is not request:
            return  # it was given up: the lease has ended
        lease.seconds += time.monotonic() - lease.since
        if type(request) is m.Step:
            lease.steps += 1
        else:
            lease.requests += 1
        lease.running = None
        self._answer(lease, request.n, reply)
        if lease.queue and lease.running is None and lease.name in self._leases:
            following, data, offset, queued = lease.queue.popleft()
            now = time.monotonic()
            self.seconds["queue"] += now - queued
            self._work(lease, following, data, offset, now)

    def _answer(self, lease: Lease, n: int, reply: bytes) -> None:
        lease.ledger.answer(n, reply)
        self._send(lease, n, reply)

    def _send(self, lease: Lease, n: int, reply: bytes) -> None:
        if lease.asked:
            for line in lease.asked.pop(n, ()):  # all of them: HTTP answers a connection's requests in their order
                self._send_on(lease, line, n, reply)
        elif lease.line is not None:
            self._send_on(lease, lease.line, n, reply)

    def _send_on(self, lease: Lease, line: Line, n: int, reply: bytes) -> None:
        try:
            line.send(reply)
        except TooLarge as error:  # a broker's limit: the client must hear of it, not wait
            fault = m.Fault(lease.name, n, "too_large", str(error), applied=True)
            lease.ledger.answers[n] = encode_reply(fault, lease.text)
            self.fault_counts["too_large"] += 1
            line.send(lease.ledger.answers[n])

    def _not_taken(self, lease: Lease, line: Line, request: m.Request, verdict: Verdict, code: str, text: bool) -> None:
        if verdict is Verdict.REPEAT:
            self.counts["repeated_answers"] += 1
            lease.line = line
            line.send(lease.ledger.answers[request.n])
        elif verdict is Verdict.WAIT:
            lease.line = line
            if not line.persistent:
                lease.asked.setdefault(request.n, []).append(line)
        else:
            expected = lease.ledger.last + 1
            details = {"expected": expected, "epoch": lease.ledger.epoch}
            reason = _REASONS[code].format(n=request.n, expected=expected, window=lease.ledger.window)
            self._refuse(line, lease.name, request.n, code, reason, text, **details)

    def _may_use(self, line: Line, lease: Lease, request: m.Request, text: bool) -> bool:
        """A line that the lease does not know yet: its token, if tokens are asked for, must be the owner's."""
        if self._tokens and (line.persistent or line.peer.token is not None):
            principal = self._principal(line, None)
            if principal is None or principal.name != lease.principal.name:
                self._refuse(line, lease.name, request.n, "unauthenticated", _REASONS["unauthenticated"], text)
                return False
        if line.persistent:
            if lease.line is not None and lease.line.persistent:
                self._refuse(line, lease.name, request.n, "fenced", "another line holds this lease: Resume it", text)
                return False
            self._hold(line, lease)
        return True

    # ---------------------------------------------------------------------------------- what concerns no lease yet

    def _at_desk(self, line: Line, request: m.Request, lease: Lease | None, text: bool) -> None:
        match request:
            case m.Ping():
                line.send(encode_reply(m.Pong(request.lease, request.n), text))
            case m.Hello():
                self._hello(line, request, text)
            case m.Open():
                self._open(line, request, lease, text)
            case m.Resume():
                self._resume(line, request, lease, text)
            case _:
                self._refuse_lost(line, request, text)

    def _hello(self, line: Line, request: m.Hello, text: bool) -> None:
        if m.PROTOCOL_VERSION not in request.versions:
            reason = f"this server speaks version {m.PROTOCOL_VERSION}, the client offers {request.versions}"
            self._refuse(line, "", request.n, "version", reason, text, hint="use the same release at both ends")
            return
        principal = self._principal(line, request.token)
        if principal is None:
            self._refuse(line, "", request.n, "unauthenticated", _REASONS["unauthenticated"], text)
            return
        if line.persistent:
            self._principals[line] = principal
        limits = {name: float(value) for name, value in asdict(self.limits).items()}
        welcome = m.Welcome(
            request.lease, request.n, m.PROTOCOL_VERSION, SERVER_VERSION, self.instance, sorted(self._served), limits
        )
        line.send(encode_reply(welcome, text))

    def _principal(self, line: Line, token: str | None) -> Principal | None:
        if not self._tokens:
            return Principal(line.peer.certificate, ANYONE.scopes) if line.peer.certificate else ANYONE
        known = self._principals.get(line)
        return known or self._tokens.recognise(token or line.peer.token)

    def _open(self, line: Line, request: m.Open, lease: Lease | None, text: bool) -> None:
        principal = self._principal(line, request.token)
        if principal is None:
            self._refuse(line, request.lease, 0, "unauthenticated", _REASONS["unauthenticated"], text)
            return
        if lease is not None:  # rule 1: said again
            if lease.principal.name != principal.name or lease.opening != request:
                self._refuse(line, request.lease, 0, "out_of_turn", "a lease of this name is open already", text)
            else:
                self._hold(line, lease)
                if lease.opened is not None:
                    line.send(encode_reply(lease.opened, text))
            return
        problem = self._cannot_open(line, request, principal)
        if problem is not None:
            self._refuse(line, request.lease, 0, *problem, text)
            return
        served = self._served[request.env or next(iter(self._served))]
        worker = self._worker(request.lease)
        now = time.monotonic()
        lease = Lease(
            request.lease,
            served,
            request.num_envs,
            _owner(line, principal, bool(self._tokens)),
            principal,
            request,
            Ledger(self.limits.reply_window),
            worker,
            line,
            now,
            now,
            text=text,
            running=request,
            since=now,
        )
        self._leases[lease.name] = lease
        self._hold(line, lease)
        make = functools.partial(
            build_host, served, request.num_envs, request.options, request.autoreset, request.arrays
        )
        worker.open(make, functools.partial(self._opened, lease, text))

    def _cannot_open(self, line: Line, request: m.Open, principal: Principal) -> tuple[str, str] | None:
        limits, owner = self.limits, _owner(line, principal, bool(self._tokens))
        if "open" not in principal.scopes:
            return "forbidden", "this token may not open environments"
        if not self.ready:
            return "draining", "the server is stopping and takes no new leases"
        if len(request.lease) < MIN_LEASE_CHARS or len(request.lease) > 64 or request.n != 0:
            return "bad_message", f"a lease's name has {MIN_LEASE_CHARS} to 64 characters, and Open is its request 0"
        if request.env not in self._served and (request.env or len(self._served) > 1):
            asked = f"{request.env!r} is not served here" if request.env else "the URL names no environment"
            return "not_found", f"{asked}; served: {', '.join(sorted(self._served))}"
        if not 1 <= request.num_envs <= limits.max_envs_per_lease:
            return (
                "too_large",
                f"{request.num_envs} environments in a lease; 1 to {limits.max_envs_per_lease} are allowed",
            )
        if request.autoreset not in AUTORESET_MODES or request.arrays not in ("list", "base64"):
            return "bad_message", f"autoreset is one of {', '.join(AUTORESET_MODES)}; arrays is list or base64"
        if len(self._leases) >= limits.max_leases:
            return "capacity", f"all {limits.max_leases} leases are taken"
        if sum(lease.owner == owner for lease in self._leases.values()) >= limits.max_leases_per_client:
            return "capacity", f"all {limits.max_leases_per_client} leases of one client are taken"
        served = self._served[request.env or next(iter(self._served))]
        if served.exclusive and any(lease.served is served for lease in self._leases.values()):
            return "capacity", f"there is one {served.name}, and another client holds it"
        return None

    def _worker(self, name: str) -> workers.Worker:
        loop, kind = self._loop, self._workers
        if loop is None or kind == "inline":
            return workers.InlineWorker()
        if kind == "process":
            return workers.ProcessWorker(loop, functools.partial(self._died, name))
        pool = self._pool if kind == "auto" else None
        return workers.ThreadWorker(functools.partial(_post, loop), pool, inline=kind == "auto")

    def _opened(self, lease: Lease, text: bool, opened: dict[str, Any] | Exception) -> None:
        if lease.name not in self._leases:
            return  # the client gave up, or the server closes
        if isinstance(opened, Exception):
            fault = _fault_of_opening(lease.name, opened)
            self.fault_counts[fault.code] += 1
            level = logging.INFO if fault.code == "forbidden" else logging.WARNING
            log.log(level, "lease %s: %s could not be made: %s", lease.name[:6], lease.served.name, opened)
            if lease.line is not None:
                lease.line.send(encode_reply(fault, text))
            self._end(lease, f"{lease.served.name} could not be made")
            return
        lease.running = None
        self.counts["leases_opened"] += 1
        self._expect_bare(lease)
        route = lease.line.route(lease.name) if lease.line is not None else ""
        lease.opened = m.Opened(lease.name, 0, lease.ledger.epoch, 0, route=route, **opened)
        log.info("lease %s: %s x %d opened by %s", lease.name[:6], lease.served.name, lease.num_envs, lease.owner)
        if lease.line is not None:
            lease.line.send(encode_reply(lease.opened, text))

    def _resume(self, line: Line, request: m.Resume, lease: Lease | None, text: bool) -> None:
        if lease is None:
            self._refuse_lost(line, request, text)
            return
        principal = self._principal(line, request.token)
        if principal is None or principal.name != lease.principal.name:
            self._refuse(line, lease.name, request.n, "unauthenticated", _REASONS["unauthenticated"], text)
            return
        if not lease.ledger.take_over(request.epoch):
            self._refuse(line, lease.name, request.n, "fenced", _REASONS["fenced"], text, epoch=lease.ledger.epoch)
            return
        self.counts["resumes"] += 1
        self._expect_bare(lease)
        old = lease.line
        lease.seen = time.monotonic()
        self._hold(line, lease)
        if old is not None and old is not line and old.persistent:
            old.close("another connection has taken the lease over")
        log.info("lease %s: resumed by %s", lease.name[:6], lease.owner)
        if lease.opened is not None:
            opened = replace(lease.opened, epoch=lease.ledger.epoch, last=lease.ledger.last, n=request.n)
            line.send(encode_reply(opened, text))

    def _expect_bare(self, lease: Lease) -> None:
        """Recognise this lease's steps, in its present epoch, by how they begin."""
        if lease.bare is not None:
            self._bare.pop(lease.bare.front, None)
        lease.bare = codec.Bare(m.Step(lease.name, lease.ledger.epoch, 0))
        if len(lease.bare.front) == _BARE_FRONT:  # as it is with the names and epochs that our client draws
            self._bare[lease.bare.front] = lease

    def _hold(self, line: Line, lease: Lease) -> None:
        lease.line, lease.lost = line, None
        if line.persistent:
            self._held.setdefault(line, set()).add(lease.name)

    # ------------------------------------------------------------------------------------------------------ the end

    def _end(self, lease: Lease, reason: str) -> None:
        """The lease is over, for a reason that a late request is told."""
        if self._leases.pop(lease.name, None) is None:
            return
        if lease.bare is not None:
            self._bare.pop(lease.bare.front, None)
        self._count(lease, self.counts, self.seconds)
        lease.running = None
        lease.queue.clear()
        if lease.line is not None and lease.line in self._held:
            self._held[lease.line].discard(lease.name)
        self._ends[lease.name] = reason
        if len(self._ends) > REMEMBERED_ENDS:
            del self._ends[next(iter(self._ends))]
        lease.worker.close()
        if lease.opened is not None:
            seconds = time.monotonic() - lease.born
            log.info("lease %s: %d steps in %.1f s, ended: %s", lease.name[:6], lease.steps, seconds, reason)

    def _settle(self, lease: Lease) -> None:
        """Enter what went the short way since the last time."""
        lease.steps += lease.quick_steps
        lease.seconds += lease.worker.quick_seconds
        lease.quick_steps, lease.worker.quick_seconds = 0, 0.0

    def _count(self, lease: Lease, counts: Counter[str], seconds: dict[str, float]) -> None:
        self._settle(lease)
        counts["steps"] += lease.steps * lease.num_envs
        counts["requests"] += lease.steps + lease.requests
        seconds["environment"] += lease.seconds

    def _reading(self) -> Reading:
        """The counters as they are now, those of open leases included."""
        counts, seconds = self.counts.copy(), dict(self.seconds)
        for lease in list(self._leases.values()):
            self._count(lease, counts, seconds)
        return Reading(len(self._leases), counts, self.fault_counts, seconds)

    def _end_all(self, reason: str) -> None:
        for lease in list(self._leases.values()):
            self._end(lease, reason)

    def _died(self, name: str, exitcode: int | None) -> None:
        """A lease's process died."""
        lease = self._leases.get(name)
        if lease is None:
            return
        reason = f"the environment's process died with exit code {exitcode}"
        log.error("lease %s: %s", name[:6], reason)
        running = lease.running
        if running is not None and lease.line is not None:
            fault = m.Fault(name, running.n, "lease_lost", reason, applied=None)
            self._send(lease, running.n, encode_reply(fault, lease.text))
        self._end(lease, reason)

    # -------------------------------------------------------------------------------------------------------- faults

    def _fault(self, lease: str, n: int, code: str, reason: str, **details: Any) -> m.Fault:
        self.fault_counts[code] += 1
        return m.Fault(lease, n, code, reason, FAULTS[code].retryable, details=details)

    def _refuse(self, line: Line, lease: str, n: int, code: str, reason: str, text: bool, **details: Any) -> None:
        line.send(encode_reply(self._fault(lease, n, code, reason, **details), text))

    def _refuse_lost(self, line: Line, request: m.Request, text: bool) -> None:
        reason = self._ends.get(request.lease, "this server knows no such lease; it may have restarted")
        self._refuse(line, request.lease, request.n, "lease_lost", reason, text)

    def _bad_message(self, line: Line, message: Buffer, error: RemoteProtocolError) -> None:
        self.counts["bad_messages"] += 1
        self._refuse(line, "", 0, "bad_message", str(error), codec.is_json(message))
        if line.persistent:
            self._bad[line] += 1
            if self._bad[line] >= BAD_MESSAGES:
                line.close("too many bytes that are no message")


_BARE_FRONT = len(codec.Bare(m.Step("x" * 22, 1, 0)).front)  # of our own client's names, in its first 127 epochs
_DESK = frozenset({m.Hello, m.Open, m.Resume, m.Ping})
_SCOPES: dict[type[m.Request], str] = {m.Render: "render", m.Call: "call"}
_REASONS = {
    "gap": "request {n} came, {expected} is next: numbers were left out",
    "stale": "the answer to request {n} is no longer kept: the last {window} are",
    "fenced": "another connection has taken the lease over",
    "out_of_turn": "an epoch that was never announced: Resume first",
    "busy": "{window} requests are without an answer already",
    "reset_needed": "{kind} before the first reset: reset first",
    "lease_lost": "the lease is closed",
    "forbidden": "this token does not allow {kind}",
    "unauthenticated": "the token is missing or wrong: give token=..., or --token-file at the command line",
}


def build_host(served: Served, num_envs: int, options: Mapping[str, Any], autoreset: str, arrays: str) -> Host:
    """Make the environments of a lease, and their host."""
    adapter = served.make(num_envs, options, autoreset)
    if adapter.kind == "policy":
        return PolicyHost(adapter, num_envs, arrays)
    try:
        return host.host_of(adapter, autoreset, num_envs, arrays)
    except BaseException:
        adapter.close()  # what was asked for does not fit it, and nobody else would
        raise


def serve(things: Any, at: str | Sequence[str], **options: Any) -> None:
    """Serve environments at one or more URLs until SIGTERM (which drains) or Ctrl-C. Takes what `Server` takes."""
    with Server(things, at=at, **options) as server:
        for url in server.urls:
            log.info("listening on %s", url)
        server.wait()


def dial(things: Any, to: str | Sequence[str], **options: Any) -> None:
    """Dial out to waiting trainers and serve them, until SIGTERM or Ctrl-C. Takes what `Server` takes."""
    with Server(things, dial=to, **options) as server:
        server.wait()


def _fault_of_opening(name: str, error: Exception) -> m.Fault:
    match error:
        case RequestFault():
            return m.Fault(name, 0, error.code, str(error), details=error.details)
        case OptionRefused():
            return m.Fault(name, 0, "forbidden", str(error))
        case SpaceError():
            about = {"path": error.path, "expected": error.expected, "got": error.got, "hint": error.hint}
            return m.Fault(name, 0, "bad_space", str(error), details=about)
        case SpecError():
            about = {"path": error.key, "expected": "what can be made", "got": error.problem, "hint": error.hint}
            return m.Fault(name, 0, "bad_space", str(error), details=about)
        case workers.WorkerFailed():
            return m.Fault(name, 0, "env_error", str(error), exception=error.kind, traceback=error.trace)
    trace = "".join(traceback.format_exception(error))
    return m.Fault(name, 0, "env_error", str(error), exception=type(error).__name__, traceback=trace)


def _dial_of(transport: Transport) -> Callable[[Address, ListenOptions], Listener]:
    dial = getattr(transport.load(), "dial", None)
    if dial is None:
        raise SpecError("dial", f"{transport.schemes[0]}:// cannot dial out", hint="dial a trainer by ws:// or wss://")
    return dial  # type: ignore[no-any-return]  # held by the tests of dialling out


def _refuse_in_dialect(dialect: str, guarded: bool, dials: bool) -> None:
    if guarded:
        raise SpecError(
            "token", f"{dialect} knows no tokens and no client certificates", hint="leave them out, and bind loopback"
        )
    if dials:
        raise SpecError("dial", f"{dialect} cannot dial out", hint="leave --dialect out")


def _post(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        pass  # the loop has closed: nobody waits for this any more


def _owner(line: Line, principal: Principal, tokens: bool) -> str:
    return principal.name if tokens else line.peer.certificate or line.peer.address


def _listed(things: Any) -> list[Any]:
    return list(things) if isinstance(things, (list, set)) else [things]


def _urls(at: str | Iterable[str]) -> list[str]:
    return [at] if isinstance(at, str) else list(at)


def _checked_kind(kind: str) -> str:
    if kind not in workers.KINDS:
        raise SpecError("workers", f"{kind!r} is none of {', '.join(workers.KINDS)}")
    return kind


def _run_at_once(coroutine: Any) -> None:
    """Run a coroutine that never waits: the memory transport's, which has no loop."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise ConnectError("a transport without a loop waited")
