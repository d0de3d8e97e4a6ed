"""REINFORCE: whole episodes only, its gradient by hand, its switches and its probes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from learn import probes

from longrein.errors import SpecError
from longrein.learn.algorithms.reinforce import Config, Reinforce
from longrein.learn.batch import Batch
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

FAST: dict[str, Any] = {
    "rollout_steps": 4, "episodes_per_update": 16, "gamma": 0.8, "lr": 1e-2, "max_grad_norm": 5.0,
    "net": Net(hidden=(16,)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(probe: type[probes.Probe] = probes.Imitate, seed: int = 0, **settings: Any) -> Reinforce:
    return Reinforce(Config(**FAST | settings), probe.observation_space, probe.action_space, seed)


def trained(probe: type[probes.Probe], updates: int = 250, **settings: Any) -> Reinforce:
    algorithm = make(probe, **settings)
    probes.batches(probes.vector(probe), algorithm, updates)
    return algorithm


def values(algorithm: Reinforce, *observations: float) -> list[float]:
    with torch.no_grad():
        return algorithm.policy.value(torch.tensor(observations).unsqueeze(1)).tolist()  # type: ignore[no-any-return]


def choices(algorithm: Reinforce, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].reshape(-1).tolist()  # type: ignore[no-any-return]


def episode(rewards: list[float], *, end: str | None = "terminated", start: int = 0) -> Batch:
    """One environment's rows; each observation is the number of its row."""
    steps = len(rewards)
    seen = torch.arange(start, start + steps, dtype=torch.float32).view(steps, 1, 1)
    flags = {name: torch.zeros(steps, 1, dtype=torch.bool) for name in ("terminated", "truncated")}
    if end is not None:
        flags[end][-1] = True
    reward = torch.tensor(rewards).view(steps, 1)
    action = torch.ones(steps, 1, dtype=torch.int64)
    return Batch(seen, action, reward, seen + 1, **flags, valid=torch.ones(steps, 1, dtype=torch.bool))


def test_the_gradient_by_hand() -> None:
    # No hidden layer and weights 0: pi = (1/2, 1/2). Action 1 was taken at s = 0 and s = 1, with rewards 1 and 2:
    # G = (1 + 0.8 * 2, 2) = (2.6, 2). d log pi(1|s) / d logits = (-1/2, 1/2), times s for the weights.
    # Descent with rate 1 on the mean: bias + (2.6 + 2) / 2 / 2 = 1.15, weight + (0 * 2.6 + 1 * 2) / 2 / 2 = 0.5.
    settings = {"optimizer": "sgd", "lr": 1.0, "max_grad_norm": 1e9, "baseline": False, "net": Net(hidden=())}
    algorithm = make(episodes_per_update=1, **settings)
    actor = algorithm.policy.actor
    with torch.no_grad():
        actor.weight.zero_()
    algorithm.update(episode([1.0, 2.0]))
    assert actor.bias.tolist() == pytest.approx([-1.15, 1.15])
    assert actor.weight.flatten().tolist() == pytest.approx([-0.5, 0.5])


