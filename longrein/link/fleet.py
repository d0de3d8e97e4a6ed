"""Several servers of the same things on consecutive ports, a process each. What they serve it only hands on."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from longrein.errors import Error, RoleDied, SpecError
from longrein.link.dialects import TABLE
from longrein.link.served import registered_ids
from longrein.link.server import Server
from longrein.link.transports import parse_url

START_SECONDS = 60.0
DEFAULT_AT = "ws://127.0.0.1:5000"


def open_server(
    things: Sequence[Any], *, at: Sequence[str], dial: Sequence[str], dialect: str | None, count: int, **options: Any
) -> Server | Fleet:
    """One server, or a fleet of `count`, with the defaults of the command line; to be entered and waited for.

    Without a URL it listens where its dialect usually does. Gymie without things serves all that Gymnasium knows here.
    """
    if dialect == "gymie" and not things:
        things = registered_ids()
    if not at and not dial:
        at = [TABLE[dialect].default_at if dialect in TABLE else DEFAULT_AT]
    if count == 1:
        return Server(list(things), at=at, dial=dial, dialect=dialect, **options)
    if dial:
        raise SpecError("count", "it counts ports up, and what dials out has none", hint="start several servers")
    return Fleet(list(things), at, count, dialect=dialect, **options)


def consecutive(url: str, count: int) -> list[str]:
    """The URLs of `count` servers: the port counts up; port 0 takes a free one for each. Raises SpecError."""
    address, _ = parse_url(url)
    if address.port is None:
        raise SpecError("count", f"{url} has no port to count up from", hint="as in --at http://localhost:18000")
    if address.port + count > 65536:
        raise SpecError("count", f"{count} ports from {address.port} on go beyond 65535")
    head, _, tail = url.partition(f":{address.port}")
    return [f"{head}:{address.port + index if address.port else 0}{tail}" for index in range(count)]


class Fleet:
    """`count` servers, each in a process of its own. Takes what `Server` takes; `things` must be picklable.

    Raises what a server raises when it starts; RoleDied from `wait` when one of them dies.
    """

    def __init__(self, things: Any, at: str | Sequence[str], count: int, **options: Any) -> None:
        urls = [at] if isinstance(at, str) else list(at)
        if len(urls) != 1:
            raise SpecError("count", f"{len(urls)} URLs with a count", hint="give one --at, whose port counts up")
        context = multiprocessing.get_context("spawn")
        self.urls: list[str] = []
        self._processes = []
        self._pipes: list[Connection] = []
        for url in consecutive(urls[0], count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, things, url, options), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            for process, pipe in zip(self._processes, self._pipes, strict=True):
                self.urls += self._started(process, pipe)
        except BaseException:
            self.close()
            raise

    def _started(self, process: Any, pipe: Connection) -> list[str]:
        try:
            told = pipe.recv() if pipe.poll(START_SECONDS) else TimeoutError()
        except EOFError:
            process.join(5.0)
            raise RoleDied("a server", process.exitcode) from None
        if isinstance(told, BaseException):
            raise told
        return list(told)

    def wait(self) -> None:
        """Until SIGTERM, which drains, or Ctrl-C. Raises RoleDied when a server dies."""
        previous = signal.signal(signal.SIGTERM, lambda *_: self.drain())
        try:
            wait([process.sentinel for process in self._processes])
            dead = next(process for process in self._processes if not process.is_alive())
            if dead.exitcode:
                raise RoleDied(f"the server at {self.urls[self._processes.index(dead)]}", dead.exitcode)
        except KeyboardInterrupt:
            pass
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.close()

    def drain(self) -> None:
        """Take no new leases, and end when the live ones have."""
        for process in self._processes:
            process.terminate()

    def close(self) -> None:
        """End all of them. May be called twice."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10.0)
            if process.is_alive():
                process.kill()
                process.join()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _serve(pipe: Connection, things: Any, url: str, options: dict[str, Any]) -> None:
    """One process: a server until SIGTERM, or until the parent's end of the pipe is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it closes the pipe
    try:
        server = Server(things, at=url, **options).start()
    except (Error, OSError) as error:  # told to the parent, who raises it
        pipe.send(error)
        return
    signal.signal(signal.SIGTERM, lambda *_: server.drain())
    pipe.send(server.urls)
    with suppress(OSError, EOFError):
        while not pipe.poll(0.5):
            if server.ended:
                return
    server.close()
