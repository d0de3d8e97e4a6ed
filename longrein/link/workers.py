"""Where environment code runs: in the caller, in a thread, or in a process of its own. Knows no lease and no wire.

A worker runs one lease's requests one at a time, in the order in which they come.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection as Pipe
from typing import Any, Final, Protocol

from longrein.link import codec
from longrein.link import messages as m
from longrein.link.host import Host

log = logging.getLogger("longrein.server")

MakeHost = Callable[[], Host]
Opened = dict[str, Any] | Exception
KINDS: Final = ("auto", "inline", "thread", "process")

INLINE_SECONDS: Final = 200e-6  # a request that takes less than this costs less than the hop to a thread and back
INLINE_AFTER: Final = 16  # requests measured in a thread before one runs inline
TOO_SLOW_SECONDS: Final = 5e-3  # one inline request this slow, and the lease stays in threads for a while
TOO_SLOW_PAUSE: Final = 1000  # requests

Post = Callable[..., None]  # runs a function on the server's loop: post(function, *args)


class Worker(Protocol):
    """Runs one lease's environments."""

    quick_seconds: float  # spent in `step_now` since somebody set it to 0

    def open(self, make: MakeHost, done: Callable[[Opened], None]) -> None:
        """Make the host; `done` gets what it says of itself, or what it raised."""

    def run(self, request: m.Request, data: codec.Buffer, offset: int, done: Callable[[bytes], None]) -> bytes | None:
        """Answer one request: at once with the reply's bytes, or later through `done`."""

    def step_now(self, lease: str, n: int, data: codec.Buffer, offset: int) -> bytes | None:
        """Answer a Step that is columns alone at once, or None where that would block: `run` it then."""

    def close(self) -> None:
        """End the environments. Never blocks."""


def _open(make: MakeHost) -> tuple[Host | None, Opened]:
    # The border to foreign code: making an environment may raise anything, and that is an answer.
    try:
        host = make()
        return host, host.opened()
    except Exception as error:
        return None, error


def _close(host: Host | None) -> None:
    if host is None:
        return
    try:
        host.close()
    except Exception:  # the same border: the lease is over, and nobody is left to tell but the log
        log.exception("an environment raised while it was closed")


class InlineWorker:
    """In the caller's thread: the memory transport, and whoever asks for it."""

    def __init__(self) -> None:
        self.quick_seconds = 0.0
        self._host: Host | None = None

    def open(self, make: MakeHost, done: Callable[[Opened], None]) -> None:
        self._host, opened = _open(make)
        done(opened)

    def run(self, request: m.Request, data: codec.Buffer, offset: int, done: Callable[[bytes], None]) -> bytes | None:
        assert self._host is not None
        return self._host.handle(request, data, offset)

    def step_now(self, lease: str, n: int, data: codec.Buffer, offset: int) -> bytes | None:
        assert self._host is not None
        return self._host.step_bare(lease, n, data, offset)

    def close(self) -> None:
        host, self._host = self._host, None
        _close(host)


class ThreadWorker:
    """In a thread: of a shared pool, or one of its own where the environment wants to stay in one thread.

    With `inline`, requests whose measured time is small run in the loop's own thread.
    """

    def __init__(self, post: Post, pool: ThreadPoolExecutor | None, inline: bool) -> None:
        self.quick_seconds = 0.0
        self._post = post
        self._own = pool is None
        self._pool = pool or ThreadPoolExecutor(1, thread_name_prefix="longrein-lease")
        self._host: Host | None = None
        self._inline = inline
        self._seconds: dict[type, float] = {m.Step: 1.0}  # a moving average by kind of request
        self._measured = 0
        self._closed = False

    def open(self, make: MakeHost, done: Callable[[Opened], None]) -> None:
        def work() -> None:
            host, opened = _open(make)
            if self._closed:
                _close(host)
                return
            self._host = host
            self._post(done, opened)

        self._pool.submit(work)

    def run(self, request: m.Request, data: codec.Buffer, offset: int, done: Callable[[bytes], None]) -> bytes | None:
        host, kind = self._host, type(request)
        assert host is not None
        if self._cheap(kind):
            started = time.perf_counter()
            reply = host.handle(request, data, offset)
            self._note(kind, time.perf_counter() - started)
            return reply
        kept = bytes(data)  # the transport's buffer lives no longer than this call

        def work() -> None:
            started = time.perf_counter()
            reply = host.handle(request, kept, offset)
            elapsed = time.perf_counter() - started
            known = self._seconds.get(kind, 1.0)
            self._seconds[kind] = elapsed if known == 1.0 else 0.9 * known + 0.1 * elapsed
            self._measured += 1
            self._post(done, reply)

        self._pool.submit(work)
        return None

    def _cheap(self, kind: type[m.Request]) -> bool:
        return self._inline and self._measured >= INLINE_AFTER and self._seconds.get(kind, 1.0) < INLINE_SECONDS

    def _note(self, kind: type[m.Request], elapsed: float) -> None:
        self._seconds[kind] += 0.1 * (elapsed - self._seconds[kind])
        if elapsed > TOO_SLOW_SECONDS:
            self._measured = INLINE_AFTER - TOO_SLOW_PAUSE

    def step_now(self, lease: str, n: int, data: codec.Buffer, offset: int) -> bytes | None:
        host = self._host
        if host is None or not self._inline or self._measured < INLINE_AFTER or self._seconds[m.Step] > INLINE_SECONDS:
            return None
        started = time.perf_counter()
        reply = host.step_bare(lease, n, data, offset)
        elapsed = time.perf_counter() - started
        self.quick_seconds += elapsed
        if elapsed > INLINE_SECONDS:
            self._note(m.Step, elapsed)
        return reply

    def close(self) -> None:
        self._closed = True
        host, self._host = self._host, None
        self._pool.submit(_close, host)
        if self._own:
            self._pool.shutdown(wait=False)


