"""Training in one process, for the tests that an algorithm learns: seeds, budget and what came of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from longrein.lab.actor import Actor, make_envs
from longrein.learn import algorithms
from longrein.learn.algorithms import Algorithm
from longrein.learn.rollout import Rollout


@dataclass(frozen=True)
class Trained:
    """What came of one training."""

    algorithm: Algorithm
    best: float  # the highest mean return of `window` episodes
    last: float  # that of the last ones
    reached: int | None  # env steps at which the target was met
    env_steps: int
    episodes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.env_steps / self.seconds
        return (
            f"best {self.best:.1f}, last {self.last:.1f}, reached at {self.reached}, "
            f"{self.env_steps} env steps, {rate:,.0f}/s"
        )


def train(
    name: str,
    settings: dict[str, Any],
    env: str | Callable[[], gymnasium.Env[Any, Any]],
    *,
    options: Mapping[str, Any] | None = None,
    env_steps: int,
    seed: int = 0,
    num_envs: int = 4,
    target: float | None = None,
    window: int = 100,
    to_the_end: bool = False,
) -> Trained:
    """Train until `target` (mean return of the last `window` training episodes) or the budget.

    settings: fields of the algorithm's Config, as plain values. options: of the environment's maker.
    to_the_end: go on after the target was met.
    """
    torch.set_num_threads(1)
    if isinstance(env, str):
        envs = make_envs(env, num_envs, options or {})
    else:
        envs = SyncVectorEnv([env] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    config_class, build = algorithms.load(name)
    config = algorithms.config_from(config_class, settings)
    algorithm = build(config, envs.single_observation_space, envs.single_action_space, seed)
    actor = Actor(envs, algorithm.policy, seed=1_000 * seed, generator=torch.Generator().manual_seed(seed + 1))
    rollout = Rollout(algorithm.rollout_steps)
    returns: deque[float] = deque(maxlen=window)
    best, reached, episodes, started = -np.inf, None, 0, time.perf_counter()
    while actor.env_steps < env_steps:
        for transition in actor.collect(algorithm.rollout_steps):
            rollout.add(transition)
        algorithm.update(rollout.take())
        for episode in actor.finished():
            episodes += 1
            returns.append(episode.return_)
            if len(returns) == window:
                best = max(best, float(np.mean(returns)))
        if target is not None and reached is None and best >= target:
            reached = actor.env_steps
            if not to_the_end:
                break
    envs.close()
    last = float(np.mean(returns)) if returns else float("nan")
    return Trained(algorithm, best, last, reached, actor.env_steps, episodes, time.perf_counter() - started)
