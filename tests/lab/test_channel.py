"""Slots and weights in shared memory arrive whole or not at all, whoever is killed, and nothing stays behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lab import channel_ends

from longrein.errors import RunError
from longrein.lab.channel import PREFIX, Field, Inlet, Outlet, Ring, Segment, Weights, form_of, size_of

SPAWN = multiprocessing.get_context("spawn")
FORM = (Field("frames", (8, 84, 84), "|u1"), Field("reward", (8, 3), "<f4"), Field("done", (8, 3), "|b1"))


def mine() -> list[str]:
    """The shared memory that this process has made."""
    return [path.name for path in Path("/dev/shm").glob(f"{PREFIX}-{os.getpid()}-*")]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    assert mine() == []


@contextmanager
def far(target: Any, *arguments: Any) -> Iterator[tuple[Connection, Any]]:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield ours, process
    finally:
        ours.close()
        process.join(20)
        assert process.exitcode is not None, "it should have ended when its pipe did"


def test_a_form_says_what_arrays_need() -> None:
    arrays = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.bool_)}
    assert form_of(arrays) == (Field("a", (2, 3), "<f4"), Field("b", (5,), "|b1"))
    assert size_of(form_of(arrays)) == 64 + 64  # 24 and 5 bytes, a cache line each


def test_slots_go_round() -> None:
    ours, theirs = SPAWN.Pipe()
    with closing(Ring((Field("x", (2,), "<f8"),), 2)) as ring:
        inlet, outlet = Inlet(ours, ring, note="go"), Outlet(theirs, ring)
        for number in (1, 2):
            slot, arrays, said = outlet.take()
            assert said == "go"
            arrays["x"][:] = number
            outlet.send(slot, f"it is {number}")
        assert not theirs.poll()  # the producer holds no slot: it would wait
        slot, arrays, said = inlet.receive()
        assert (arrays["x"].tolist(), said) == ([1.0, 1.0], "it is 1")
        inlet.free(slot, "again")
        assert outlet.take()[2] == "again"
        del arrays


def test_a_producer_stops_when_its_slots_are_full() -> None:
    with closing(Ring(FORM, 3)) as ring, far(channel_ends.produce, ring.name, FORM, 3) as (pipe, _):
        inlet = Inlet(pipe, ring)
        assert inlet.receive()[2] == 1
        time.sleep(0.5)
        held = [inlet.receive() for _ in range(2)]
        assert [note for _, _, note in held] == [2, 3]
        assert not pipe.poll(0.5), "three slots, and none was given back"
        for number, (_, arrays, _) in enumerate(held, 2):
            assert all((array == np.array(number).astype(array.dtype)).all() for array in arrays.values())
        inlet.free(held[0][0])
        assert inlet.receive()[2] == 4
        del held, arrays


@pytest.mark.parametrize("until", [1, 2, 7, 50, 255, 300])
def test_a_killed_producer_leaves_whole_slots_only(until: int) -> None:
    form = (Field("frames", (2_000_000,), "|u1"),)  # it takes long enough to be caught in the middle
    with closing(Ring(form, 4)) as ring, far(channel_ends.produce, ring.name, form, 4) as (pipe, process):
        inlet, last = Inlet(pipe, ring), 0
        try:
            while True:
                slot, arrays, number = inlet.receive()
                assert number == last + 1, "each once, and in order"
                assert (arrays["frames"] == number % 256).all(), "a slot that was half written"
                last = number
                inlet.free(slot)
                if last == until:
                    while arrays["frames"][0] == number % 256:  # until it has begun to fill the slot anew
                        assert process.is_alive()
                    os.kill(process.pid, signal.SIGKILL)
                del arrays
        except (EOFError, OSError):
            pass
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
        assert last >= until


def test_weights_are_never_torn() -> None:
    form = (Field("a", (300, 300), "<f4"), Field("b", (), "<i8"), Field("c", (0,), "<f4"))
    with closing(Weights(form)) as weights, far(channel_ends.read, weights.name, form, 1.5) as (pipe, _):
        assert pipe.recv() == "ready"
        version = 0
        while not pipe.poll():
            version += 1
            weights.publish({one.name: np.full(one.shape, version, one.dtype) for one in form}, version)
        torn, back, seen = pipe.recv()
        assert (torn, back) == (0, 0)
        assert 1 < seen <= version
        assert weights.version == version


def test_a_reader_does_not_wait_for_ever_for_a_writer_that_died() -> None:
    with closing(Weights((Field("a", (2,), "<f4"),))) as weights:
        weights._sequence += 1  # as a writer leaves it that is killed within `publish`
        with pytest.raises(RunError, match="the learner died"):
            weights.read({"a": np.zeros(2, np.float32)}, 0.1)


def test_no_room_and_no_such_segment_are_said() -> None:
    with pytest.raises(RunError, match="shared memory"):
        Segment(1 << 50)
    with pytest.raises(RunError, match="shared memory"):
        Segment(10, f"{PREFIX}-0-none")


def test_a_killed_owner_s_memory_is_removed() -> None:
    code = (
        "import time; from longrein.lab.channel import Field, Ring;"
        "ring = Ring((Field('x', (1000,), '<f4'),), 4); print(ring.name, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    path = Path("/dev/shm") / process.stdout.readline().strip()
    assert path.exists()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while path.exists():
        assert time.monotonic() < deadline, f"{path} stays behind"
        time.sleep(0.05)
    process.stdout.close()