class ProcessWorker:
    """In a process of its own: an environment that blocks, crashes or leaks harms nobody else, and can be killed.

    Requests and replies cross a pipe as the bytes that they are; only the server's own recipe of the environment is
    given to the new process, by multiprocessing.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, died: Callable[[int | None], None]) -> None:
        self.quick_seconds = 0.0
        self._loop = loop
        self._died = died
        context = multiprocessing.get_context("spawn")
        self._pipe, self._far = context.Pipe()
        self._context = context
        self._process: multiprocessing.process.BaseProcess | None = None
        self._done: Callable[[Any], None] | None = None
        self._closed = False

    def open(self, make: MakeHost, done: Callable[[Opened], None]) -> None:
        self._done = done
        try:
            self._process = self._context.Process(
                target=_serve_pipe, args=(self._far, make), daemon=True, name="longrein-lease"
            )
            self._process.start()
        except (OSError, AttributeError, TypeError, ValueError) as error:  # what cannot be pickled raises one of these
            self._far.close()
            done(error)
            return
        self._far.close()
        self._loop.add_reader(self._pipe.fileno(), self._readable)
        # uvloop makes it non-blocking, and then a reply longer than the pipe's buffer is taken for the pipe's end.
        os.set_blocking(self._pipe.fileno(), True)

    def _readable(self) -> None:
        try:
            data = self._pipe.recv_bytes()
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())
            if not self._closed:
                assert self._process is not None
                self._process.join(1.0)
                self._died(self._process.exitcode)
            return
        done, self._done = self._done, None
        if done is not None:
            done(_opened_from(data) if data[:1] in (b"O", b"E") else data)

    def run(self, request: m.Request, data: codec.Buffer, offset: int, done: Callable[[bytes], None]) -> bytes | None:
        self._done = done
        try:
            self._pipe.send_bytes(data)
        except OSError:
            self._loop.call_soon(self._readable)  # it reads the end of the pipe, and says that the process died
        return None

    def step_now(self, lease: str, n: int, data: codec.Buffer, offset: int) -> bytes | None:
        return None

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._process is None or self._process.pid is None:
            return
        self._loop.remove_reader(self._pipe.fileno())
        self._pipe.close()  # the process ends when its pipe does
        self._loop.run_in_executor(None, self._end)

    def _end(self) -> None:
        assert self._process is not None
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _opened_from(data: bytes) -> Opened:
    fields = codec.decode_plain(data[1:])
    return fields if data[:1] == b"O" else WorkerFailed(*fields)


class WorkerFailed(Exception):
    """Making the environment raised in the worker's process: the type's name, the message and the traceback."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.trace = trace


def _serve_pipe(pipe: Pipe, make: MakeHost) -> None:
    """The process: requests in, replies out, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's; it closes the pipe
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    host, opened = _open(make)
    if isinstance(opened, Exception):
        trace = "".join(traceback.format_exception(opened))
        pipe.send_bytes(b"E" + codec.encode_plain([type(opened).__name__, str(opened), trace]))
        return
    assert host is not None
    pipe.send_bytes(b"O" + codec.encode_plain(opened))
    try:
        while True:
            data = pipe.recv_bytes()
            request, offset = codec.decode_request(data)
            pipe.send_bytes(host.handle(request, data, offset))
    except (EOFError, OSError):
        _close(host)
        os._exit(0)  # threads that the environment left behind do not keep the process
