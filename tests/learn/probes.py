"""Probe environments, each too simple to fail for more than one reason, and a loop that trains on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array

from longrein.learn.algorithms import Algorithm
from longrein.learn.batch import Batch, Transition
from longrein.learn.replay import Memory
from longrein.learn.rollout import Rollout
from longrein.learn.torsos import Net

Step = tuple[np.ndarray[Any, Any], float, bool, bool, dict[str, Any]]


class Probe(gymnasium.Env[Any, Any]):
    """Observation [1], two actions; subclasses say what happens."""

    observation_space = Box(-1.0, 1.0, (1,), np.float32)
    action_space: gymnasium.Space[Any] = Discrete(2)
    time = 0
    seen = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time = 0
        self.seen = self.first()
        return self.observation(), {}

    def first(self) -> float:
        return 0.0

    def observation(self) -> np.ndarray[Any, Any]:
        return np.array([self.seen], np.float32)


class OneReward(Probe):
    """One step, reward 1: does the value learn a constant?"""

    def step(self, action: Any) -> Step:
        return self.observation(), 1.0, True, False, {}


class RewardOfObservation(Probe):
    """One step, reward -1 or 1 as observed: does the value look at the observation?"""

    def first(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def step(self, action: Any) -> Step:
        return self.observation(), self.seen, True, False, {}


class LaterReward(Probe):
    """Two steps, reward 1 at the second: is the first worth gamma?"""

    def step(self, action: Any) -> Step:
        self.time += 1
        self.seen = 1.0
        return self.observation(), float(self.time == 2), self.time == 2, False, {}


class RewardOfAction(Probe):
    """One step, reward 1 for action 1, -1 for action 0: does the policy learn?"""

    def step(self, action: Any) -> Step:
        return self.observation(), 1.0 if action == 1 else -1.0, True, False, {}


class Imitate(Probe):
    """One step, reward 1 for the action that the observation names, else -1: does the policy look?"""

    def first(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def step(self, action: Any) -> Step:
        return self.observation(), 1.0 if (action == 1) == (self.seen > 0) else -1.0, True, False, {}


class Aim(Probe):
    """One step, a continuous action, reward -(action - 0.5)^2: does a Gaussian policy find its mean?"""

    action_space = Box(-2.0, 2.0, (1,), np.float32)

    def step(self, action: Any) -> Step:
        return self.observation(), -float((action[0] - 0.5) ** 2), True, False, {}


class Endless(Probe):
    """Reward 1 for ever, stopped by a limit of 5 steps: is the value 1 / (1 - gamma)?"""

    def step(self, action: Any) -> Step:
        self.time += 1
        return self.observation(), 1.0, False, self.time == 5, {}


_REPLAYED: dict[str, Any] = {
    "net": Net(hidden=(16,), activation="relu"), "memory": Memory(capacity=2_000, batch_size=16, min_size=8),
    "rollout_steps": 16, "warmup_steps": 0,
}  # fmt: skip

SMALL: dict[str, dict[str, Any]] = {
    "random": {},
    "reinforce": {"rollout_steps": 8, "episodes_per_update": 1},
    "a2c": {},
    "a3c": {},
    "ppo": {},
    "appo": {},
    "sarsa": {},
    "async_q": {"target_every": 50, "epsilon": 0.5, "rollout_steps": 8},
    "pqn": {},
    "dqn": {"memory": Memory(capacity=2_000, batch_size=16, min_size=4)},
    "acktr": {"kl_clip": 0.02, "entropy_weight": 0.0},
    "impala": {"replay_ratio": 1.0, "memory": Memory(capacity=2_000, batch_size=8, min_size=100)},
    "acer": {"memory": Memory(capacity=2_000, batch_size=8, min_size=100)},
    "sac": _REPLAYED,
    "td3": _REPLAYED,
    "crossq": _REPLAYED,
}
"""For each algorithm the settings with which it learns from its very first small batches."""

LEARNS_NOTHING = {"random"}
"""Algorithms without weights, of which nobody asks that these change."""


def vector(make: Callable[[], gymnasium.Env[Any, Any]], num_envs: int = 8) -> SyncVectorEnv:
    """Copies of one environment, with same-step autoreset."""
    return SyncVectorEnv([make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def train_in_threads(workers: Sequence[Algorithm], updates: int, num_envs: int = 4) -> None:
    """Let workers of one algorithm learn Imitate at the same time, until all are done."""
    threads = [
        threading.Thread(target=batches, args=(vector(Imitate, num_envs), worker, updates, seed))
        for seed, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def batches(envs: SyncVectorEnv, algorithm: Algorithm, count: int, seed: int = 0) -> list[Batch]:
    """Act and update `count` times; the batches, each copied."""
    policy, rollout = algorithm.policy, Rollout(algorithm.rollout_steps)
    generator = torch.Generator().manual_seed(seed)
    observation = policy.encode(envs.reset(seed=seed)[0])
    made = []
    for _ in range(count):
        while not rollout.full:
            action, extras = policy.act(observation, generator=generator)
            raw, reward, terminated, truncated, infos = envs.step(policy.for_env(action))
            following = policy.encode(raw)
            successor = following.copy()
            for row in np.flatnonzero(terminated | truncated):
                space = envs.single_observation_space
                final = concatenate(space, [infos["final_obs"][row]], create_empty_array(space, 1))
                successor[row] = policy.encode(final)[0]
            valid = np.ones(envs.num_envs, np.bool_)
            rollout.add(
                Transition(
                    observation, action, reward.astype(np.float32), successor, terminated, truncated, valid, extras
                )
            )
            observation = following
        batch = rollout.take()
        made.append(
            Batch(
                *[getattr(batch, name).clone() for name in Batch.__slots__[:7]],
                extras={name: extra.clone() for name, extra in batch.extras.items()},
            )
        )
        algorithm.update(batch)
    return made
