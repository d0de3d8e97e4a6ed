"""ACER: its directions against autograd and expectations, its trust region against KKT, its probes, replay, resume."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, MultiDiscrete
from hypothesis import given, settings
from hypothesis import strategies as st
from learn import probes
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.algorithms.acer import ACER, Config
from longrein.learn.algorithms.acer_policies import Continuous, Correction
from longrein.learn.batch import Batch
from longrein.learn.distributions import DiagonalGaussian
from longrein.learn.replay import Memory
from longrein.learn.returns import retrace
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

FAST: dict[str, Any] = {
    "rollout_steps": 16, "lr": 1e-2, "optimizer": "adam", "net": Net(hidden=(16,)), "gamma": 0.8,
    "replay_ratio": 2.0, "memory": Memory(capacity=2_000, batch_size=8, min_size=100),
}  # fmt: skip
seeds = st.integers(0, 10**6)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(make: type[probes.Probe] = probes.Imitate, seed: int = 0, **changed: Any) -> ACER:
    return ACER(Config(**FAST | changed), make.observation_space, make.action_space, seed)


def trained(make: type[probes.Probe], updates: int = 50, **changed: Any) -> ACER:
    algorithm = build(make, **changed)
    probes.batches(probes.vector(make), algorithm, updates)
    return algorithm


def values(algorithm: ACER, *observations: float) -> list[float]:
    with torch.no_grad():
        return algorithm.policy.value(torch.tensor(observations).unsqueeze(1)).tolist()  # type: ignore[no-any-return]


def choices(algorithm: ACER, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    action, _ = algorithm.policy.act(rows, deterministic=True)
    return algorithm.policy.for_env(action).reshape(-1).tolist()  # type: ignore[no-any-return]


def weights(algorithm: ACER) -> list[Tensor]:
    state = algorithm.state_dict()
    return [tensor.clone() for part in ("policy", "average") for tensor in state[part].values()]


def same(one: ACER, other: ACER) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# ------------------------------------------------------------------------------------------------------- trust region


@settings(max_examples=50, deadline=None)
@given(seeds, st.sampled_from([0.0, 0.1, 1.0, 5.0]))
def test_the_direction_fulfils_its_conditions(seed: int, delta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    g, k = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64) * 2
    z, bent = losses.trust_region(g, k, delta)
    growth = (k * z).sum(-1)
    assert (growth <= delta + 1e-9).all()
    assert torch.equal(z[~bent], g[~bent])
    torch.testing.assert_close(growth[bent], torch.full_like(growth[bent], delta))
    # z - g = -u k with u >= 0: the one way in which the nearest point of a half-space can lie.
    pull = ((g - z) * k).sum(-1) / k.square().sum(-1)
    assert (pull >= 0).all()
    torch.testing.assert_close(g - z, pull.unsqueeze(-1) * k)
    # No feasible point is nearer.
    other = torch.randn(200, 3, generator=generator, dtype=torch.float64) * 2
    other = other - ((k * other).sum(-1) - delta).clamp(min=0).unsqueeze(-1) * k / k.square().sum(-1, keepdim=True)
    assert ((z - g).norm(dim=-1) <= (other - g).norm(dim=-1) + 1e-9).all()


def test_the_trust_region_by_hand() -> None:
    # g = (3, 1), k = (1, 0): k.g = 3, delta 1 takes (3 - 1) / 1 off along k. With delta 3 nothing.
    g, k = torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert losses.trust_region(g, k, 1.0)[0].tolist() == [[1.0, 1.0]]
    assert losses.trust_region(g, k, 3.0)[0].tolist() == [[3.0, 1.0]]
    for delta in (0.0, 1.0, math.inf):
        z, bent = losses.trust_region(g, torch.zeros(1, 2), delta)
        assert z.tolist() == g.tolist()
        assert not bent.any()
    assert torch.equal(losses.trust_region(g, k, math.inf)[0], g)


# ---------------------------------------------------------------------------------------------------------- directions


def discrete_case(seed: int, states: int = 7, actions: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits, mu, q = torch.randn(3, states, actions, generator=generator, dtype=torch.float64) * 2
    log_pi = logits.log_softmax(-1)
    return {
        "logits": logits,
        "log_pi": log_pi,
        "log_mu": mu.log_softmax(-1),
        "q": q,
        "value": (log_pi.exp() * q).sum(-1),
        "action": torch.randint(actions, (states,), generator=generator),
        "target": torch.randn(states, generator=generator, dtype=torch.float64),
    }


def ascent(case: dict[str, Tensor], truncation: float, **changed: Tensor) -> Tensor:
    case = case | changed
    return losses.categorical_ascent(
        case["log_pi"], case["log_mu"], case["action"], case["q"], case["target"], case["value"], truncation=truncation
    )


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([0.5, 1.0, 10.0, math.inf]))
def test_the_direction_is_equation_nine_by_autograd(seed: int, truncation: float) -> None:
    case = discrete_case(seed)
    logits = case["logits"].requires_grad_()
    log_pi = logits.log_softmax(-1)
    rho = (case["log_pi"] - case["log_mu"]).exp()
    chosen = (torch.arange(7), case["action"])
    surrogate = rho[chosen].clamp(max=truncation) * (case["target"] - case["value"]) * log_pi[chosen]
    for choice in range(4):
        correction = (1 - truncation / rho[:, choice]).clamp(min=0.0)
        advantage = case["q"][:, choice] - case["value"]
        surrogate = surrogate + case["log_pi"].exp()[:, choice] * correction * advantage * log_pi[:, choice]
    (expected,) = torch.autograd.grad(surrogate.sum(), logits)
    torch.testing.assert_close(ascent(case, truncation), expected)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_without_truncation_it_is_the_weighted_policy_gradient(seed: int) -> None:
    case = discrete_case(seed)
    logits = case["logits"].requires_grad_()
    chosen = (torch.arange(7), case["action"])
    rho = (case["log_pi"] - case["log_mu"])[chosen].exp()
    (expected,) = torch.autograd.grad(
        (rho * (case["target"] - case["value"]) * logits.log_softmax(-1)[chosen]).sum(), logits
    )
    torch.testing.assert_close(ascent(case, math.inf), expected)


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([1.0, 10.0]))
def test_on_policy_there_is_no_correction(seed: int, truncation: float) -> None:
    case = discrete_case(seed)
    on_policy = ascent(case, truncation, log_mu=case["log_pi"])
    torch.testing.assert_close(on_policy, ascent(case, math.inf, log_mu=case["log_pi"]))
    # And no Q has a part in it.
    torch.testing.assert_close(on_policy, ascent(case, truncation, log_mu=case["log_pi"], q=case["q"] * 0 + 1e6))


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([0.1, 1.0, 3.0, math.inf]))
def test_on_average_over_mu_it_is_the_policy_gradient(seed: int, truncation: float) -> None:
    # sum_a mu(a) ascent(a), with Q(s, a) for the target, is sum_a pi(a) (Q(s, a) - V) grad log pi(a): unbiased.
    case = discrete_case(seed)
    total = torch.zeros_like(case["q"])
    for choice in range(4):
        action = torch.full_like(case["action"], choice)
        one = ascent(case, truncation, action=action, target=case["q"][:, choice])
        total += case["log_mu"].exp()[:, choice : choice + 1] * one
    logits = case["logits"].requires_grad_()
    (expected,) = torch.autograd.grad((logits.softmax(-1) * case["q"]).sum(), logits)
    torch.testing.assert_close(total, expected)


def test_the_direction_by_hand() -> None:
    # pi = (1/2, 1/2), mu = (1/4, 3/4), rho = (2, 2/3), Q = (3, 1), V = 2, c = 1; action 0, target 4.
    # First term: min(1, 2) (4 - 2) ((1, 0) - (1/2, 1/2)) = (1, -1).
    # Correction, action 0 alone: 1/2 (1 - 1/2) (3 - 2) ((1, 0) - (1/2, 1/2)) = (1/8, -1/8).
    log = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    direction = losses.categorical_ascent(
        log[:1], log[1:], torch.tensor([0]), torch.tensor([[3.0, 1.0]]), torch.tensor([4.0]), torch.tensor([2.0]),
        truncation=1.0,
    )  # fmt: skip
    assert direction.flatten().tolist() == pytest.approx([1.125, -1.125])


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_gradients_in_closed_form_are_those_of_autograd(seed: int) -> None:
    case = discrete_case(seed)
    logits = case["logits"].requires_grad_()
    log_pi = logits.log_softmax(-1)
    (expected,) = torch.autograd.grad(-(log_pi.exp() * log_pi).sum(), logits)
    torch.testing.assert_close(losses.categorical_entropy_ascent(case["log_pi"].detach()), expected)
    generator = torch.Generator().manual_seed(seed)
    mean, log_std, old_mean, old_log_std, action = torch.randn(5, 6, 3, generator=generator, dtype=torch.float64)
    parameters = torch.cat([mean, log_std], -1).requires_grad_()
    new = DiagonalGaussian(*parameters.chunk(2, -1))
    (score,) = torch.autograd.grad(new.log_prob(action).sum(), parameters)
    torch.testing.assert_close(losses.gaussian_score(mean, log_std, action), score)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(old_mean, old_log_std.exp()), normal(new.mean, new.log_std.exp()))
    torch.testing.assert_close(losses.gaussian_kl(old_mean, old_log_std, mean, log_std), kl.sum(-1).detach())
    (slope,) = torch.autograd.grad(kl.sum(), parameters)
    torch.testing.assert_close(losses.gaussian_kl_ascent(mean, log_std, old_mean, old_log_std), slope)


@pytest.mark.parametrize("truncation", [0.5, 2.0, math.inf])
def test_on_average_the_gaussian_direction_is_the_policy_gradient(truncation: float) -> None:
    # Q(a) = -(a - 1)^2, pi = N(0, 1): E Q = -(m - 1)^2 - s^2, so dE/dm = -2 (0 - 1) = 2 and dE/dlog s = -2.
    generator = torch.Generator().manual_seed(0)
    count = 400_000
    zero = torch.zeros(count, 1, dtype=torch.float64)
    pi, mu = DiagonalGaussian(zero, zero), DiagonalGaussian(zero + 0.5, zero + 0.3)
    action, drawn = mu.sample(generator), pi.sample(generator)
    value = -2.0
    direction = losses.gaussian_ascent(
        pi.mean, pi.log_std, action, pi.log_prob(action) - mu.log_prob(action), -(action[:, 0] - 1) ** 2 - value,
        drawn, pi.log_prob(drawn) - mu.log_prob(drawn), -(drawn[:, 0] - 1) ** 2 - value, truncation=truncation,
    )  # fmt: skip
    assert direction.mean(0).tolist() == pytest.approx([2.0, -2.0], abs=0.05)


# ---------------------------------------------------------------------------------------------------------- the update


def shuffled(batch: Batch, seed: int) -> Batch:
    """The batch with ends of all kinds, invalid rows, and another behaviour policy."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(3, *batch.reward.shape, generator=generator)
    fields = {name: getattr(batch, name).clone() for name in Batch.__slots__[:4]}
    fields["next_observation"][:-1] = fields["observation"][1:]  # as it is where the new flags let an episode go on
    extras = dict(batch.extras)
    if "log_probs" in extras:
        noise = torch.randn(extras["log_probs"].shape, generator=generator)
        extras["log_probs"] = (extras["log_probs"] + noise).log_softmax(-1)
    else:
        extras["mean"] = extras["mean"] + 0.2 * torch.randn(extras["mean"].shape, generator=generator)
    fields |= {"terminated": draw[0] < 0.1, "truncated": draw[1] < 0.1, "valid": draw[2] > 0.1}
    return Batch(**fields, extras=extras)


