"""IMPALA: its update against one worked out by autograd, its probes, lag, replay and resume."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learn import probes

from longrein.errors import SpecError
from longrein.learn.algorithms.impala import IMPALA, Config
from longrein.learn.batch import Batch
from longrein.learn.replay import Memory
from longrein.learn.returns import vtrace
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

FAST: dict[str, Any] = {
    "rollout_steps": 16, "lr": 1e-2, "optimizer": "adam", "optimizer_settings": {}, "net": Net(hidden=(16,)),
    "gamma": 0.8, "epochs": 2,
}  # fmt: skip
REPLAY: dict[str, Any] = {"replay_ratio": 2.0, "memory": Memory(capacity=2_000, batch_size=8, min_size=100)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(make: type[probes.Probe] = probes.Imitate, seed: int = 0, **settings: Any) -> IMPALA:
    return IMPALA(Config(**FAST | settings), make.observation_space, make.action_space, seed)


def trained(make: type[probes.Probe], updates: int = 60, **settings: Any) -> IMPALA:
    algorithm = build(make, **settings)
    probes.batches(probes.vector(make), algorithm, updates)
    return algorithm


def values(algorithm: IMPALA, *observations: float) -> list[float]:
    with torch.no_grad():
        return algorithm.policy.value(torch.tensor(observations).unsqueeze(1)).tolist()  # type: ignore[no-any-return]


def choices(algorithm: IMPALA, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].reshape(-1).tolist()  # type: ignore[no-any-return]


def weights(algorithm: IMPALA) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in algorithm.policy.state_dict().values()]


def same(one: IMPALA, other: IMPALA) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# ------------------------------------------------------------------------------------------------------------- probes


def test_probe_constant_reward() -> None:
    assert values(trained(probes.OneReward), 0.0) == pytest.approx([1.0], abs=0.05)


def test_probe_reward_of_the_observation() -> None:
    assert values(trained(probes.RewardOfObservation), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)


@pytest.mark.parametrize("switched", [{}, REPLAY], ids=["fresh", "replayed"])
def test_probe_discount_over_two_steps(switched: dict[str, Any]) -> None:
    assert values(trained(probes.LaterReward, **switched), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


def test_probe_reward_of_the_action() -> None:
    assert choices(trained(probes.RewardOfAction), 0.0) == [1]


@pytest.mark.parametrize("switched", [{}, {"shared": True}, REPLAY, {"optimizer": "rmsprop_tf"}], ids=str)
def test_probe_action_by_the_observation(switched: dict[str, Any]) -> None:
    assert choices(trained(probes.Imitate, **switched), -1.0, 1.0) == [0, 1]


def test_probe_continuous_action() -> None:
    assert choices(trained(probes.Aim, 150), 0.0) == pytest.approx([0.5], abs=0.2)


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(probes.Endless, 80), 0.0) == pytest.approx([5.0], abs=0.25)


# -------------------------------------------------------------------------------------------------------- the update


def off_policy_batch(seed: int = 0) -> tuple[IMPALA, Batch]:
    """A learner, and a batch of a policy that is not its own, with ends of all kinds and an invalid row."""
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(seed=5), 1)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, *batch.reward.shape, generator=generator)
    noise = torch.randn(batch.reward.shape, generator=generator)
    fields = {name: getattr(batch, name).clone() for name in Batch.__slots__[:4]}
    fields["next_observation"][:-1] = fields["observation"][1:]  # as it is where the new flags let an episode go on
    fields |= {"terminated": draw[0] < 0.1, "truncated": draw[1] < 0.1, "valid": draw[2] > 0.1}
    extras = batch.extras | {"log_prob": batch.extras["log_prob"] + 0.7 * noise}
    settings = {"epochs": 1, "optimizer": "sgd", "lr": 1.0, "max_grad_norm": math.inf, "c_clip": 0.9}
    return build(seed=1, **settings), Batch(**fields, extras=extras)


@pytest.mark.parametrize("policy_clip", [1.0, math.inf])
def test_the_step_is_the_gradient_of_the_paper(policy_clip: float) -> None:
    learner, batch = off_policy_batch()
    learner.config = dataclasses.replace(learner.config, policy_clip=policy_clip, entropy_weight=0.05)
    config, policy = learner.config, learner.policy
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    # Written out: every value by itself, both ends of every row, sums over the valid rows alone.
    distribution, value = policy.evaluate(batch.observation.flatten(0, 1))
    log_prob = distribution.log_prob(batch.action.flatten()).view_as(batch.reward)
    value = value.view_as(log_prob)
    next_value = policy.value(batch.next_observation.flatten(0, 1)).view_as(value).detach()
    log_ratio = log_prob.detach() - batch.extras["log_prob"]
    target, q = vtrace(
        batch.reward, batch.terminated, batch.truncated, batch.valid, value.detach(), next_value, log_ratio,
        gamma=config.gamma, c_clip=config.c_clip,
    )  # fmt: skip
    rho = log_ratio.exp().clamp(max=policy_clip)
    loss = torch.zeros(())
    count = 0
    for t, b in batch.valid.nonzero().tolist():
        loss = loss - rho[t, b] * (q - value.detach())[t, b] * log_prob[t, b]
        loss = loss + 0.5 * 0.5 * (value[t, b] - target[t, b]) ** 2
        loss = loss - 0.05 * distribution.entropy().view_as(value)[t, b]
        count += 1
    gradients = torch.autograd.grad(loss / count, list(policy.parameters()))
    learner.update(batch)
    for start, gradient, now in zip(before, gradients, policy.parameters(), strict=True):
        torch.testing.assert_close(now.detach(), start - gradient, atol=2e-6, rtol=1e-4)


def test_the_ratio_weighs_the_policy_gradient() -> None:
    # One step, terminated, value 0 from a zeroed critic, reward 1: the gradient is rho * grad log pi(a).
    learner, _ = off_policy_batch()
    torch.nn.init.zeros_(learner.policy.critic.weight)  # type: ignore[union-attr]  # it has one
    learner.config = dataclasses.replace(learner.config, entropy_weight=0.0)
    steps = {}
    for rho in (0.25, 1.0, 8.0):
        one = build(seed=1, epochs=1, optimizer="sgd", lr=1.0, rollout_steps=1, entropy_weight=0.0)
        one.load_state_dict(learner.state_dict())
        before = one.policy.actor.bias.detach().clone()
        logits = one.policy.actor(one.policy.torso(torch.zeros(1, 1)))
        log_prob = logits.log_softmax(-1)[:, 1].detach() - math.log(rho)
        yes = torch.ones(1, 1, dtype=torch.bool)
        row = torch.zeros(1, 1, 1)
        extras = {"log_prob": log_prob.view(1, 1), "version": torch.zeros(1, 1, dtype=torch.int64)}
        one.update(Batch(row, torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1), row, yes, ~yes, yes, extras))
        steps[rho] = float((one.policy.actor.bias.detach() - before)[1])
    assert steps[0.25] == pytest.approx(0.25 * steps[1.0], rel=1e-4)
    assert steps[8.0] == pytest.approx(steps[1.0], rel=1e-4)  # clipped at 1


def test_a_fresh_rollout_is_on_policy_and_without_lag() -> None:
    algorithm = build(epochs=1)
    envs = probes.vector(probes.Imitate)
    (batch,) = probes.batches(envs, algorithm, 1)
    assert int(batch.extras["version"].max()) == 0
    probes.batches(envs, algorithm, 1)
    twin = build(seed=9, epochs=1)
    twin.load_state_dict(algorithm.state_dict())
    (second,) = probes.batches(envs, twin, 1)
    measured = algorithm.update(second)  # the twin acted with the same weights
    assert measured["lag"] == 0.0
    assert measured["rho"] == pytest.approx(1.0, abs=1e-5)
    assert measured["rho_clipped"] <= 1.0
    assert measured["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    late = algorithm.update(second)
    assert late["lag"] == 1.0
    assert late["approx_kl"] > 0.0


class Delayed:
    """A learner whose actor takes its weights every fourth update only."""

    def __init__(self, learner: IMPALA) -> None:
        self.learner, self.rollout_steps = learner, learner.rollout_steps
        self.policy = build(seed=99).policy
        self.measured: list[dict[str, float]] = []

    def update(self, batch: Batch) -> dict[str, float]:
        self.measured.append(self.learner.update(batch))
        if len(self.measured) % 4 == 0:
            self.policy.load_state_dict(self.learner.policy.state_dict())
        return self.measured[-1]


def test_it_learns_from_an_actor_that_lags() -> None:
    learner = build(epochs=1)
    delayed = Delayed(learner)
    delayed.policy.load_state_dict(learner.policy.state_dict())
    probes.batches(probes.vector(probes.Imitate), delayed, 100)  # type: ignore[arg-type]  # not all of an Algorithm
    assert [row["lag"] for row in delayed.measured[:9]] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert all(row["approx_kl"] == pytest.approx(0.0, abs=1e-6) for row in delayed.measured[::4])
    assert max(row["approx_kl"] for row in delayed.measured[3::4]) > 1e-3
    assert choices(learner, -1.0, 1.0) == [0, 1]


def poisoned(batch: Batch) -> Batch:
    """The batch with one column's middle row invalid, and nonsense in it."""
    fields = {name: getattr(batch, name).clone() for name in Batch.__slots__[:7]}
    fields["valid"][5, 0] = False
    for name in ("reward", "observation", "next_observation"):
        fields[name][5, 0] = float("nan")
    extras = {name: extra.clone() for name, extra in batch.extras.items()}
    extras["log_prob"][5, 0] = -math.inf
    return Batch(**fields, extras=extras)


