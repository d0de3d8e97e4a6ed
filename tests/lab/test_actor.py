"""The actor turns each autoreset mode into the same transitions, and a lost environment into none."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from longrein.errors import SpecError
from longrein.lab.actor import Actor
from longrein.learn import algorithms
from longrein.learn.algorithms.ppo import Config
from longrein.learn.batch import Batch
from longrein.learn.returns import gae
from longrein.learn.rollout import Rollout

MODES = list(AutoresetMode)


class Walk(gymnasium.Env[Any, Any]):
    """Observes (episode, time, a random number of the episode); ends after 3 to 6 steps, is stopped at 5."""

    observation_space = Dict(where=Box(-1e3, 1e3, (2,)), luck=Box(0, 1, (1,)))
    action_space = Discrete(2)
    episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.time = 0
        self.luck = float(self.np_random.random())
        self.end = int(self.np_random.integers(3, 7))
        return self.observation(), {}

    def observation(self) -> dict[str, Any]:
        return {
            "where": np.array([self.episode, self.time], np.float32),
            "luck": np.array([self.luck], np.float32),
        }

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        return self.observation(), self.luck + float(action), self.time == self.end, self.time == 5, {}


class Scripted:
    """A policy without noise: the action is a function of the observation."""

    def encode(self, observation: Any) -> Any:
        return np.concatenate([observation["where"], observation["luck"]], axis=1)

    def act(self, observation: Any, deterministic: bool = False, generator: Any = None) -> Any:
        action = (observation.sum(1) * 10).astype(np.int64) % 2
        return action, {"log_prob": -observation[:, 2]}

    def for_env(self, action: Any) -> Any:
        return action


def walkers(mode: AutoresetMode, count: int = 3) -> SyncVectorEnv:
    return SyncVectorEnv([Walk] * count, autoreset_mode=mode)


def collected(mode: AutoresetMode, steps: int) -> tuple[Batch, Actor]:
    actor = Actor(walkers(mode), Scripted(), seed=7)
    rollout = Rollout(steps)
    for transition in actor.collect(steps):
        rollout.add(transition)
    return rollout.take(), actor


def advantages(batch: Batch) -> torch.Tensor:
    """GAE with some function of the observation as value."""
    value, successor = (x[..., 1] * 0.3 + x[..., 2] for x in (batch.observation, batch.next_observation))
    flags = (batch.terminated, batch.truncated, batch.valid)
    return gae(batch.reward, *flags, value, successor, gamma=0.9, lambda_=0.8)


def columns(batch: Batch) -> dict[str, torch.Tensor]:
    names = ("observation", "action", "reward", "next_observation", "terminated", "truncated")
    return {name: getattr(batch, name) for name in names} | {"log_prob": batch.extras["log_prob"]}


def test_same_step_and_disabled_give_the_same_batch_to_the_bit() -> None:
    (one, _), (two, _) = collected(AutoresetMode.SAME_STEP, 40), collected(AutoresetMode.DISABLED, 40)
    assert one.valid.all()
    assert two.valid.all()
    for name, tensor in columns(one).items():
        assert torch.equal(tensor, columns(two)[name]), name


@pytest.mark.parametrize("env", range(3))
def test_next_step_gives_the_same_rows_and_advantages_once_fillers_are_left_out(env: int) -> None:
    (one, _), (two, _) = collected(AutoresetMode.SAME_STEP, 40), collected(AutoresetMode.NEXT_STEP, 60)
    keep = two.valid[:, env]
    rows = min(int(keep.sum()), 40)
    assert rows > 30
    assert not keep.all()
    for name, tensor in columns(one).items():
        assert torch.equal(tensor[:rows, env], columns(two)[name][keep][:rows, env]), name
    # The last episode may be cut at another place: compare those before it.
    ended = int(torch.nonzero(one.done[:rows, env])[-1]) + 1
    assert torch.equal(advantages(one)[:ended, env], advantages(two)[keep][:ended, env])


@pytest.mark.parametrize("mode", MODES)
def test_the_successor_is_the_next_row_inside_an_episode_and_the_true_end_at_its_end(mode: AutoresetMode) -> None:
    batch, _ = collected(mode, 40)
    for env in range(3):
        rows = batch.valid[:, env]
        now, later, done = batch.observation[rows, env], batch.next_observation[rows, env], batch.done[rows, env]
        assert torch.equal(later[:, 0], now[:, 0]), "a successor is of the same episode"
        assert torch.equal(later[:, 1], now[:, 1] + 1)
        assert torch.equal(later[:-1][~done[:-1]], now[1:][~done[:-1]])
        assert (now[1:][done[:-1]][:, 1] == 0).all(), "after an end comes a first observation"


@pytest.mark.parametrize("mode", MODES)
def test_episodes_are_counted_without_fillers(mode: AutoresetMode) -> None:
    batch, actor = collected(mode, 40)
    episodes = actor.finished()
    assert actor.env_steps == int(batch.valid.sum())
    assert len(episodes) == int((batch.done & batch.valid).sum())
    assert actor.finished() == []
    for env in range(3):
        rows = batch.valid[:, env]
        done = batch.done[rows, env]
        ends = torch.nonzero(done).flatten().tolist()
        starts = [0] + [end + 1 for end in ends[:-1]]
        own = [episode for episode in episodes if episode.env == env]
        assert [episode.length for episode in own] == [e - s + 1 for s, e in zip(starts, ends, strict=True)]
        sums = [float(batch.reward[rows, env][s : e + 1].sum()) for s, e in zip(starts, ends, strict=True)]
        assert [episode.return_ for episode in own] == pytest.approx(sums, rel=1e-5)
        stopped = batch.truncated[rows, env] & ~batch.terminated[rows, env]
        assert [episode.truncated for episode in own] == stopped[ends].tolist()


def test_a_noisy_policy_learns_the_same_weights_in_both_modes_without_fillers() -> None:
    made = []
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        envs = walkers(mode)
        _, build = algorithms.load("ppo")
        algorithm = build(Config(rollout_steps=16), envs.single_observation_space, envs.single_action_space, 1)
        actor = Actor(envs, algorithm.policy, seed=3, generator=torch.Generator().manual_seed(2))
        for _ in range(3):
            rollout = Rollout(16)
            for transition in actor.collect(16):
                rollout.add(transition)
            algorithm.update(rollout.take())
        made.append(algorithm.state_dict()["policy"])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


class Losing(gymnasium.vector.VectorWrapper):
    """Loses environment 1 at one step, as a remote vector environment with on_loss="restart" reports it."""

    def __init__(self, envs: SyncVectorEnv, at: int) -> None:
        super().__init__(envs)
        self.at = at
        self.count = 0
        self.last: Any = None
        self.fresh: Any = None

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        self.last, infos = self.env.reset(seed=seed, options=options)
        return self.last, infos

    def step(self, actions: Any) -> Any:
        self.count += 1
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        mode = self.metadata["autoreset_mode"]
        if self.fresh is not None:
            terminated[1] = truncated[1] = False
            reward[1] = 0.0
            observation, self.fresh = _row(observation, self.fresh), None
        if self.count == self.at:
            made = self.env.envs[1].reset(seed=99)[0]
            if mode == AutoresetMode.SAME_STEP:
                observation = _row(observation, made)
                infos["final_obs"] = np.array([None, {k: v[1] for k, v in self.last.items()}, None], dtype=object)
            else:
                observation = _row(observation, {k: v[1] for k, v in self.last.items()})
                self.fresh = made if mode == AutoresetMode.NEXT_STEP else None
            reward[1], terminated[1], truncated[1] = 0.0, False, True
            infos["restarted"] = infos["_restarted"] = np.array([False, True, False])
        self.last = observation
        return observation, reward, terminated, truncated, infos


def _row(observation: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    changed = {key: value.copy() for key, value in observation.items()}
    for key in changed:
        changed[key][1] = one[key]
    return changed


@pytest.mark.parametrize("mode", MODES)
def test_a_lost_environment_is_truncated_and_its_row_does_not_count(mode: AutoresetMode) -> None:
    envs = Losing(walkers(mode), at=2)  # in the middle of the first episode: none ends before its third step
    actor = Actor(envs, Scripted(), seed=7)
    first, lost, after, *_ = list(actor.collect(6))
    assert first.valid.all()
    assert lost.valid.tolist() == [True, False, True]
    assert lost.truncated.tolist() == [False, True, False]
    assert not lost.terminated.any()
    if mode == AutoresetMode.NEXT_STEP:
        assert not after.valid[1]
    else:
        assert after.valid[1]
        assert after.observation[1, 1] == 0.0, "a new episode begins"
    assert actor.restarts == 1
    assert all(episode.env != 1 or episode.length >= 3 for episode in actor.finished()), "the lost one is no episode"


def test_a_mode_that_is_not_declared_is_not_guessed() -> None:
    envs = walkers(AutoresetMode.NEXT_STEP)
    envs.metadata = {}
    with pytest.raises(SpecError, match="autoreset_mode"):
        Actor(envs, Scripted(), seed=0)