def plain_case(make: type[probes.Probe], **changed: Any) -> tuple[ACER, Batch]:
    """A learner by plain gradient descent, without replay, and an off-policy batch."""
    (batch,) = probes.batches(probes.vector(make), build(make, seed=5), 1)
    plain = {"optimizer": "sgd", "lr": 1.0, "max_grad_norm": 1e9, "replay_ratio": 0.0, "entropy_weight": 0.0}
    return build(make, seed=1, **plain | changed), shuffled(batch, 3)


def loss_of_retrace(algorithm: ACER, batch: Batch) -> Tensor:
    """The plain off-policy loss, written out: Retrace for Q, and rho times the policy gradient for pi."""
    policy, shape = algorithm.policy, batch.reward.shape
    logits, features = policy.both(batch.observation.flatten(0, 1))
    log_pi, q = logits.log_softmax(-1).view(*shape, -1), policy.critic(features).view(*shape, -1)
    value = (log_pi.exp() * q).sum(-1).detach()
    next_value = policy.value(batch.next_observation.flatten(0, 1)).view(shape).detach()
    action = batch.action.unsqueeze(-1)
    q_taken, log_taken = q.gather(-1, action).squeeze(-1), log_pi.gather(-1, action).squeeze(-1)
    rho = (log_taken - batch.extras["log_probs"].gather(-1, action).squeeze(-1)).exp().detach()
    target = retrace(
        batch.reward, batch.terminated, batch.truncated, batch.valid, q_taken.detach(), next_value,
        rho.clamp(max=1.0), gamma=algorithm.config.gamma,
    )  # fmt: skip
    rows = -rho * (target - value) * log_taken + 0.5 * 0.5 * (target - q_taken) ** 2
    return rows[batch.valid].mean()


