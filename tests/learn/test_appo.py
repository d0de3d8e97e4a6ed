"""APPO: PPO where nothing lags, V-trace's gradient where something does, and a target that stays for a while."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from learn import probes

from longrein.errors import SpecError
from longrein.learn import algorithms
from longrein.learn.algorithms import appo, ppo
from longrein.learn.batch import Batch
from longrein.learn.recurrent import begins
from longrein.learn.returns import vtrace
from longrein.learn.torsos import Net

SETTINGS: dict[str, Any] = {"rollout_steps": 16, "minibatch_size": 32, "net": Net(hidden=(16,)), "epochs": 2}


def build(name: str, seed: int = 0, **settings: Any) -> Any:
    config_class, made = algorithms.load(name)
    probe = probes.Endless()
    return made(config_class(**SETTINGS | settings), probe.observation_space, probe.action_space, seed)


def batch_of(algorithm: Any, kind: Any = probes.Imitate) -> Batch:
    """What an algorithm acts out when it is new; it has learnt from it after that."""
    (batch,) = probes.batches(probes.vector(kind), algorithm, 1)
    return batch


def lagged(batch: Batch, seed: int = 1) -> Batch:
    """The same actions, of another policy's probabilities, and some invalid rows of NaN."""
    generator = torch.Generator().manual_seed(seed)
    log_prob = batch.extras["log_prob"] + torch.randn(batch.reward.shape, generator=generator)
    valid = torch.rand(batch.reward.shape, generator=generator) > 0.1
    reward = torch.where(valid, batch.reward, torch.nan)
    extras = {**batch.extras, "log_prob": torch.where(valid, log_prob, torch.nan)}
    return dataclasses.replace(batch, valid=valid, reward=reward, extras=extras)


@pytest.mark.parametrize("recurrent", ["none", "gru"])
@pytest.mark.parametrize("kind", [probes.Imitate, probes.Endless, probes.LaterReward])
def test_without_lag_it_is_ppo(kind: Any, recurrent: str) -> None:
    one, other, actor = (build(name, net=Net(hidden=(16,), recurrent=recurrent)) for name in ("ppo", "appo", "ppo"))
    batch = batch_of(actor, kind)
    left, right = one.update(batch), other.update(batch)
    assert right.pop("rho") == pytest.approx(1.0)
    assert right.pop("rho_clipped") == 0.0
    assert right == pytest.approx(left, abs=2e-4)
    for mine, his in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, his, atol=2e-4, rtol=1e-3)


def test_the_first_gradient_is_that_of_vtrace() -> None:
    settings = {"lambda_": 1.0, "normalise_advantage": False, "epochs": 1, "minibatch_size": 1000,
                "max_grad_norm": 1e9, "value_weight": 0.0}  # fmt: skip
    algorithm = build("appo", **settings)
    batch = lagged(batch_of(build("appo", seed=5, **settings), probes.LaterReward))
    policy = algorithm.policy
    inputs, _ = policy.split(batch.observation)
    numbers, _ = policy.net.evaluate(inputs.flatten(0, 1))
    log_prob = policy.distribution(numbers).log_prob(batch.action.flatten()).view_as(batch.reward)
    with torch.no_grad():
        value = policy.net.value(inputs.flatten(0, 1)).view_as(batch.reward)
        following = policy.net.value(policy.split(batch.next_observation)[0].flatten(0, 1)).view_as(batch.reward)
        log_ratio = torch.where(batch.valid, log_prob - batch.extras["log_prob"], 0.0)
        ends = batch.terminated, batch.truncated, batch.valid
        _, action_value = vtrace(batch.reward, *ends, value, following, log_ratio, gamma=algorithm.config.gamma)
        weight = log_ratio.exp().clamp(max=1.0) * (action_value - value)
    loss = -(weight * log_prob)[batch.valid].mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
                          if g is not None])  # fmt: skip
    algorithm.update(batch)
    found = algorithm.parameters.gradient
    torch.testing.assert_close(found[: len(expected)].norm(), expected.norm(), atol=1e-6, rtol=1e-4)
    assert sorted(found[found != 0].tolist()) == pytest.approx(sorted(expected[expected != 0].tolist()), abs=1e-6)
    assert begins(batch.done, batch.valid).any()


def test_the_target_stays_for_so_many_batches() -> None:
    algorithm = build("appo", target_every=3)
    batch = batch_of(build("appo"))
    targets = []
    for _ in range(4):
        algorithm.update(batch)
        targets.append(torch.cat([p.flatten() for p in algorithm.target.parameters()]))
    assert torch.equal(targets[0], targets[1])
    assert torch.equal(targets[0], targets[2])
    assert not torch.equal(targets[0], targets[3])
    assert not any(p.requires_grad for p in algorithm.target.parameters())


def test_ratios_are_measured() -> None:
    algorithm = build("appo", rho_clip=1.5)
    acted = batch_of(build("appo"))
    batch = lagged(acted)
    measured = algorithm.update(batch)
    rho = (acted.extras["log_prob"] - batch.extras["log_prob"])[batch.valid].exp()
    assert measured["rho"] == pytest.approx(float(rho.mean()), rel=1e-3)
    assert measured["rho_clipped"] == pytest.approx(float((rho > 1.501).float().mean()), abs=0.02)
    assert all(torch.isfinite(p).all() for p in algorithm.policy.parameters())


@pytest.mark.parametrize(("setting", "value"), [("target_every", 0), ("rho_clip", 0.0), ("c_clip", 2.0), ("gamma", 2)])
def test_settings_that_make_no_sense_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"appo\.{setting}"):
        appo.Config(**{setting: value})


def test_it_has_every_setting_of_ppo() -> None:
    own = {field.name for field in dataclasses.fields(appo.Config)} - {f.name for f in dataclasses.fields(ppo.Config)}
    assert own == {"target_every", "rho_clip", "c_clip"}
