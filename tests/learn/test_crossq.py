"""CrossQ against its equations, on probe environments, and under the rules of replay."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from learn import probes, synthetic

from longrein.errors import SpecError
from longrein.learn.algorithms.crossq import METRICS, Config, CrossQ, build
from longrein.learn.replay import Memory, Sample
from longrein.learn.torsos import Net

SEEN, BOX = Box(-1, 1, (3,)), Box(-2.0, 2.0, (2,))
SMALL = Net(hidden=(16,), activation="relu")
MEMORY = Memory(capacity=2_000, batch_size=32, min_size=32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def crossq(seed: int = 0, **settings: Any) -> CrossQ:
    usual: dict[str, Any] = {
        "net": SMALL, "critic_hidden": (24,), "memory": MEMORY, "rollout_steps": 8, "warmup_steps": 0,
    }  # fmt: skip
    return build(Config(**usual | settings), SEEN, BOX, seed)


def sample(algorithm: CrossQ) -> Sample:
    algorithm.replay.add(synthetic.batch(16, 4, actions=2))
    return algorithm.replay.sample(32, torch.Generator().manual_seed(5))


def statistics(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.named_buffers() if name.endswith(("mean", "deviation"))}


# ----------------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("paid", [0.3, 0.0], ids=["entropy counts", "and does not"])
def test_the_critics_learn_from_both_ends_in_one_batch(paid: float) -> None:
    algorithm = crossq(initial_alpha=0.3, backup_entropy=paid > 0)
    drawn = sample(algorithm)
    twin = copy.deepcopy(algorithm.critics)
    generator = torch.Generator()
    generator.set_state(algorithm.generator.get_state())
    action, log_prob = algorithm.policy.distribution(drawn.next_observation).rsample(generator)
    # The statistics are those of the 64 rows together: two passes of 32 would give others.
    seen = torch.cat([drawn.observation, drawn.next_observation])
    both = twin(seen, torch.cat([drawn.action, action]), train=True).squeeze(-1)
    y = (drawn.reward + drawn.discount * (both[:, 32:].min(0).values - paid * log_prob)).detach()
    wanted = (0.5 * (both[0, :32] - y) ** 2).mean() + (0.5 * (both[1, :32] - y) ** 2).mean()
    gradients = torch.autograd.grad(wanted, list(twin.parameters()))
    loss, _ = algorithm._learn_critics(drawn, algorithm.alpha)
    torch.testing.assert_close(loss, wanted.detach())
    for parameter, gradient in zip(algorithm.critics.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(torch.equal(value, statistics(twin)[name]) for name, value in statistics(algorithm.critics).items())
    assert 0 < int((drawn.discount == 0).sum()) < 32


def test_the_critics_step_leaves_the_policy_and_its_statistics_alone() -> None:
    algorithm = crossq()
    drawn = sample(algorithm)
    before = copy.deepcopy(algorithm.policy.state_dict())
    algorithm._learn_critics(drawn, algorithm.alpha)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.policy.state_dict().items())
    assert all(parameter.grad is None for parameter in algorithm.policy.parameters())


def test_the_policy_step_leaves_the_critics_and_their_statistics_alone() -> None:
    algorithm = crossq()
    drawn = sample(algorithm)
    before, policy = copy.deepcopy(algorithm.critics.state_dict()), statistics(algorithm.policy)
    algorithm._learn_policy(drawn.observation, algorithm.alpha)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.critics.state_dict().items())
    assert all(parameter.grad is None for parameter in algorithm.critics.parameters())
    assert all(not torch.equal(value, policy[name]) for name, value in statistics(algorithm.policy).items())


def test_the_policy_gradient_is_that_of_the_equation() -> None:
    algorithm = crossq(alpha=0.3)
    drawn = sample(algorithm)
    generator = torch.Generator()
    generator.set_state(algorithm.generator.get_state())
    policy = copy.deepcopy(algorithm.policy)
    action, log_prob = policy.distribution(drawn.observation, train=True).rsample(generator)
    wanted = (0.3 * log_prob - algorithm.critics(drawn.observation, action).squeeze(-1).min(0).values).mean()
    gradients = torch.autograd.grad(wanted, list(policy.parameters()))
    torch.testing.assert_close(algorithm._learn_policy(drawn.observation, algorithm.alpha)[0], wanted.detach())
    for parameter, gradient in zip(algorithm.policy.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_policy_and_temperature_wait_for_their_turn() -> None:
    algorithm = crossq()
    sample(algorithm)
    before = copy.deepcopy(algorithm.policy.state_dict())
    measured = [algorithm._step() for _ in range(2)]
    assert all(torch.equal(value, before[name]) for name, value in algorithm.policy.state_dict().items())
    assert algorithm.log_alpha.item() == 0.0
    measured.append(algorithm._step())
    assert [math.isnan(float(row[METRICS.index("policy_loss")])) for row in measured] == [True, True, False]
    assert algorithm.log_alpha.item() != 0.0
    assert algorithm.policy_optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert algorithm.policy_optimizer.param_groups[1]["betas"] == (0.9, 0.999)


# ----------------------------------------------------------------------------------------------------- acting, counting


def test_acting_is_row_by_row_and_learns_no_statistics() -> None:
    algorithm = crossq()
    algorithm.update(synthetic.batch(24, 4, actions=2))
    before = statistics(algorithm.policy)
    rows = synthetic.batch(1, 16, actions=2, seed=3).observation[0].numpy()
    together, extras = algorithm.policy.act(rows, deterministic=True)
    assert extras == {}
    np.testing.assert_allclose(together[:1], algorithm.policy.act(rows[:1], deterministic=True)[0], atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in statistics(algorithm.policy).items())
    np.testing.assert_array_equal(algorithm.policy.for_env(np.array([[-1.0, 0.5]], np.float32)), [[-2.0, 1.0]])


def test_warming_up_is_uniform_and_ends_by_env_steps() -> None:
    algorithm = crossq(warmup_steps=64)
    action = algorithm.policy.act(np.zeros((4_000, 3), np.float32), generator=torch.Generator().manual_seed(0))[0]
    assert float(action.var()) == pytest.approx(1 / 3, abs=0.02)
    warming = []
    for seed in range(2):
        algorithm.update(synthetic.batch(8, 4, actions=2, seed=seed))
        warming.append(bool(algorithm.policy.warming))
    assert warming == [True, False]


def test_gradient_steps_follow_env_steps_whatever_the_batches() -> None:
    made = []
    for steps, envs in ((96, 1), (12, 8), (32, 3)):
        algorithm = crossq(updates_per_step=0.3)
        rows = synthetic.batch(96 // envs, envs, actions=2)
        for start in range(0, 96 // envs, steps):
            fields = {name: getattr(rows, name)[start : start + steps] for name in rows.__slots__[:7]}
            algorithm.update(type(rows)(**fields))
        made.append(algorithm.updates)
    assert made == [int(0.3 * (96 - 32))] * 3


def test_nothing_is_learnt_before_there_is_enough() -> None:
    algorithm = crossq(memory=Memory(capacity=1_000, batch_size=8, min_size=100))
    metrics = algorithm.update(synthetic.batch(8, 4, actions=2))
    assert all(math.isnan(metrics[name]) for name in METRICS)
    after = algorithm.update(synthetic.batch(32, 4, actions=2))
    assert after.keys() == metrics.keys()
    assert not any(math.isnan(value) for value in after.values())


@pytest.mark.parametrize("memory", [{}, {"prioritized": True, "n_steps": 3}], ids=["plain", "prioritized 3-step"])
def test_invalid_rows_change_nothing(memory: dict[str, Any]) -> None:
    settings = {"memory": dataclasses.replace(MEMORY, **memory)}
    one, two = crossq(**settings), crossq(**settings)
    clean = synthetic.batch(24, 4, actions=2, valid=0.7)
    assert one.update(clean) == two.update(synthetic.nonsense(clean))
    assert one.updates > 0
    for name, value in one.policy.state_dict().items():
        assert torch.equal(value, two.policy.state_dict()[name])


def test_a_batch_without_a_valid_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        crossq().update(synthetic.batch(4, 2, actions=2, valid=0.0))


def test_wrong_settings_are_named() -> None:
    for settings, name in (
        ({"gamma": 1.5}, "crossq.gamma"),
        ({"policy_delay": 0}, "crossq.policy_delay"),
        ({"renorm_warmup": -1}, "crossq.renorm_warmup"),
        ({"adam_beta1": 1.0}, "crossq.adam_beta1"),
        ({"net": Net(recurrent="gru")}, "net.recurrent"),
    ):
        with pytest.raises(SpecError, match=name):
            Config(**settings)
    with pytest.raises(SpecError, match="action_space"):
        build(Config(), SEEN, Discrete(2), 0)


# -------------------------------------------------------------------------------------------------------------- probes


def trained(make: type[probes.Probe], updates: int = 30, **settings: Any) -> CrossQ:
    envs = probes.vector(make)
    fast: dict[str, Any] = {
        "net": SMALL, "critic_hidden": (16,), "memory": Memory(2_000, 64, 64), "rollout_steps": 8, "lr": 1e-2,
        "gamma": 0.8, "warmup_steps": 64, "updates_per_step": 0.5, "renorm_momentum": 0.9, "renorm_warmup": 100,
    }  # fmt: skip
    algorithm = build(Config(**fast | settings), envs.single_observation_space, envs.single_action_space, 0)
    probes.batches(envs, algorithm, updates)
    return algorithm


def values(algorithm: CrossQ, *observations: float) -> list[float]:
    seen = torch.tensor(observations).unsqueeze(1)
    with torch.no_grad():
        action = algorithm.policy.distribution(seen).mode()
        return algorithm.critics(seen, action).squeeze(-1).amin(0).tolist()  # type: ignore[no-any-return]


def boxed(make: type[probes.Probe]) -> type[probes.Probe]:
    """The probe with an action that is a number, and that it does not look at."""
    return type(make.__name__, (make,), {"action_space": Box(-1.0, 1.0, (1,))})


def test_probe_values() -> None:
    assert values(trained(boxed(probes.OneReward), alpha=0.0), 0.0) == pytest.approx([1.0], abs=0.05)
    seen = values(trained(boxed(probes.RewardOfObservation), alpha=0.0), -1.0, 1.0)
    assert seen == pytest.approx([-1.0, 1.0], abs=0.1)
    assert values(trained(boxed(probes.LaterReward), alpha=0.0), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.1)


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(boxed(probes.Endless), alpha=0.0), 0.0) == pytest.approx([5.0], abs=0.3)


def test_probe_continuous_action() -> None:
    algorithm = trained(probes.Aim, 40)
    action = algorithm.policy.act(np.zeros((1, 1), np.float32), deterministic=True)[0]
    assert float(algorithm.policy.for_env(action)[0, 0]) == pytest.approx(0.5, abs=0.15)