def assert_step(algorithm: ACER, batch: Batch, loss: Tensor) -> None:
    """One update moves the weights by minus the gradient of `loss`."""
    parameters = [p for p in algorithm.policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    algorithm.update(batch)
    for start, gradient, now in zip(before, gradients, parameters, strict=True):
        torch.testing.assert_close(now.detach(), start - gradient, atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_without_clips_the_step_is_the_plain_retrace_policy_gradient(shared: bool) -> None:
    algorithm, batch = plain_case(probes.Imitate, truncation=math.inf, trust_region=None, shared=shared)
    assert_step(algorithm, batch, loss_of_retrace(algorithm, batch))


def test_the_penalty_of_drlbox_is_the_gradient_of_the_kl() -> None:
    algorithm, batch = plain_case(probes.Imitate, truncation=math.inf, trust_region=None, kl_weight=0.3)
    drifted(algorithm)
    observation = batch.observation.flatten(0, 1)
    log_average = algorithm.average.statistics(observation).log_softmax(-1).detach()
    kl = (log_average.exp() * (log_average - algorithm.policy.statistics(observation).log_softmax(-1))).sum(-1)
    loss = loss_of_retrace(algorithm, batch) + 0.3 * kl.view_as(batch.reward)[batch.valid].mean()
    assert_step(algorithm, batch, loss)


def correction(**changed: Any) -> Correction:
    return Correction(**{
        "gamma": 0.8, "lambda_": 1.0, "truncation": 5.0, "delta": math.inf, "kl_weight": 0.0, "entropy_weight": 0.0,
    } | changed)  # fmt: skip


def drifted(algorithm: ACER) -> ACER:
    """The same, with an average policy that is another one than the policy."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in algorithm.average.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return algorithm


def test_the_trust_region_is_that_of_each_state_not_of_the_mean() -> None:
    # If delta were applied to a mean over N rows, each of 64 equal columns could go 64 times as far as one alone.
    algorithm, batch = plain_case(probes.Imitate)
    drifted(algorithm)

    def directions(columns: list[int], delta: float) -> Tensor:
        fields = {name: getattr(batch, name)[:, columns] for name in Batch.__slots__[:7]}
        part = Batch(**fields, extras={name: extra[:, columns] for name, extra in batch.extras.items()})
        bound = correction(delta=delta)
        terms = algorithm.policy.terms(part, part.reward, algorithm.average, bound, algorithm.generator)
        return terms.steepness  # type: ignore[no-any-return]  # of Terms

    alone = directions([0], 0.01)
    assert not torch.equal(alone, directions([0], math.inf))
    torch.testing.assert_close(directions([0] * 64, 0.01), alone.expand(-1, 64))


def test_the_average_policy_follows_slowly() -> None:
    algorithm, batch = plain_case(probes.Imitate, average_decay=0.9)
    before = [p.clone() for p in algorithm.average.parameters()]
    algorithm.update(batch)
    now = zip(before, algorithm.policy.parameters(), algorithm.average.parameters(), strict=True)
    for old, policy, average in now:
        torch.testing.assert_close(average, 0.9 * old + 0.1 * policy.detach())


@pytest.mark.parametrize("make", [probes.Imitate, probes.Aim])
def test_the_measured_share_of_bent_directions_falls_with_the_region(make: type[probes.Probe]) -> None:
    shares = {}
    for delta in (0.0, 0.1, 1e6):
        algorithm, batch = plain_case(make, trust_region=delta)
        shares[delta] = drifted(algorithm).update(batch)["bent"]
    assert shares[0.0] > shares[0.1] > shares[1e6] == 0.0


# ---------------------------------------------------------------------------------------------------------- continuous


def test_the_critic_of_a_box_averages_to_the_value() -> None:
    # mean_i Q~(s, u_i) = V(s) + mean_i A(s, u_i) - mean_i A(s, u_i) = V(s), whatever A is.
    algorithm, batch = plain_case(probes.Aim)
    policy = algorithm.policy
    assert isinstance(policy, Continuous)
    observation = batch.observation.flatten(0, 1)
    mean, features = policy.both(observation)
    drawn = mean + torch.randn(5, *mean.shape, generator=torch.Generator().manual_seed(0))
    value = policy.value(observation)
    q = policy.action_values(features, value, drawn, drawn)
    torch.testing.assert_close(q.mean(0), value)
    assert q.std(0).min() > 0


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_the_step_of_a_box_is_that_of_the_paper(learn_sigma: bool) -> None:
    """Algorithm 3, written out for every row, with the draws that the update will make."""
    algorithm, batch = plain_case(probes.Aim, trust_region=None, truncation=1.2, learn_sigma=learn_sigma)
    policy, config = algorithm.policy, algorithm.config
    noise = torch.Generator().set_state(algorithm.generator.get_state())
    valid = batch.valid
    shape, observation = batch.reward.shape, batch.observation.flatten(0, 1)
    mean, features = policy.both(observation)
    log_std = policy.log_std
    drawn = (mean + log_std.exp() * torch.empty(6, *mean.shape).normal_(generator=noise)).detach()
    value = policy.critic(features).squeeze(-1)

    def advantage(action: Tensor) -> Tensor:
        return policy.advantage(torch.cat([features, action], -1)).squeeze(-1)  # type: ignore[no-any-return]

    around = torch.stack([advantage(u) for u in drawn[:5]]).mean(0)
    action = batch.action.flatten(0, 1)
    q, q_drawn = (value + advantage(a) - around for a in (action, drawn[5]))
    mu = torch.distributions.Normal(batch.extras["mean"].flatten(0, 1), batch.extras["log_std"].flatten(0, 1).exp())
    pi = torch.distributions.Normal(mean, log_std.exp())
    rho, rho_drawn = ((pi.log_prob(a) - mu.log_prob(a)).sum(-1).exp().detach() for a in (action, drawn[5]))
    next_value = policy.value(batch.next_observation.flatten(0, 1)).view(shape).detach()
    past = (batch.reward, batch.terminated, batch.truncated, valid, q.view(shape).detach(), next_value)
    q_ret = retrace(*past, rho.clamp(max=1.0).view(shape), gamma=config.gamma).flatten()
    q_opc = retrace(*past, torch.ones(shape), gamma=config.gamma).flatten()
    rows = -rho.clamp(max=1.2) * (q_opc - value.detach()) * pi.log_prob(action).sum(-1)
    beyond = (1 - 1.2 / rho_drawn).clamp(min=0.0) * (q_drawn - value).detach()
    rows = rows - beyond * pi.log_prob(drawn[5]).sum(-1)
    error = (q_ret - q).detach()
    critic = -error * q - rho.clamp(max=1.0) * error * value
    assert_step(algorithm, batch, (rows + config.q_weight * critic)[valid.flatten()].mean())


def test_actions_are_in_units_of_the_box() -> None:
    space = Box(np.array([[-2.0, 0.0]], np.float32), np.array([[2.0, 10.0]], np.float32))
    policy = ACER(Config(**FAST), probes.Aim.observation_space, space, 0).policy
    sent = policy.for_env(np.array([[-1.0, -1.0], [0.5, 1.0], [3.0, -9.0]], np.float32))
    assert sent.tolist() == [[[-2.0, 0.0]], [[1.0, 10.0]], [[2.0, 0.0]]]
    free = Box(-np.inf, np.inf, (1,))
    policy = ACER(Config(**FAST), probes.Aim.observation_space, free, 0).policy
    assert policy.for_env(np.array([[5.0]], np.float32)).tolist() == [[5.0]]


# -------------------------------------------------------------------------------------------------------------- probes


def test_probe_constant_reward() -> None:
    assert values(trained(probes.OneReward), 0.0) == pytest.approx([1.0], abs=0.05)


def test_probe_reward_of_the_observation() -> None:
    assert values(trained(probes.RewardOfObservation), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)


def test_probe_discount_over_two_steps() -> None:
    assert values(trained(probes.LaterReward), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


def test_probe_reward_of_the_action() -> None:
    assert choices(trained(probes.RewardOfAction), 0.0) == [1]


@pytest.mark.parametrize("changed", [{}, {"shared": True}, {"replay_ratio": 0.0, "lr": 2e-2}], ids=str)
def test_probe_action_by_the_observation(changed: dict[str, Any]) -> None:
    assert choices(trained(probes.Imitate, **changed), -1.0, 1.0) == [0, 1]


@pytest.mark.parametrize("changed", [{}, {"learn_sigma": True}], ids=str)
def test_probe_continuous_action(changed: dict[str, Any]) -> None:
    assert choices(trained(probes.Aim, 100, **changed), 0.0) == pytest.approx([0.5], abs=0.15)


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(probes.Endless, 80), 0.0) == pytest.approx([5.0], abs=0.25)


# ---------------------------------------------------------------------------------------------------- rows and resume


def poisoned(batch: Batch) -> Batch:
    """The batch with one column's middle row invalid, and nonsense in it."""
    fields = {name: getattr(batch, name).clone() for name in Batch.__slots__[:7]}
    fields["valid"][5, 0] = False
    for name in ("reward", "observation", "next_observation"):
        fields[name][5, 0] = float("nan")
    extras = {name: extra.clone() for name, extra in batch.extras.items()}
    for name in extras.keys() - {"version"}:
        extras[name][5, 0] = -math.inf
    return Batch(**fields, extras=extras)


@pytest.mark.parametrize("make", [probes.Imitate, probes.Aim])
def test_an_invalid_row_changes_nothing(make: type[probes.Probe]) -> None:
    (batch,) = probes.batches(probes.vector(make), build(make), 1)
    dirty = poisoned(batch)
    clean = dataclasses.replace(batch, valid=dirty.valid)
    one, two = build(make, seed=3), build(make, seed=3)
    for _ in range(3):
        first, second = one.update(dirty), two.update(clean)
        assert first == pytest.approx(second, nan_ok=True, abs=0.0, rel=0.0)
        assert all(math.isfinite(number) for name, number in first.items() if not name.startswith("replay"))
    assert same(one, two)
    assert one.env_steps == 3 * (8 * 16 - 1)


@pytest.mark.parametrize("make", [probes.Imitate, probes.Aim])
@pytest.mark.parametrize("prioritized", [False, True])
def test_it_resumes_to_the_bit_with_its_memory(make: type[probes.Probe], prioritized: bool, tmp_path: Path) -> None:
    memory = Memory(capacity=400, batch_size=4, min_size=100, prioritized=prioritized)
    changed = {"fresh_fraction": 0.25, "memory": memory, "priority": "differential"}
    one = build(make, seed=1, **changed)
    probes.batches(probes.vector(make), one, 6)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two = build(make, seed=77, **changed)
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for algorithm in (one, two):
        probes.batches(probes.vector(make), algorithm, 6, seed=5)
    assert same(one, two)
    assert one.updates == two.updates > 12
    assert torch.equal(one.generator.get_state(), two.generator.get_state())


# ------------------------------------------------------------------------------------------------------------- workers


@pytest.mark.parametrize("make", [probes.Imitate, probes.Aim])
def test_workers_share_all_but_memory_and_draws(make: type[probes.Probe]) -> None:
    one = build(make, seed=1)
    two = one.worker(seed=2)
    probes.batches(probes.vector(make), one, 6)
    assert one.updates == two.updates > 6
    assert one.env_steps == two.env_steps == 6 * 8 * 16
    assert one.replay is not None
    assert two.replay is not None
    assert one.replay.ready
    assert not two.replay.ready
    two.refresh()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(two), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.average.parameters(), two.average.parameters(), strict=True))
    assert all(tensor.is_shared() for tensor in (*one.shared.statistics.values(), one.shared.more["average"]))
    # The other's step moves what both look at, average and statistics too.
    before = [tensor.clone() for tensor in (one.shared.more["average"], *one.shared.statistics.values())]
    probes.batches(probes.vector(make), two, 1)
    assert not any(map(torch.equal, before, (one.shared.more["average"], *one.shared.statistics.values())))
    assert set(two.lags) == {0}


