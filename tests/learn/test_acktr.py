"""ACKTR: probes, trust regions, statistics that no reward reaches, and rows that do not count."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, Text
from learn import probes

from longrein.errors import SpecError
from longrein.learn.algorithms.acktr import ACKTR, Config, build
from longrein.learn.batch import Batch
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

SMALL: dict[str, Any] = {"rollout_steps": 8, "gamma": 0.8, "kl_clip": 0.02, "entropy_weight": 0.0}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def made(make: type[probes.Probe] = probes.Imitate, seed: int = 0, **settings: Any) -> ACKTR:
    config = Config(**{"net": Net((16,))} | SMALL | settings)
    return build(config, make.observation_space, make.action_space, seed)


def trained(make: type[probes.Probe], updates: int = 150, **settings: Any) -> ACKTR:
    algorithm = made(make, **settings)
    probes.batches(probes.vector(make, 16), algorithm, updates)
    return algorithm


def values(algorithm: ACKTR, *observations: float) -> list[float]:
    with torch.no_grad():
        return algorithm.policy.value(torch.tensor(observations).unsqueeze(1)).tolist()  # type: ignore[no-any-return]


def choices(algorithm: ACKTR, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].reshape(-1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("shared", [False, True])
def test_probe_constant_reward(shared: bool) -> None:
    assert values(trained(probes.OneReward, shared=shared), 0.0) == pytest.approx([1.0], abs=0.05)


@pytest.mark.parametrize("shared", [False, True])
def test_probe_reward_of_the_observation(shared: bool) -> None:
    algorithm = trained(probes.RewardOfObservation, shared=shared)
    assert values(algorithm, -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)


def test_probe_discount_over_two_steps() -> None:
    assert values(trained(probes.LaterReward), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


@pytest.mark.parametrize("shared", [False, True])
def test_probe_reward_of_the_action(shared: bool) -> None:
    assert choices(trained(probes.RewardOfAction, shared=shared), 0.0) == [1]


@pytest.mark.parametrize("shared", [False, True])
def test_probe_action_by_the_observation(shared: bool) -> None:
    assert choices(trained(probes.Imitate, shared=shared), -1.0, 1.0) == [0, 1]


@pytest.mark.parametrize("switched", [{}, {"scale_reward": True, "normalise_advantage": True}])
def test_probe_continuous_action(switched: dict[str, Any]) -> None:
    # The rate falls: with a step of as much KL as the first, a mean is never still.
    algorithm = trained(probes.Aim, 200, lr=Linear(0.25, 0.0, 200 * 8 * 16), fallback_lr=0.01, **switched)
    assert choices(algorithm, 0.0) == pytest.approx([0.5], abs=0.15)
    assert algorithm.policy.log_std is not None
    assert float(algorithm.policy.log_std.detach()) < -0.2  # which Adam moves: it is in no layer
    assert algorithm.optimizers[0].others == ["2"]


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(probes.Endless), 0.0) == pytest.approx([5.0], abs=0.25)


def one_batch(**settings: Any) -> Batch:
    (batch,) = probes.batches(probes.vector(probes.Imitate), made(seed=1, **settings), 1)
    return batch


def factors(algorithm: ACKTR) -> list[torch.Tensor]:
    return [m for kfac in algorithm.optimizers for pair in kfac.factors().values() for m in pair]


@pytest.mark.parametrize("shared", [False, True])
def test_no_reward_and_no_weight_reaches_the_statistics(shared: bool) -> None:
    batch = one_batch()
    large = dataclasses.replace(batch, reward=100 * batch.reward)
    one, two, three = (
        made(seed=1, shared=shared, **extra) for extra in ({}, {}, {"entropy_weight": 5.0, "value_weight": 9.0})
    )
    one.update(batch)
    two.update(large)
    three.update(batch)
    assert len(factors(one)) == (6 if shared else 8)
    for a, b, c in zip(factors(one), factors(two), factors(three), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_separate_networks_have_separate_trust_regions() -> None:
    separate, shared = made(), made(shared=True)
    assert [set(kfac.factors()) for kfac in separate.optimizers] == [set(), set()]
    separate.update(one_batch())
    shared.update(one_batch())
    assert [len(kfac.factors()) for kfac in separate.optimizers] == [2, 2]
    assert [len(kfac.factors()) for kfac in shared.optimizers] == [3]
    moved = {id(p) for kfac in separate.optimizers for group in kfac.param_groups for p in group["params"]}
    assert moved == {id(p) for p in separate.policy.parameters()}


def test_a_critic_may_take_more_steps_than_the_policy() -> None:
    batch = one_batch()
    settings: dict[str, Any] = {"seed": 1, "cold_updates": 0, "momentum": 0.0}
    once, often = made(**settings), made(**settings, value_updates=8)
    first = [algorithm.update(batch)["value_loss"] for algorithm in (once, often)]
    assert first[0] == first[1]  # as it was before any step
    assert [kfac.updates for kfac in once.optimizers] == [1, 1]
    assert [kfac.updates for kfac in often.optimizers] == [1, 8]
    rows = batch.observation[0]
    assert torch.equal(*(one.policy.distribution(rows).log_prob(batch.action[0]) for one in (once, often)))
    assert all(torch.equal(a, b) for a, b in zip(factors(once), factors(often), strict=True))
    then = [algorithm.update(batch)["value_loss"] for algorithm in (once, often)]
    assert then[1] < then[0] < first[0]


def test_the_policy_moves_by_the_kl_it_may() -> None:
    # A rate so large that every step is cut, and no momentum: each step is all of its own.
    # Statistics of this batch alone: running averages lag behind a policy that moves, and then the KL is larger.
    still = {"statistics_decay": 0.0, "inverse_every": 1, "momentum": 0.0, "fallback_lr": 0.0}
    algorithm = made(probes.Aim, kl_clip=0.002, lr=5.0, cold_updates=3, **still)
    measured, learn = [], algorithm.update

    def update(batch: Batch) -> dict[str, float]:
        measured.append(learn(batch))
        return measured[-1]

    algorithm.update = update  # type: ignore[method-assign]  # to see what it measured
    probes.batches(probes.vector(probes.Aim, 64), algorithm, 20)
    assert all(row["nu"] < 1 for row in measured[3:])
    assert [row["predicted_kl"] for row in measured] == pytest.approx([0.0] * 3 + [0.001] * 17)
    # Two layers, so up to twice as much; and the actions are only a sample.
    assert all(0.5 < row["approx_kl"] / 0.001 < 2.2 for row in measured[3:])


def test_an_invalid_row_changes_nothing() -> None:
    batch = one_batch()
    fields = {name: getattr(batch, name).clone() for name in Batch.__slots__[:7]}
    fields["valid"][5, 0] = False
    clean = Batch(**fields, extras={})
    fields = {name: tensor.clone() for name, tensor in fields.items()}
    fields["reward"][5, 0] = 1e9
    fields["observation"][5, 0] = torch.nan
    fields["next_observation"][5, 0] = torch.nan
    dirty = Batch(**fields, extras={})
    for extra in ({}, {"scale_reward": True}, {"shared": True}):
        one, two = made(seed=3, **extra), made(seed=3, **extra)
        for _ in range(12):  # beyond the cold phase
            assert one.update(dirty) == two.update(clean)
        assert all(torch.equal(a, b) for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True))
        assert one.env_steps == 12 * (8 * 8 - 1)
    with pytest.raises(ValueError, match="no row"):
        one.update(dataclasses.replace(batch, valid=torch.zeros_like(batch.valid)))


@pytest.mark.parametrize("updates", [4, 17])
def test_resume_is_exact_within_the_cold_phase_and_beyond(updates: int, tmp_path: Any) -> None:
    envs = probes.vector(probes.Aim)
    one, two = made(probes.Aim, 1, scale_reward=True), made(probes.Aim, 9, scale_reward=True)
    probes.batches(envs, one, updates)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    measured = []
    for algorithm in (one, two):
        batches = probes.batches(envs, algorithm, 15, seed=5)
        measured.append(algorithm.update(batches[-1]))
    assert measured[0] == measured[1]
    assert all(torch.equal(a, b) for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(factors(one), factors(two), strict=True))


def test_images_are_learnt_from() -> None:
    space = Box(0, 255, (36, 36, 3), np.uint8)
    config = Config(rollout_steps=2, cold_updates=1, inverse_every=1, shared=True, net=Net((8,)))
    algorithm = build(config, space, Discrete(3), 0)
    rows = np.random.default_rng(0).integers(0, 255, (4, 4, 36, 36, 3), np.uint8)
    flags = torch.zeros(2, 4, dtype=torch.bool)
    for update in range(3):
        batch = Batch(
            torch.from_numpy(rows[:2]), torch.full((2, 4), update % 3), torch.rand(2, 4, generator=algorithm.generator),
            torch.from_numpy(rows[2:]), flags, flags, ~flags,
        )  # fmt: skip
        measured = algorithm.update(batch)
    assert all(np.isfinite(measured[name]) for name in ("policy_loss", "approx_kl", "predicted_kl", "nu"))
    assert len(algorithm.optimizers[0].factors()) == 6  # three convolutions, one hidden layer, two heads
    assert algorithm.optimizers[0].others == []


def test_schedules_follow_env_steps() -> None:
    algorithm = made(lr=Linear(1.0, 0.0, 128), kl_clip=Linear(0.01, 0.02, 64), fallback_lr=1.0)
    batch = one_batch()  # 64 rows
    measured = [algorithm.update(batch) for _ in range(3)]
    assert [row["lr"] for row in measured] == pytest.approx([1.0, 0.5, 0.0])
    assert [row["kl_clip"] for row in measured] == pytest.approx([0.01, 0.02, 0.02])
    before = [p.clone() for p in algorithm.policy.parameters()]
    algorithm.update(batch)  # at rate 0
    assert all(torch.equal(a, b) for a, b in zip(before, algorithm.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("rollout_steps", 0), ("gamma", 1.5), ("lambda_", -0.1), ("lr", 0.0), ("kl_clip", 0.0), ("damping", 0.0),
        ("value_noise", 0.0), ("cold_updates", -1), ("inverse_every", 0), ("momentum", 1.0), ("statistics_decay", 1.0),
        ("value_updates", 0),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(setting: str, value: float) -> None:
    with pytest.raises(SpecError, match=rf"acktr\.{setting}"):
        Config(**{setting: value})  # type: ignore[arg-type]


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(SpecError, match="action_space"):
        build(Config(), probes.Imitate.observation_space, Text(3), 0)
    with pytest.raises(SpecError, match="recurrent"):
        made(net=Net(recurrent="gru"))
    with pytest.raises(SpecError, match=r"acktr\.value_updates.*one network"):
        made(shared=True, value_updates=2)


def test_gymnasium_is_played() -> None:
    algorithm = build(Config(), *spaces("CartPole-v1"), 0)
    probes.batches(probes.vector(lambda: gymnasium.make("CartPole-v1"), 4), algorithm, 15)
    assert algorithm.env_steps == 15 * 4 * 20
    assert algorithm.updates == algorithm.optimizers[0].updates == 15


def spaces(name: str) -> tuple[Any, Any]:
    env = gymnasium.make(name)
    return env.observation_space, env.action_space
