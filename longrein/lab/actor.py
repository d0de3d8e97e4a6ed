"""Environments x policy -> transitions: the one room where link and learn meet. Knows all three autoreset modes.

What each mode asks of the actor, when an episode ends in a row at step k:
1. SAME_STEP: step k returned the next episode's first observation; the true successor is in infos["final_obs"].
2. NEXT_STEP: step k returned the true successor; step k+1 ignores the action and returns the first observation of the
   next episode. That row is filler: valid is False.
3. DISABLED: step k returned the true successor; the actor resets those environments before step k+1.
In each mode, infos["restarted"] marks an environment that was lost and replaced: the outcome of that step was never
seen, so the row is truncated and not valid, and the episode is in no statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

from longrein.errors import SpecError
from longrein.learn.algorithms import Policy, RecurrentPolicy, initial_state
from longrein.learn.batch import Transition

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished episode."""

    env: int
    """Which of the vector's environments."""
    env_steps: int
    """Env steps of all environments together when it ended."""
    length: int
    """Env steps of its own."""
    return_: float
    """Undiscounted sum of the environment's own rewards."""
    truncated: bool
    """Whether it was stopped from outside, by a time limit for instance, rather than by the task."""


def connect(
    urls: str | Sequence[str], num_envs: int, *, autoreset: str = "same_step", token: str | None = None
) -> VectorEnv[Any, Any, Any]:
    """Far environments that replace themselves when they are lost; over one lease for each URL.

    Same-step autoreset costs no round trip at the end of an episode. Raises LinkError.
    """
    from longrein.link.vector import connect_vec

    return connect_vec(urls, num_envs, autoreset=autoreset, on_loss="restart", token=token)


def make_envs(source: str, num_envs: int, options: Mapping[str, Any]) -> VectorEnv[Any, Any, Any]:
    """Environments in this process: an id of Gymnasium, KIND:NAME or file.py:factory. Raises SpecError."""
    from longrein.link.served import make_vec

    return make_vec(source, num_envs, options)


@contextmanager
def nats_broker() -> Iterator[str]:
    """A NATS broker of our own on this machine, for as long as it is held: its URL. Raises LinkError."""
    from longrein.link.transports.nats_broker import start_broker

    with start_broker() as broker:
        yield broker.url


