"""CartPole stepped as one array is what single ones are, to the bit: in its dynamics, its ends and its seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from longrein.errors import SpecError
from longrein.lab.actor import Actor, make_envs
from longrein.lab.evaluation import evaluate
from longrein.lab.experiment import run_trial
from longrein.lab.spec import from_plain
from longrein.learn import algorithms
from longrein.learn.batch import FIELDS
from longrein.link.makers import native

MODES = {"same_step": AutoresetMode.SAME_STEP, "next_step": AutoresetMode.NEXT_STEP, "disabled": AutoresetMode.DISABLED}


def pair(copies: int, autoreset: str) -> tuple[VectorEnv[Any, Any, Any], VectorEnv[Any, Any, Any]]:
    make = lambda: gymnasium.make("CartPole-v1", max_episode_steps=25)  # noqa: E731  # one for each copy
    return (
        SyncVectorEnv([make] * copies, autoreset_mode=MODES[autoreset]),
        native.make("CartPole-v1", copies, autoreset, max_episode_steps=25),
    )


@pytest.mark.parametrize("autoreset", MODES)
def test_it_answers_as_single_ones_do(autoreset: str) -> None:
    single, together = pair(5, autoreset)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(single.reset(seed=3)[0], together.reset(seed=3)[0])
    ends = np.zeros(2, np.int64)
    for _ in range(200):
        actions = rng.integers(0, 2, 5)
        one, other = single.step(actions), together.step(actions)
        for ours, theirs in zip(one[:4], other[:4], strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert ("final_obs" in one[4]) == ("final_obs" in other[4])
        for row in np.flatnonzero(one[4].get("_final_obs", [])):
            np.testing.assert_array_equal(one[4]["final_obs"][row], other[4]["final_obs"][row])
        done = other[2] | other[3]
        ends += [other[2].sum(), other[3].sum()]
        if autoreset == "disabled" and done.any():
            begun = [envs.reset(options={"reset_mask": done})[0] for envs in (single, together)]  # the mask is popped
            np.testing.assert_array_equal(*begun)
    assert (ends > 3).all()  # by falling, and by the time limit


class Random:
    """A policy that draws from a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def encode(self, observation: Any) -> Any:
        return observation

    def act(self, observation: Any, deterministic: bool = False, generator: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.rng.integers(0, 2, len(observation)), {}

    def for_env(self, action: Any) -> Any:
        return action


@pytest.mark.parametrize("autoreset", MODES)
def test_an_actor_makes_the_same_transitions_of_it(autoreset: str) -> None:
    one, other = (Actor(envs, Random(), seed=1) for envs in pair(3, autoreset))
    for _ in range(150):
        ours, theirs = one.step(), other.step()
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)
    episodes = one.finished()
    assert episodes == other.finished()
    assert {episode.truncated for episode in episodes} == {True, False}


def test_evaluation_plays_each_seed_as_a_single_one_would() -> None:
    found = []
    for how in ("sync", "native"):
        envs = make_envs("CartPole-v1", 3, {"vectorization": how})
        config_class, build = algorithms.load("ppo")
        policy = build(config_class(), envs.single_observation_space, envs.single_action_space, 0).policy
        found.append(evaluate(policy, envs, [11, 7, 5, 2]))
    assert found[0] == found[1]


def test_a_spec_chooses_it(tmp_path: Path) -> None:
    ppo = {"algorithm": {"name": "ppo", "rollout_steps": 16}, "net": {"hidden": [8]}}
    runs = []
    for how in ("sync", "native"):
        env = {"id": "CartPole-v1", "num_envs": 4, "options": {"vectorization": how}}
        plain = {"agent": ppo, "env": env, "meta": {"env_steps": 256, "eval": {"episodes": 2}}}
        (session,) = run_trial(from_plain("cartpole", plain), tmp_path).sessions
        assert session is not None
        runs.append((session.episodes, session.training_mean, session.evaluation))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("Acrobot-v1", {"vectorization": "native"}, "Acrobot-v1 cannot be stepped as one array"),
        ("CartPole-v1", {"vectorization": "threads"}, "neither sync nor native"),
        ("CartPole-v1", {"vectorization": "native", "wind": 1}, "no such option"),
    ],
)
def test_what_cannot_be_is_refused(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        make_envs(name, 2, options)
