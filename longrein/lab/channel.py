"""Experience one way and weights the other, between processes: arrays in shared memory. Knows no algorithm and no role.

1. A segment is made and removed by one process, the owner; another end only maps it. Should the owner be killed,
   Python's resource tracker removes it, once all processes that share the tracker have ended.
2. A slot belongs to one end at a time. It changes hands by a small message over a pipe, sent when the slot is whole:
   one that a killed producer has half written was never announced, and nobody reads it.
3. The producer waits when it holds no slot, the consumer when none was announced. So the channel is bounded, and
   neither end spins. System calls lie between writing and reading, which order memory on every processor.
4. Weights have one writer and many readers, and no lock: their sequence number is odd while they are written, and a
   reader whose copy lies across a write copies again.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longrein.errors import RunError

Arrays = dict[str, NDArray[Any]]
PREFIX = "longrein"
_LINE = 64  # bytes of a cache line: where every array begins


@dataclass(frozen=True)
class Field:
    """One array of a slot."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As NumPy says it: '<f4'."""

    @property
    def nbytes(self) -> int:
        """Its bytes, without padding."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Form = tuple[Field, ...]


def form_of(arrays: Mapping[str, NDArray[Any]]) -> Form:
    """What arrays like these need."""
    return tuple(Field(name, array.shape, array.dtype.str) for name, array in arrays.items())


class Segment:
    """Shared memory of so many bytes, all 0 at first; without a name it is made here, and removed at `close`.

    Raises RunError when the machine has no room for it, or there is none of that name.
    """

    def __init__(self, nbytes: int, name: str | None = None) -> None:
        self._owner = name is None
        try:
            if name is None:
                name = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(4)}"
                self._memory = SharedMemory(name, create=True, size=max(nbytes, 1))
                if hasattr(os, "posix_fallocate"):  # else a full /dev/shm would kill whoever writes there, with SIGBUS
                    os.posix_fallocate(self._memory._fd, 0, max(nbytes, 1))  # type: ignore[attr-defined]  # no other way
            else:
                self._memory = SharedMemory(name)
        except OSError as error:
            if self._owner and hasattr(self, "_memory"):
                self.close()
            hint = "fewer actors or environments, a smaller `ahead`, or a larger /dev/shm"
            raise RunError(f"no {nbytes:,} bytes of shared memory: {error}", hint=hint) from error
        self.name = name

    def arrays(self, form: Form, start: int = 0) -> Arrays:
        """Views of it from byte `start` on; all must be gone before `close`."""
        found = {}
        for one in form:
            found[one.name] = np.ndarray(one.shape, one.dtype, self._memory.buf, start)
            start += _padded(one.nbytes)
        return found

    def close(self) -> None:
        """Let go of it; the owner removes it."""
        with suppress(BufferError):  # somebody still looks at a view: it stays mapped as long as that lives
            self._memory.close()
        if self._owner:
            with suppress(FileNotFoundError):
                self._memory.unlink()


def size_of(form: Form) -> int:
    """Bytes that arrays of a form take, each on a cache line of its own."""
    return sum(_padded(one.nbytes) for one in form)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _LINE) * _LINE


class Ring:
    """So many slots, each with arrays of the same form. Without a name it is made here."""

    def __init__(self, form: Form, slots: int, name: str | None = None) -> None:
        self.form = form
        stride = size_of(form)
        self._segment = Segment(stride * slots, name)
        self.name = self._segment.name
        self.slots = [self._segment.arrays(form, stride * index) for index in range(slots)]

    def close(self) -> None:
        """Let go of it; whoever made it removes it."""
        self.slots = []
        self._segment.close()


class Outlet:
    """The producer's end of a ring: `take` a free slot, fill its arrays, `send` it."""

    def __init__(self, pipe: Connection, ring: Ring) -> None:
        self._pipe = pipe
        self._ring = ring
        self._held: deque[tuple[int, Any]] = deque()

    def take(self) -> tuple[int, Arrays, Any]:
        """A free slot: its number, its arrays, and what the consumer said with it. Waits for one.

        Raises EOFError or OSError when the consumer is gone.
        """
        while not self._held or self._pipe.poll():
            self._held.append(self._pipe.recv())
        slot, note = self._held.popleft()
        return slot, self._ring.slots[slot], note

    def send(self, slot: int, note: Any = None) -> None:
        """Hand a slot over, whole. note: something small, to go with it. Raises OSError when the consumer is gone."""
        self._pipe.send((slot, note))


class Inlet:
    """The consumer's end of a ring: `receive` a slot, use its arrays, `free` it.

    slots: those that the producer gets at once; all where it is left out.
    """

    def __init__(self, pipe: Connection, ring: Ring, slots: Sequence[int] | None = None, note: Any = None) -> None:
        self.pipe = pipe  # for multiprocessing.connection.wait
        self.ring = ring
        for slot in range(len(ring.slots)) if slots is None else slots:
            self.free(slot, note)

    def receive(self) -> tuple[int, Arrays, Any]:
        """The next slot that was sent: its number, its arrays, and what the producer said with it. Waits for one.

        Raises EOFError or OSError when the producer is gone, and all that it had sent was received.
        """
        slot, note = self.pipe.recv()
        return slot, self.ring.slots[slot], note

    def free(self, slot: int, note: Any = None) -> None:
        """Give a slot back. A producer that is gone does not mind: `receive` says that it is."""
        with suppress(OSError):
            self.pipe.send((slot, note))


class Weights:
    """Arrays that one process publishes, with a version, and others copy. Without a name it is made here."""

    def __init__(self, form: Form, name: str | None = None) -> None:
        self.form = form
        self._segment = Segment(_LINE + size_of(form), name)
        self.name = self._segment.name
        head = self._segment.arrays((Field("sequence", (), "<i8"),)) | self._segment.arrays(
            (Field("version", (), "<i8"),), 8
        )
        self._sequence, self._version = head["sequence"], head["version"]
        self._arrays = self._segment.arrays(form, _LINE)

    @property
    def version(self) -> int:
        """Of the arrays that were published last; 0 before."""
        return int(self._version)

    def publish(self, arrays: Mapping[str, NDArray[Any]], version: int) -> None:
        """Let readers have these from now on. Only the owner may."""
        self._sequence += 1
        for name, array in arrays.items():
            self._arrays[name][...] = array
        self._version[...] = version
        self._sequence += 1

    def read(self, into: Mapping[str, NDArray[Any]], seconds: float = 30.0) -> int:
        """Copy the newest arrays, none of them torn; their version.

        Raises RunError when the writer does not come to an end within so many seconds: it died while it wrote.
        """
        deadline = time.monotonic() + seconds
        while True:
            before = int(self._sequence)
            if before % 2 == 0:
                for name, array in into.items():
                    array[...] = self._arrays[name]
                version = int(self._version)
                if int(self._sequence) == before:
                    return version
            elif time.monotonic() > deadline:
                raise RunError(f"weights were half written for {seconds:g} s", hint="the learner died")
            time.sleep(0.0)

    def close(self) -> None:
        """Let go of it; whoever made it removes it."""
        self._arrays = {}
        del self._sequence, self._version
        self._segment.close()