def autoreset_mode(envs: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """What a vector environment says it does at the end of an episode. Raises SpecError when it does not say."""
    mode = envs.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise SpecError(
            "env.autoreset",
            f"the vector environment declares {mode!r} as metadata['autoreset_mode']",
            hint="guessing it wrong would train on steps that never were; set one of gymnasium.vector.AutoresetMode",
        )
    return mode


class Actor:
    """Steps a vector environment with a policy for ever; `collect` gives what came of it.

    envs: of any autoreset mode, which it must declare. seed: of the environments' first reset.
    generator: of the policy's choices.
    """

    def __init__(
        self, envs: VectorEnv[Any, Any, Any], policy: Policy, *, seed: int, generator: torch.Generator | None = None
    ) -> None:
        self.envs = envs
        self.policy = policy
        self.generator = generator
        self.mode = autoreset_mode(envs)
        self.env_steps = 0  # valid rows so far
        self.restarts = 0  # environments that were lost and replaced
        self._episodes: list[Episode] = []
        self._returns = np.zeros(envs.num_envs)
        self._lengths = np.zeros(envs.num_envs, np.int64)
        self._filler = np.zeros(envs.num_envs, np.bool_)  # rows whose next step only resets
        self._state = initial_state(policy, envs.num_envs)  # what a recurrent policy remembers; None: nothing
        observation, _ = envs.reset(seed=seed)
        self._observation = policy.encode(observation)

    def collect(self, steps: int) -> Iterator[Transition]:
        """The next `steps` vector steps, one transition each."""
        for _ in range(steps):
            yield self._step()

    def finished(self) -> list[Episode]:
        """Episodes that ended since the last call, in order."""
        episodes, self._episodes = self._episodes, []
        return episodes

    def _step(self) -> Transition:
        action, extras = act(self.policy, self._observation, self._state, generator=self.generator)
        raw, raw_reward, terminated, truncated, infos = self.envs.step(self.policy.for_env(action))
        observation = self.policy.encode(raw)
        restarted = _mask(infos, "restarted", self.envs.num_envs)
        valid = ~self._filler
        if restarted is not None:
            self.restarts += int(restarted.sum())
            valid &= ~restarted
            truncated = truncated | restarted
        done = (terminated | truncated) & ~self._filler
        successor = observation
        self._filler = np.zeros_like(done)
        if done.any():
            successor, observation = self._cross(done, restarted, observation, infos)
        if self._state is not None:
            # Zeros after an end, and after a filler row too, in which the policy still looked at the end.
            over = terminated | truncated | ~valid
            self._state = np.where(over[:, None], np.float32(0.0), extras.pop("next_state"))
        reward = np.where(valid, raw_reward, 0.0)
        self._count(reward, valid, done, truncated & ~terminated)
        transition = Transition(
            self._observation, action, reward.astype(np.float32), successor, terminated, truncated, valid, extras
        )
        self._observation = observation
        return transition

    def _cross(
        self, done: Bools, restarted: Bools | None, observation: NDArray[Any], infos: dict[str, Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """At the end of some episodes: (true successors, what to act on next), each [B, ...]."""
        if self.mode == AutoresetMode.NEXT_STEP:
            self._filler = done
            return observation, observation
        if self.mode == AutoresetMode.SAME_STEP:
            seen = done if restarted is None else done & ~restarted  # nobody saw the others' end
            return _with_final(self.policy, self.envs.single_observation_space, observation, seen, infos), observation
        raw, _ = self.envs.reset(options={"reset_mask": done})
        first = self.policy.encode(raw)
        return observation, np.where(done.reshape(-1, *[1] * (first.ndim - 1)), first, observation)

    def _count(self, reward: NDArray[np.float64], valid: Bools, done: Bools, stopped: Bools) -> None:
        self.env_steps += int(valid.sum())
        self._returns += reward
        self._lengths += valid
        for row in np.flatnonzero(done):
            if valid[row]:
                length, total = int(self._lengths[row]), float(self._returns[row])
                self._episodes.append(Episode(int(row), self.env_steps, length, total, bool(stopped[row])))
            self._returns[row] = 0.0
            self._lengths[row] = 0


def act(
    policy: Policy,
    observation: NDArray[np.generic],
    state: NDArray[np.float32] | None,
    *,
    deterministic: bool = False,
    generator: torch.Generator | None = None,
) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
    """Policy.act, with its state [B, S] where it is recurrent: actions, and extras with `next_state` then."""
    if state is None:
        return policy.act(observation, deterministic, generator)
    assert isinstance(policy, RecurrentPolicy)
    return policy.act(observation, deterministic, generator, state)


def _mask(infos: dict[str, Any], key: str, num_envs: int) -> Bools | None:
    """Where a vector info says yes to `key`: bool [B], or None when it says nothing."""
    if key not in infos:
        return None
    flags = np.asarray(infos[key]).astype(np.bool_).reshape(num_envs)
    given = infos.get(f"_{key}")
    return flags if given is None else flags & np.asarray(given, np.bool_)


def _with_final(
    policy: Policy, space: gymnasium.Space[Any], observation: NDArray[Any], rows: Bools, infos: dict[str, Any]
) -> NDArray[Any]:
    """Encoded observations [B, ...] with those of `rows` replaced by what infos["final_obs"] holds."""
    if not rows.any():
        return observation
    if "final_obs" not in infos:
        raise SpecError(
            "env.autoreset",
            "same-step autoreset ended an episode without infos['final_obs']",
            hint="the true successor is lost; use next_step, or an environment that follows Gymnasium 1.1",
        )
    successor = observation.copy()
    for row in np.flatnonzero(rows):
        batch = create_empty_array(space, 1)
        batch = concatenate(space, [infos["final_obs"][row]], batch)
        successor[row] = policy.encode(batch)[0]
    return successor
