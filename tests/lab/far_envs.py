"""Environments that actors' processes make, so that they stand in a module which those can import."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from learn import probes

Vector = VectorEnv[Any, Any, Any]


class Walk(gymnasium.Env[Any, Any]):
    """A random walk that ends beyond 1; steps and ends are drawn."""

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space: gymnasium.Space[Any] = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.at.copy(), {}

    def step(self, action: Any) -> probes.Step:
        self.at[0] += 0.1 * (float(action) - 0.4) + self.np_random.normal(0.0, 0.1)
        over = bool(abs(self.at[0]) > 1.0)
        self.at[0] = np.clip(self.at[0], -2.0, 2.0)
        return self.at.copy(), float(self.at[0]), over, False, {}


class Count(gymnasium.Env[Any, Any]):
    """Shows how many steps there were since the reset, out of 100."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space: gymnasium.Space[Any] = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> probes.Step:
        self.steps += 1
        time.sleep(0.0005)
        return np.full(1, self.steps / 100, np.float32), 1.0, self.steps == 100, False, {}


def walks(count: int) -> Vector:
    return SyncVectorEnv([lambda: TimeLimit(Walk(), 20)] * count, autoreset_mode=AutoresetMode.SAME_STEP)


def counts(count: int) -> Vector:
    return SyncVectorEnv([Count] * count, autoreset_mode=AutoresetMode.SAME_STEP)


def noted(folder: str, count: int) -> Vector:
    """`counts`, and a file named by the process that has them."""
    Path(folder, str(os.getpid())).touch()
    return counts(count)


def killed_once(folder: str, count: int) -> Vector:
    """`walks`; the first process beside the session's that opens them is killed as it does."""
    file = Path(folder, "killed")
    if parent_process() is not None and not file.exists():
        file.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return walks(count)


def broken(count: int) -> Vector:
    raise OSError("there is no such game here")


def asleep(count: int) -> Vector:
    time.sleep(60)
    return counts(count)


class Fragile(Count):
    """Raises after 150 steps."""

    total = 0

    def step(self, action: Any) -> probes.Step:
        self.total += 1
        if self.total > 150:
            raise ValueError("it broke")
        return super().step(action)


def fragile(count: int) -> Vector:
    return SyncVectorEnv([Fragile] * count, autoreset_mode=AutoresetMode.SAME_STEP)


class Doomed(Count):
    """Raises at once."""

    def step(self, action: Any) -> probes.Step:
        raise ValueError("it never works")


def doomed(count: int) -> Vector:
    return SyncVectorEnv([Doomed] * count, autoreset_mode=AutoresetMode.SAME_STEP)


class Wide(Count):
    """Shows it in so many numbers that a rollout is no small message."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (3000,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(3000, np.float32), {}

    def step(self, action: Any) -> probes.Step:
        seen, *rest = super().step(action)
        return np.repeat(seen, 3000), *rest


def wide(folder: str, count: int) -> Vector:
    """Wide ones, and a file named by the process that has them."""
    Path(folder, str(os.getpid())).touch()
    return SyncVectorEnv([Wide] * count, autoreset_mode=AutoresetMode.SAME_STEP)


class SlowToEvaluate(Walk):
    """Its reset takes a while on a seed of evaluation."""

    def __init__(self, seconds: float, folder: str) -> None:
        self.seconds = seconds
        self.folder = folder

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None and seed >= 2**30:
            if self.folder:
                Path(self.folder, str(os.getpid())).touch()
            time.sleep(self.seconds)
        return super().reset(seed=seed, options=options)

    def close(self) -> None:
        if self.folder:
            Path(self.folder, f"closed {os.getpid()}").touch()


def slow_to_evaluate(seconds: float, *rest: Any) -> Vector:
    *folder, count = rest
    make = lambda: TimeLimit(SlowToEvaluate(seconds, *(folder or [""])), 20)  # noqa: E731  # a def would be longer
    return SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)


class NeverToEvaluate(Walk):
    """Raises on a seed of evaluation."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None and seed >= 2**30:
            raise ValueError("nobody evaluates here")
        return super().reset(seed=seed, options=options)


def never_to_evaluate(count: int) -> Vector:
    return SyncVectorEnv([NeverToEvaluate] * count, autoreset_mode=AutoresetMode.SAME_STEP)
