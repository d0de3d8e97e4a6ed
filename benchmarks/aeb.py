"""What the session's loop costs beside one written by hand: case 1, one agent in one environment.

    python benchmarks/aeb.py

All train PPO with its default settings on the same environments, in turns: a loop by hand that records nothing, the
same loop with a session's records (CSV files, TensorBoard) and checkpoints of the weights, and a session.
An environment that does nothing shows the loop and not the environment. The figures are medians over rounds of
(session / by hand - 1), in processor seconds of this process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from longrein.lab import checkpoint
from longrein.lab.actor import Episode
from longrein.lab.aeb import Space
from longrein.lab.course import Course, SessionSettings
from longrein.lab.records import SessionRecords
from longrein.lab.stage import staged
from longrein.learn import algorithms
from longrein.learn.batch import Transition
from longrein.learn.rollout import Rollout

COPIES = 8
EVERY = 20_000  # env steps between checkpoints


class Nothing(VectorEnv[Any, Any, Any]):
    """Always the same observation, no reward, no end."""

    def __init__(self, count: int) -> None:
        self.num_envs = count
        self.single_observation_space, self.single_action_space = Box(-1.0, 1.0, (4,), np.float32), Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, count)
        self.action_space = batch_space(self.single_action_space, count)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.seen, self.reward, self.over = np.zeros((count, 4), np.float32), np.zeros(count), np.zeros(count, bool)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.seen, {}

    def step(self, actions: Any) -> Any:
        return self.seen, self.reward, self.over, self.over, {}


def cartpoles(count: int) -> VectorEnv[Any, Any, Any]:
    """CartPole, with the true last observation in infos."""
    make = [lambda: gymnasium.make("CartPole-v1")] * count
    return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)


def by_hand(make: Any, steps: int, records: SessionRecords | None = None) -> float:
    """The shortest loop that does the same."""
    envs = make(COPIES)
    config_class, build = algorithms.load("ppo")
    algorithm = build(config_class(), envs.single_observation_space, Discrete(2), 0)
    policy, rollout = algorithm.policy, Rollout(algorithm.rollout_steps)
    generator = torch.Generator().manual_seed(1)
    valid = np.ones(COPIES, np.bool_)
    returns, lengths, finished = np.zeros(COPIES), np.zeros(COPIES, int), list[Episode]()
    observation = policy.encode(envs.reset(seed=1)[0])
    started = time.process_time()
    for step in range(1, steps // COPIES + 1):
        action, extras = policy.act(observation, False, generator)
        raw, reward, terminated, truncated, infos = envs.step(policy.for_env(action))
        following = policy.encode(raw)
        successor, done = following, terminated | truncated
        returns += reward
        lengths += 1
        if done.any():
            successor = following.copy()
            for row in np.flatnonzero(done):
                successor[row] = infos["final_obs"][row]
                finished.append(Episode(int(row), step * COPIES, int(lengths[row]), float(returns[row]), False))
                returns[row] = lengths[row] = 0
        rollout.add(Transition(observation, action, reward.astype(np.float32), successor, terminated, truncated, valid,
                               extras))  # fmt: skip
        observation = following
        if rollout.full:
            measured = algorithm.update(rollout.take())
            if records is not None:
                records.add_metrics(step * COPIES, measured)
                records.add_episodes(finished)
                finished.clear()
                if step * COPIES // EVERY > (step * COPIES - COPIES * algorithm.rollout_steps) // EVERY:
                    checkpoint.save(records.checkpoint, {"state": algorithm.state_dict()})
    return time.process_time() - started


def by_session(make: Any, steps: int, folder: Path) -> float:
    """What a session does between opening its environments and its evaluation."""
    config_class, _ = algorithms.load("ppo")
    config = config_class()
    settings = SessionSettings("aeb", "ppo", config, num_envs=COPIES, max_env_steps=steps)
    with (
        SessionRecords(folder, 0) as records,
        staged(Space(settings.bodies), [("ppo", config)], [(make, COPIES)], lambda *_: 1, records) as stands,
    ):
        started = time.process_time()
        Course(settings, stands, records, lambda _: None).run(threading.Event())
        return time.process_time() - started


def main() -> None:
    """Print a line for each environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for name, make in (("nothing", Nothing), ("CartPole-v1", cartpoles)):
        spent: dict[str, list[float]] = {"by hand": [], "by hand, with records": [], "session": []}
        for turn in range(asked.pairs):
            order = list(spent) if turn % 2 else list(reversed(spent))
            for kind in order:
                with tempfile.TemporaryDirectory() as folder:
                    spent[kind].append(measured(kind, make, asked.steps, Path(folder)))
        for kind in ("by hand", "by hand, with records"):
            costs = [100 * (ours / hand - 1) for ours, hand in zip(spent["session"], spent[kind], strict=True)]
            rates = [asked.steps / statistics.median(spent[one]) for one in (kind, "session")]
            each = ", ".join(f"{cost:+.1f}" for cost in costs)
            print(f"{name}: {kind} {rates[0]:,.0f} env steps/s, session {rates[1]:,.0f}: "
                  f"{statistics.median(costs):+.1f} % ({each})")  # fmt: skip


def measured(kind: str, make: Any, steps: int, folder: Path) -> float:
    """Processor seconds of one run."""
    if kind == "session":
        return by_session(make, steps, folder)
    if kind == "by hand":
        return by_hand(make, steps)
    with SessionRecords(folder, 0) as records:
        return by_hand(make, steps, records)


if __name__ == "__main__":
    main()