def weights_of(algorithm: ACER) -> list[Tensor]:
    return [p.detach().clone() for p in algorithm.policy.parameters()]


def test_a_replay_begins_with_what_others_have_written() -> None:
    # Each step is computed with a copy made after the one before it: only what others write in between is lag.
    one = build(probes.Imitate, seed=1)
    two = one.worker()
    probes.batches(probes.vector(probes.Imitate), one, 6)
    made = one.updates
    two.refresh()
    one.refresh()
    probes.batches(probes.vector(probes.Imitate), one, 1)
    wrote = one.updates - made
    assert one.lags == [0] * wrote
    probes.batches(probes.vector(probes.Imitate), two, 1)
    assert two.lags == [wrote, *[0] * (len(two.lags) - 1)]


def test_a_worker_goes_on_with_what_it_alone_had() -> None:
    one = build(probes.Imitate, seed=1)
    two = one.worker(seed=2)
    probes.batches(probes.vector(probes.Imitate), two, 6)
    there = one.worker(seed=9, place=1)
    there.load_own_state(two.own_state())
    assert there.replay is not None
    assert there.replay.ready
    assert torch.equal(there.generator.get_state(), two.generator.get_state())
    assert there.policy.version == two.policy.version == 6
    with pytest.raises(SpecError, match="nadam"):
        build(probes.Imitate, optimizer="nadam").worker()