@pytest.mark.parametrize("switched", [{}, REPLAY], ids=["fresh", "replayed"])
def test_an_invalid_row_changes_nothing(switched: dict[str, Any]) -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(), 1)
    dirty = poisoned(batch)
    clean = dataclasses.replace(batch, valid=dirty.valid)
    one, two = build(seed=3, **switched), build(seed=3, **switched)
    for _ in range(3):
        first, second = one.update(dirty), two.update(clean)
        assert first == pytest.approx(second, nan_ok=True, abs=0.0, rel=0.0)
        assert all(math.isfinite(number) for name, number in first.items() if not name.startswith("replay"))
    assert same(one, two)
    assert one.env_steps == 3 * (8 * 16 - 1)


def test_a_batch_that_cannot_be_learnt_from_is_refused() -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(), 1)
    with pytest.raises(ValueError, match="no row"):
        build().update(dataclasses.replace(batch, valid=torch.zeros_like(batch.valid)))
    with pytest.raises(ValueError, match="log_prob"):
        build().update(dataclasses.replace(batch, extras={}))


# ------------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("priority", ["error", "differential"])
def test_replay_is_resumed_to_the_bit(priority: str, tmp_path: Path) -> None:
    memory = Memory(capacity=400, batch_size=4, min_size=100, prioritized=True)
    settings = {"replay_ratio": 3.0, "fresh_fraction": 0.25, "memory": memory, "priority": priority}
    envs = probes.vector(probes.Imitate)
    one = build(seed=1, **settings)
    probes.batches(envs, one, 6)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two = build(seed=77, **settings)
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for algorithm in (one, two):
        probes.batches(probes.vector(probes.Imitate), algorithm, 6, seed=5)
    assert same(one, two)
    assert one.updates == two.updates > 12
    assert torch.equal(one.generator.get_state(), two.generator.get_state())


