"""A toy system that answers the six gym-nats subjects, written from the fact sheet alone."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import nats
import numpy as np
from nats.aio.client import Client
from nats.aio.msg import Msg

SWITCHES, ACTIONS, MAX_STEPS = 6, 3, 10


def encode(values: list[float]) -> bytes:
    """Base64 of the raw little-endian float64 bytes."""
    return base64.b64encode(np.array(values, dtype="<f8").tobytes())


def decode(payload: bytes) -> np.ndarray:
    return np.frombuffer(base64.b64decode(payload, validate=True), dtype="<f8")


class OldSystem:
    """A panel of six switches; action a flips the switches a, a + 1 and a + 3, counted round the panel.

    The reward vector is [switches now on, -0.5]; the done vector is [all on, ten steps taken].
    """

    def __init__(self, delay: float = 0.0, subject_prefix: str = "") -> None:
        self.delay = delay
        self.subject_prefix = subject_prefix  # put before each subject as it stands, dot included
        self.received: list[str] = []  # the full subjects, in order of arrival
        self.actions: list[float] = []
        self.nc: Client | None = None
        self.clear()

    def clear(self) -> None:
        self.switches = [0.0] * SWITCHES
        self.steps = 0

    async def start(self, url: str) -> None:
        """Connect and subscribe to the six subjects, each with a callback of its own."""
        self.nc = await nats.connect(url)
        callbacks: dict[str, Callable[[Msg], Awaitable[None]]] = {
            "rl.update": self.on_update,
            "rl.reward": self.on_reward,
            "rl.action": self.on_action,
            "rl.reset": self.on_reset,
            "rl.actions": self.on_actions,
            "r.done": self.on_done,
        }
        for subject, callback in callbacks.items():
            await self.nc.subscribe(self.subject_prefix + subject, cb=callback)
        await self.nc.flush()

    async def stop(self) -> None:
        if self.nc is not None:
            await self.nc.close()

    async def on_update(self, msg: Msg) -> None:
        self.received.append(msg.subject)
        await msg.respond(encode(self.switches))

    async def on_reward(self, msg: Msg) -> None:
        self.received.append(msg.subject)
        await msg.respond(encode([sum(self.switches), -0.5]))

    async def on_action(self, msg: Msg) -> None:
        self.received.append(msg.subject)
        await asyncio.sleep(self.delay)
        action = decode(msg.data)[0]
        self.actions.append(float(action))
        for offset in (0, 1, 3):
            place = (int(action) + offset) % SWITCHES
            self.switches[place] = 1.0 - self.switches[place]
        self.steps += 1
        await msg.respond(b"")

    async def on_reset(self, msg: Msg) -> None:
        self.received.append(msg.subject)
        self.clear()
        await msg.respond(b"")

    async def on_actions(self, msg: Msg) -> None:
        self.received.append(msg.subject)
        await msg.respond(encode([1.0, 3.0, -1000.0]))  # only the length counts

    async def on_done(self, msg: Msg) -> None:
        self.received.append(msg.subject)
        await msg.respond(encode([float(all(self.switches)), float(self.steps >= MAX_STEPS)]))


@contextmanager
def start_old_system(url: str, delay: float = 0.0, subject_prefix: str = "") -> Iterator[OldSystem]:
    """Run the system in a thread with a loop of its own."""
    system, loop = OldSystem(delay, subject_prefix), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(system.start(url), loop).result(10)
        yield system
    finally:
        try:
            asyncio.run_coroutine_threadsafe(system.stop(), loop).result(10)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            tasks = asyncio.all_tasks(loop)
            for task in tasks:
                task.cancel()
            if tasks:
                loop.run_until_complete(asyncio.wait(tasks))
            loop.close()