def test_nothing_is_learnt_before_an_episode_is_whole() -> None:
    algorithm = make(episodes_per_update=1)
    before = [p.detach().clone() for p in algorithm.policy.parameters()]
    assert math.isnan(algorithm.update(episode([1.0, 1.0], end=None))["policy_loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, algorithm.policy.parameters(), strict=True))
    told = algorithm.update(episode([1.0], start=2))
    # G = 1 + 0.8 + 0.64, 1.8 and 1: all three rows, though they came in two batches.
    assert told["return"] == pytest.approx((2.44 + 1.8 + 1) / 3)
    assert told["episodes"] == 1
    assert algorithm.env_steps == 3


def test_it_waits_for_as_many_episodes_as_it_was_told() -> None:
    algorithm = make(episodes_per_update=3)
    told = [algorithm.update(episode([1.0]))["episodes"] for _ in range(6)]
    assert [math.isnan(count) for count in told] == [True, True, False, True, True, False]
    assert told[2] == told[5] == 3
    assert algorithm.updates == 2


@pytest.mark.parametrize(("baseline", "expected"), [(True, 1 + 0.8 * 5), (False, 1.0)])
def test_a_truncated_episode_is_bootstrapped_by_the_baseline_alone(baseline: bool, expected: float) -> None:
    algorithm = make(episodes_per_update=1, baseline=baseline, net=Net(hidden=()))
    if algorithm.policy.critic is not None:
        with torch.no_grad():
            algorithm.policy.critic.weight.zero_()
            algorithm.policy.critic.bias.fill_(5.0)  # V = 5 everywhere
    assert algorithm.update(episode([1.0], end="truncated"))["return"] == pytest.approx(expected)


@pytest.mark.parametrize("baseline", [True, False])
def test_an_episode_that_was_lost_is_learnt_from_only_with_a_baseline(baseline: bool) -> None:
    algorithm = make(episodes_per_update=1, baseline=baseline)
    whole = episode([1.0, 1.0, 1.0])
    valid = whole.valid.clone()
    valid[2] = False  # the environment was lost in the third step
    told = algorithm.update(dataclasses.replace(whole, valid=valid))
    assert math.isnan(told["return"]) != baseline
    assert algorithm.env_steps == 2


def test_returns_are_normalised_over_the_update() -> None:
    told = make(episodes_per_update=2, normalise_returns=True, baseline=False).update(
        Batch(*(torch.cat([getattr(episode([r]), name) for r in (1.0, 5.0)]) for name in Batch.__slots__[:7]))
    )
    # Returns 1 and 5 become about -1 / sqrt 2 and 1 / sqrt 2 (deviation with N - 1), and both actions were as likely.
    assert told["policy_loss"] == pytest.approx(0.0, abs=1e-3)
    assert told["advantage_std"] == pytest.approx(2.0)


@pytest.mark.parametrize("switched", [{"baseline": False}, {"normalise_returns": True}, {"shared": True}, {}], ids=str)
def test_probe_action_by_the_observation(switched: dict[str, Any]) -> None:
    assert choices(trained(probes.Imitate, **switched), -1.0, 1.0) == [0, 1]


def test_probe_constant_reward() -> None:
    assert values(trained(probes.OneReward), 0.0) == pytest.approx([1.0], abs=0.05)


def test_probe_reward_of_the_observation() -> None:
    assert values(trained(probes.RewardOfObservation), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)


def test_probe_discount_over_two_steps() -> None:
    assert values(trained(probes.LaterReward), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


def test_probe_reward_of_the_action() -> None:
    assert choices(trained(probes.RewardOfAction), 0.0) == [1]


def test_probe_continuous_action() -> None:
    assert choices(trained(probes.Aim, 600, entropy_weight=1e-3), 0.0) == pytest.approx([0.5], abs=0.2)


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    assert values(trained(probes.Endless, 800), 0.0) == pytest.approx([5.0], abs=0.3)


def test_schedules_follow_env_steps() -> None:
    algorithm = make(lr=Linear(1e-3, 0.0, 4), entropy_weight=Linear(0.1, 0.0, 2))
    told = [algorithm.update(episode([1.0, 1.0])) for _ in range(3)]
    assert [row["lr"] for row in told] == pytest.approx([1e-3, 5e-4, 0.0])
    assert [row["entropy_weight"] for row in told] == pytest.approx([0.1, 0.0, 0.0])


def test_a_batch_without_a_valid_row_is_refused() -> None:
    batch = episode([1.0])
    with pytest.raises(ValueError, match="no row"):
        make().update(dataclasses.replace(batch, valid=torch.zeros_like(batch.valid)))


def test_wrong_settings_are_named() -> None:
    for settings, name in (({"gamma": -0.1}, "gamma"), ({"rollout_steps": 0}, "rollout_steps")):
        with pytest.raises(SpecError, match=rf"reinforce\.{name}"):
            Config(**settings)
