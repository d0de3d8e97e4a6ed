"""A process with a role of its own beside the actors: its life there, and its place here, through all of its lives.

Knows no role. Whoever fails three times without having done anything in between is not replaced: its error, or
RoleDied, is raised. Who is killed from outside is given more lives.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import cloudpickle
import psutil
import torch

from longrein.errors import Error, RoleDied, RunError, SpecError
from longrein.learn import algorithms

READY_SECONDS = 120.0
"""That a process may take to be ready."""
FAILURES = 3
"""In a row, without anything done in between, that end a session."""
KILLS = 20
"""The same, of a process that was killed (SIGKILL, SIGTERM), for which it can do nothing."""

ROLE_BYTES = 110 * 2**20
"""That a process which steps environments takes for itself, beside what it has in common with the others."""

log = logging.getLogger(__name__)


def packed(role: Any) -> bytes:
    """What a process is to do, with functions and classes that only this one knows. Raises SpecError if it cannot be.

    By value where multiprocessing would want to import them: from a notebook, or as a lambda.
    """
    try:
        return cloudpickle.dumps(role)  # type: ignore[no-any-return]  # it is not annotated
    except (TypeError, pickle.PicklingError) as error:
        raise SpecError("env", f"cannot be sent to another process: {error}",
                        hint="let its maker open what it needs, or topology: serial") from error  # fmt: skip


def check_memory(count: int, role: str) -> None:
    """Raise RunError where so many processes of a role do not fit into memory. role: as it is told, "actor"."""
    free, needed = psutil.virtual_memory().available, ROLE_BYTES * count
    if free < needed:
        raise RunError(f"{count} {role}s need {needed >> 20:,} MiB at least, and {free >> 20:,} are free",
                       hint=f"fewer {role}s, with more environments each")  # fmt: skip


def context_for(algorithm: str) -> Any:
    """How processes are started: forked off one that has imported torch and does nothing else, where that can be.

    To import it takes several seconds of a processor: two actors on two busy cores were ready after 7 to 14 seconds,
    and are after 3 to 4 this way; one that is replaced later, within a fraction of a second.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # No effect on a server that runs already.
    context.set_forkserver_preload(["longrein.lab.actor_process", algorithms.module_name(algorithm)])
    return context


class _Terminated(BaseException):
    """SIGTERM, on its way to what must be closed: environments may have processes of their own."""


def enact(pipe: Connection, work: Callable[[], None]) -> None:
    """A role's life, in its process: until it is done, the other end of the pipe closes, or its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the learner, which closes the pipe
    signal.signal(signal.SIGTERM, _terminate)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the learner is done; or an environment of ours is gone, and the learner sees that we are
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    except Error as error:
        _tell(pipe, error)
    except Exception as error:  # the border of a process: whatever ended it is told, with its traceback
        _tell(pipe, RunError("".join(traceback.format_exception(error)).rstrip()))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # all is closed, and to take torch down would need more than a second


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _tell(pipe: Connection, error: Error) -> None:
    with suppress(OSError):  # nobody is there to be told
        pipe.send(error)


def _end_with_parent() -> None:
    """A learner that is killed closes its pipes, but our work may keep us from looking there."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class Post:
    """One process's place: `start` it, `hear` it now and then, `end` it.

    target: what it runs, with its end of a pipe and `args`.
    """

    def __init__(self, name: str, context: Any, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.name = name
        self.replaced = 0
        self.replaceable = True  # whether it gets another life when it failed; when it was killed it does in any case
        self.pipe: Connection | None = None
        self._context = context
        self._target = target
        self._args = args
        self._process: Any = None
        self._since = 0.0  # when this life began
        self._ready = False  # whether it said anything in this life
        self._deaths = 0  # in a row
        self._error: Error | None = None

    def start(self) -> None:
        """Begin a life."""
        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(target=self._target, args=(theirs, *self._args), name=self.name)
        self._process.start()
        theirs.close()
        self.pipe, self._since, self._ready, self._error = ours, time.monotonic(), False, None

    def send(self, message: Any) -> None:
        """Tell it something small; where it has died meanwhile, `hear` finds that."""
        assert self.pipe is not None, "it was never started"
        with suppress(OSError):
            self.pipe.send(message)

    def hear(self) -> Iterator[Any]:
        """All that it has said; None last where it died, and has been replaced by one that knows nothing yet.

        Raises what ended it, or RoleDied, when it has died too often; RunError where it is not ready in time.
        """
        assert self.pipe is not None, "it was never started"
        try:
            while self.pipe.poll():
                said = self.pipe.recv()
                self._ready = True
                if isinstance(said, Error):
                    self._error = said
                else:
                    yield said
        except (EOFError, OSError):
            self._lost()
            yield None
        if not self._ready and time.monotonic() - self._since > READY_SECONDS:
            self._process.kill()
            raise RunError(f"{self.name} was not ready within {READY_SECONDS:g} s",
                           hint="do its environments open at all? longrein run --dry-run")  # fmt: skip

    def lives(self) -> None:
        """It has done something: what was before does not count."""
        self._deaths = 0

    def dismiss(self) -> None:
        """Close the pipe, at which it ends by itself."""
        if self.pipe is not None:
            self.pipe.close()

    def end(self, seconds: float = 5.0) -> None:
        """Dismiss it, and wait so long before it is killed. May be called twice."""
        if self.pipe is None:
            return
        self.dismiss()
        self._process.join(seconds)
        for end in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                end()
                self._process.join(2.0)

    def _lost(self) -> None:
        assert self.pipe is not None, "it was never started"
        self.pipe.close()
        self._process.join(5.0)
        if self._process.is_alive():  # it closed its pipe, and lives on
            self._process.kill()
            self._process.join()
        self._deaths += 1
        code = self._process.exitcode
        killed = self._error is None and code in (-signal.SIGKILL, -signal.SIGTERM)
        hint = "its log may say more; a script that starts processes needs if __name__ == '__main__'"
        error = self._error or RoleDied(self.name, code, hint="it was killed from outside" if killed else hint)
        if self._deaths >= (KILLS if killed else FAILURES if self.replaceable else 1):
            raise error
        log.warning("%s ended and is replaced: %s", self.name, error)
        self.replaced += 1
        self.start()