def test_workers_in_threads_learn_together() -> None:
    first = build(probes.Imitate, seed=1)
    workers = [first, first.worker(seed=2)]
    probes.train_in_threads(workers, 40)
    first.refresh()
    assert choices(first, -1.0, 1.0) == [0, 1]
    assert first.env_steps == 2 * 40 * 4 * 16


def test_a_batch_that_cannot_be_learnt_from_is_refused() -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(), 1)
    with pytest.raises(ValueError, match="no row"):
        build().update(dataclasses.replace(batch, valid=torch.zeros_like(batch.valid)))
    with pytest.raises(ValueError, match="distribution"):
        build().update(dataclasses.replace(batch, extras={}))


def test_names_of_what_is_measured_do_not_change() -> None:
    algorithm = build()
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(), 1)
    rows = [algorithm.update(batch) for _ in range(4)]
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert any(row["replays"] > 0 for row in rows)


def test_schedules_follow_env_steps() -> None:
    algorithm = build(lr=Linear(1e-3, 0.0, 256))
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(), 1)
    assert [algorithm.update(batch)["lr"] for _ in range(3)] == pytest.approx([1e-3, 5e-4, 0.0])


@pytest.mark.parametrize(
    ("wrong", "value"),
    [("gamma", 1.5), ("truncation", 0.0), ("trust_region", -1.0), ("samples", 0), ("sigma", 0.0), ("priority", "x")],
)
def test_wrong_settings_are_named(wrong: str, value: Any) -> None:
    with pytest.raises(SpecError, match=rf"acer\.{wrong}"):
        Config(**{wrong: value})


@pytest.mark.parametrize("space", [MultiDiscrete([2, 3]), Box(0, 5, (2,), np.int64)], ids=str)
def test_other_spaces_are_refused(space: gymnasium.Space[Any]) -> None:
    with pytest.raises(SpecError, match="action_space"):
        ACER(Config(), probes.Imitate.observation_space, space, 0)