def test_what_is_replayed_is_older_and_measured_apart() -> None:
    algorithm = build(**REPLAY)
    envs = probes.vector(probes.Imitate)
    batches = probes.batches(envs, algorithm, 10)
    measured = [algorithm.update(batches[-1]) for _ in range(3)]
    assert all(row.keys() == measured[0].keys() for row in measured)
    replayed = [row for row in measured if row["replays"] > 0]
    assert replayed
    assert all(row["replay_lag"] > 1.0 for row in replayed)
    assert all(math.isnan(row["replay_lag"]) for row in measured if row["replays"] == 0)


# ----------------------------------------------------------------------------------------------------------- settings


def test_schedules_follow_env_steps() -> None:
    algorithm = build(lr=Linear(1e-3, 0.0, 256), entropy_weight=Linear(0.1, 0.0, 256))
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(), 1)
    rows = [algorithm.update(batch) for _ in range(3)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 5e-4, 0.0])
    assert [row["entropy_weight"] for row in rows] == pytest.approx([0.1, 0.05, 0.0])


@pytest.mark.parametrize(
    ("wrong", "value"),
    [("gamma", 1.5), ("epochs", 0), ("rho_clip", 0.0), ("c_clip", 2.0), ("fresh_fraction", 1.0), ("priority", "x")],
)
def test_wrong_settings_are_named(wrong: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"impala\.{wrong}"):
        Config(**{wrong: value})
