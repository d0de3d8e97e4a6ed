"""The far ends of channels, in processes of their own, for the tests of channels."""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import numpy as np

from longrein.lab.channel import Form, Outlet, Ring, Weights


def produce(pipe: Connection, name: str, form: Form, slots: int) -> None:
    """Fill every slot with its number in the order of sending, modulo 256 to fit any type, for ever."""
    ring = Ring(form, slots, name)
    outlet, number = Outlet(pipe, ring), 0
    try:
        while True:
            slot, arrays, _ = outlet.take()
            number += 1
            for array in arrays.values():
                array[...] = number % 256
            outlet.send(slot, number)
    except (EOFError, OSError):
        return


def read(pipe: Connection, name: str, form: Form, seconds: float) -> None:
    """Copy weights for a while; send how often they were torn, older than before, and how many versions were seen."""
    weights = Weights(form, name)
    into = {one.name: np.empty(one.shape, one.dtype) for one in form}
    torn, back, seen, last = 0, 0, set[int](), -1
    pipe.send("ready")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        version = weights.read(into)
        torn += any((array != version).any() for array in into.values())
        back += version < last
        last = version
        seen.add(version)
    pipe.send((torn, back, len(seen)))
