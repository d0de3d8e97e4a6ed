"""An original-style gym-nats agent over nats-py, written from the fact sheet alone."""

from __future__ import annotations

import asyncio
import base64
from enum import Enum
from typing import Any

import nats
import nats.errors
import numpy as np

TIMEOUT = 0.5


class Channels(Enum):
    UPDATE = "rl.update"
    REWARD = "rl.reward"
    ACTION = "rl.action"
    RESET = "rl.reset"
    ACTIONS = "rl.actions"
    DONE = "r.done"


def numpy_encode(array: np.ndarray) -> bytes:
    assert array.dtype == np.float64
    return base64.b64encode(array.astype("<f8").tobytes())


def numpy_decode(payload: bytes) -> np.ndarray:
    return np.frombuffer(base64.b64decode(payload, validate=True), dtype="<f8")


class OldNatsEnv:
    """The agent's side: every request waits for its answer before the next one goes out."""

    def __init__(
        self, host: str = "0.0.0.0", port: int | str = "4222", user: str | None = None, password: str | None = None
    ) -> None:
        self.loop = asyncio.new_event_loop()
        login = "" if user is None else f"{user}:{password}@"
        try:
            self.nc = self.loop.run_until_complete(
                nats.connect(
                    f"nats://{login}{host}:{port}", connect_timeout=1, max_reconnect_attempts=1, allow_reconnect=False
                )
            )
        except BaseException:
            self.loop.close()
            raise
        try:
            self.observation_n = len(self._next_observation())
            self.action_n = len(numpy_decode(self.request(Channels.ACTIONS)))
        except BaseException:
            self.close()
            raise

    async def _request(self, channel: Channels, data: bytes) -> bytes:
        begin = self.loop.time()
        try:
            return (await self.nc.request(channel.value, data, timeout=TIMEOUT)).data
        except nats.errors.NoRespondersError:  # the old client, without headers, could only wait
            await asyncio.sleep(max(0.0, begin + TIMEOUT - self.loop.time()))
            raise nats.errors.TimeoutError from None

    def request(self, channel: Channels, data: bytes = b"") -> bytes:
        """One round trip; nats.errors.TimeoutError after half a second."""
        return self.loop.run_until_complete(self._request(channel, data))

    def _next_observation(self) -> np.ndarray:
        return numpy_decode(self.request(Channels.UPDATE))

    def reset(self) -> np.ndarray:
        self.request(Channels.RESET)
        return self._next_observation()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, dict[str, Any]]:
        self.request(Channels.ACTION, numpy_encode(np.array([action], dtype=np.float64)))
        reward = float(numpy_decode(self.request(Channels.REWARD)).sum())
        observation = self._next_observation()
        done = bool(numpy_decode(self.request(Channels.DONE)).sum() > 0)
        return observation, reward, done, {}

    def close(self) -> None:
        """Close the link (the original left it open)."""
        if not self.loop.is_closed():
            self.loop.run_until_complete(self.nc.close())
            self.loop.close()
