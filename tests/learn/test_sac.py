"""SAC against its equations, on probe environments, and under the rules of replay."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from learn import probes, synthetic

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.algorithms.sac import METRICS, SAC, Config, build
from longrein.learn.bounded import SquashedGaussian
from longrein.learn.distributions import Categorical
from longrein.learn.replay import Memory, Sample
from longrein.learn.returns import expected_soft_value
from longrein.learn.schedules import Linear, gradient_steps_due
from longrein.learn.torsos import Net

SEEN = Box(-1, 1, (3,))
BOX, CHOICES = Box(-2.0, 2.0, (2,)), Discrete(3, start=5)
SMALL = Net(hidden=(16,), activation="relu")
MEMORY = Memory(capacity=2_000, batch_size=32, min_size=32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sac(action_space: gymnasium.Space[Any] = BOX, seed: int = 0, **settings: Any) -> SAC:
    settings = {"net": SMALL, "memory": MEMORY, "rollout_steps": 8, "warmup_steps": 0} | settings
    return build(Config(**settings), SEEN, action_space, seed)


def numbers(space: gymnasium.Space[Any]) -> int:
    return 2 if space is BOX else -3


def sample(algorithm: SAC, space: gymnasium.Space[Any] = BOX) -> Sample:
    rows = synthetic.batch(16, 4, actions=numbers(space))
    algorithm.replay.add(rows)
    return algorithm.replay.sample(32, torch.Generator().manual_seed(5))


# ----------------------------------------------------------------------------------------------------------- equations


def test_losses_by_hand() -> None:
    # 1/2 (1 * (1 - 3)^2 + 0.5 * (2 - 2)^2) / 2 = 1, and 1/2 (1 * (4 - 3)^2 + 0.5 * (0 - 2)^2) / 2 = 0.75
    values, target = torch.tensor([[1.0, 2.0], [4.0, 0.0]]), torch.tensor([3.0, 2.0])
    assert float(losses.ensemble_value_loss(values, target, torch.tensor([1.0, 0.5]))) == pytest.approx(1.75)
    # alpha = e^0.5; entropies are 1 and 3, 2 on average, the target 1: -e^0.5 * (-2 + 1) = 1.648721
    log_alpha = torch.tensor(0.5, requires_grad=True)
    log_prob = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = losses.temperature_loss(log_alpha, log_prob, 1.0)
    assert float(loss.detach()) == pytest.approx(1.648721, abs=1e-5)
    loss.backward()
    assert log_prob.grad is None  # the temperature's gradient must not move the policy
    assert log_alpha.grad is not None
    assert float(log_alpha.grad) > 0  # more entropy than asked for: alpha falls


def test_the_soft_value_of_choices_by_hand() -> None:
    # pi = (1/4, 3/4), q = (4, 0), alpha = 2: 1 + 2 (0.25 log 4 + 0.75 log 4/3) = 1 + 2 * 0.5623351
    log_probs = torch.tensor([[0.25, 0.75]]).log()
    value, log_prob = expected_soft_value(log_probs, torch.tensor([[4.0, 0.0]]), torch.tensor(2.0))
    assert float(value) == pytest.approx(1 + 2 * 0.5623351, abs=1e-6)
    assert float(log_prob) == pytest.approx(-0.5623351, abs=1e-6)


def test_means_leave_out_what_was_not_measured() -> None:
    rows = [torch.tensor([1.0, math.nan]), torch.tensor([3.0, 5.0])]
    assert losses.mean_measured(("a", "b"), rows) == {"a": 2.0, "b": 5.0}
    assert all(math.isnan(value) for value in losses.mean_measured(("a", "b"), []).values())


@pytest.mark.parametrize("paid", [0.3, 0.0], ids=["entropy counts", "and does not"])
def test_the_critics_learn_the_soft_bellman_target(paid: float) -> None:
    algorithm = sac(initial_alpha=0.3, backup_entropy=paid > 0)
    drawn = sample(algorithm)
    algorithm.targets.load_state_dict(sac(seed=1).critics.state_dict())
    generator = torch.Generator()
    generator.set_state(algorithm.generator.get_state())
    with torch.no_grad():
        action, log_prob = algorithm.policy.distribution(drawn.next_observation).rsample(generator)
        q1, q2 = algorithm.targets(drawn.next_observation, action).squeeze(-1)
        y = drawn.reward + drawn.discount * (torch.minimum(q1, q2) - paid * log_prob)
        p1, p2 = algorithm.critics(drawn.observation, drawn.action).squeeze(-1)
        wanted = (0.5 * (p1 - y) ** 2).mean() + (0.5 * (p2 - y) ** 2).mean()
    loss, _ = algorithm._learn_critics(drawn, algorithm.alpha)
    torch.testing.assert_close(loss, wanted)
    assert (drawn.discount[:, None] == torch.tensor([0.0, 0.99])).any(1).all()
    assert 0 < int((drawn.discount == 0).sum()) < 32


@pytest.mark.parametrize("paid", [0.3, 0.0], ids=["entropy counts", "and does not"])
def test_choices_learn_the_expected_target(paid: float) -> None:
    algorithm = sac(CHOICES, initial_alpha=0.3, backup_entropy=paid > 0)
    drawn = sample(algorithm, CHOICES)
    with torch.no_grad():
        probs = algorithm.policy.head(algorithm.policy.torso(drawn.next_observation)).softmax(-1)
        q = algorithm.targets(drawn.next_observation).amin(0)
        y = drawn.reward + drawn.discount * (probs * (q - paid * probs.log())).sum(1)
        wanted = sum(
            (0.5 * (algorithm.critics(drawn.observation)[k][torch.arange(32), drawn.action] - y) ** 2).mean()
            for k in (0, 1)
        )
    torch.testing.assert_close(algorithm._learn_critics(drawn, algorithm.alpha)[0], wanted)


@pytest.mark.parametrize("space", [BOX, CHOICES], ids=str)
def test_the_policy_step_moves_the_policy_and_the_temperature_alone(space: gymnasium.Space[Any]) -> None:
    algorithm = sac(space)
    drawn = sample(algorithm, space)
    before = copy.deepcopy(algorithm.critics.state_dict())
    policy, log_alpha = copy.deepcopy(algorithm.policy.state_dict()), algorithm.log_alpha.item()
    algorithm._learn_policy(drawn.observation, algorithm.alpha)
    assert all(parameter.grad is None for parameter in algorithm.critics.parameters())
    assert all(torch.equal(value, before[name]) for name, value in algorithm.critics.state_dict().items())
    assert all(
        not torch.equal(value, policy[name])
        for name, value in algorithm.policy.state_dict().items()
        if name != "warming"
    )
    assert algorithm.log_alpha.item() != log_alpha


@pytest.mark.parametrize("space", [BOX, CHOICES], ids=str)
def test_the_policy_gradient_is_that_of_the_equation(space: gymnasium.Space[Any]) -> None:
    algorithm = sac(space, alpha=0.3)
    drawn = sample(algorithm, space)
    generator = torch.Generator()
    generator.set_state(algorithm.generator.get_state())
    distribution = algorithm.policy.distribution(drawn.observation)
    if isinstance(distribution, SquashedGaussian):
        action, log_prob = distribution.rsample(generator)
        wanted = (0.3 * log_prob - algorithm.critics(drawn.observation, action).squeeze(-1).amin(0)).mean()
    else:
        assert isinstance(distribution, Categorical)
        probs = distribution.log_probs.exp()
        q = algorithm.critics(drawn.observation).amin(0).detach()
        wanted = (probs * (0.3 * probs.log() - q)).sum(1).mean()
    gradients = torch.autograd.grad(wanted, list(algorithm.policy.parameters()))
    loss, _ = algorithm._learn_policy(drawn.observation, algorithm.alpha)
    torch.testing.assert_close(loss, wanted.detach())
    for parameter, gradient in zip(algorithm.policy.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)
    assert algorithm.log_alpha.item() == pytest.approx(0.0)  # a fixed temperature stays where it is


def test_targets_go_a_share_of_the_way() -> None:
    algorithm = sac(tau=0.1)
    sample(algorithm)
    old = [parameter.clone() for parameter in algorithm.targets.parameters()]
    algorithm._step()
    pairs = zip(old, algorithm.targets.parameters(), algorithm.critics.parameters(), strict=True)
    for before, after, online in pairs:
        torch.testing.assert_close(after, 0.9 * before + 0.1 * online.detach())
        assert not after.requires_grad


def test_target_entropies() -> None:
    assert sac(BOX).target_entropy == -2.0
    assert sac(CHOICES, target_entropy_ratio=0.5).target_entropy == pytest.approx(0.5 * math.log(3))
    assert sac(CHOICES, target_entropy=0.1).target_entropy == 0.1


def test_a_given_temperature_follows_its_schedule() -> None:
    algorithm = sac(alpha=Linear(2.0, 0.0, 128))
    assert float(algorithm.alpha) == 2.0
    assert algorithm.update(synthetic.batch(16, 4, actions=2))["alpha"] == 1.0  # after 64 env steps
    assert len(algorithm._policy_parameters) == len(list(algorithm.policy.parameters()))  # none is learnt beside it


@pytest.mark.parametrize("space", [BOX, CHOICES], ids=str)
def test_the_temperature_finds_the_target_entropy(space: gymnasium.Space[Any]) -> None:
    # Nothing to gain: the policy would stay uniform, and the temperature falls until it need not be.
    algorithm = sac(space, lr=3e-3, target_entropy_ratio=0.5)
    rows = dataclasses.replace(synthetic.batch(32, 4, actions=numbers(space)), reward=torch.zeros(32, 4))
    algorithm.update(rows)
    first = float(algorithm.alpha)
    for _ in range(3):
        metrics = algorithm.update(rows)
    entropy = metrics["entropy"]
    assert (entropy > algorithm.target_entropy) == (float(algorithm.alpha) < first)


# ----------------------------------------------------------------------------------------------------- acting, counting


def test_warming_up_is_uniform_and_ends_by_env_steps() -> None:
    algorithm = sac(BOX, warmup_steps=64)
    rows = np.zeros((4_000, 3), np.float32)
    action, extras = algorithm.policy.act(rows, generator=torch.Generator().manual_seed(0))
    assert extras == {}
    assert action.dtype == np.float32
    assert abs(float(action.mean())) < 0.03
    assert float(action.var()) == pytest.approx(1 / 3, abs=0.02)  # a uniform variable on [-1, 1]
    still = algorithm.policy.act(rows[:2], deterministic=True)[0]
    assert np.abs(still).max() < 0.1  # the policy's own, which starts near 0
    algorithm.update(synthetic.batch(8, 4, actions=2))
    assert bool(algorithm.policy.warming)
    algorithm.update(synthetic.batch(8, 4, actions=2, seed=1))
    assert not bool(algorithm.policy.warming)
    choice = sac(CHOICES, warmup_steps=64).policy.act(rows, generator=torch.Generator().manual_seed(0))[0]
    assert np.bincount(choice) == pytest.approx([4_000 / 3] * 3, rel=0.1)


def test_actions_for_the_environment() -> None:
    np.testing.assert_array_equal(sac(CHOICES).policy.for_env(np.array([0, 2])), [5, 7])
    np.testing.assert_array_equal(sac(BOX).policy.for_env(np.array([[-1.0, 0.5]], np.float32)), [[-2.0, 1.0]])


def test_gradient_steps_follow_env_steps_whatever_the_batches() -> None:
    # 5 env steps of 12 are for learning: 0.4 * 5 = 2.
    assert gradient_steps_due(12, 7, 0.4, 0) == 2
    assert gradient_steps_due(12, 7, 0.4, 2) == 0
    assert gradient_steps_due(3, 7, 0.4, 0) == 0
    made = []
    for steps, envs in ((96, 1), (12, 8), (32, 3)):
        algorithm = sac(BOX, updates_per_step=0.3)
        rows = synthetic.batch(96 // envs, envs, actions=2)
        for start in range(0, 96 // envs, steps):
            fields = {name: getattr(rows, name)[start : start + steps] for name in rows.__slots__[:7]}
            algorithm.update(type(rows)(**fields))
        made.append(algorithm.updates)
    assert made == [int(0.3 * (96 - 32))] * 3


def test_nothing_is_learnt_before_there_is_enough() -> None:
    algorithm = sac(BOX, memory=Memory(capacity=1_000, batch_size=8, min_size=100))
    before = copy.deepcopy(algorithm.policy.state_dict())
    metrics = algorithm.update(synthetic.batch(8, 4, actions=2))
    assert all(math.isnan(metrics[name]) for name in METRICS)
    assert (metrics["gradient_steps"], metrics["memory_size"]) == (0.0, 32.0)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.policy.state_dict().items())
    after = algorithm.update(synthetic.batch(32, 4, actions=2))
    assert after.keys() == metrics.keys()
    assert not any(math.isnan(value) for value in after.values())
    assert after["gradient_steps"] == 32 + 128 - 100


@pytest.mark.parametrize("space", [BOX, CHOICES], ids=str)
@pytest.mark.parametrize("memory", [{}, {"prioritized": True, "n_steps": 3}], ids=["plain", "prioritized 3-step"])
def test_invalid_rows_change_nothing(space: gymnasium.Space[Any], memory: dict[str, Any]) -> None:
    settings = {"memory": dataclasses.replace(MEMORY, **memory)}
    one, two = sac(space, **settings), sac(space, **settings)
    clean = synthetic.batch(24, 4, actions=numbers(space), valid=0.7)
    assert one.update(clean) == two.update(synthetic.nonsense(clean))
    assert one.updates > 0
    for name, value in one.policy.state_dict().items():
        assert torch.equal(value, two.policy.state_dict()[name])
    assert one.replay.env_steps == int(clean.valid.sum())


def test_a_batch_without_a_valid_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        sac().update(synthetic.batch(4, 2, actions=2, valid=0.0))


def test_learning_rates_follow_env_steps() -> None:
    algorithm = sac(lr=Linear(1e-3, 0.0, 64), critic_lr=2e-3)
    rates = [algorithm.update(synthetic.batch(8, 4, actions=2, seed=seed))["lr"] for seed in range(3)]
    assert rates == pytest.approx([1e-3, 5e-4, 0.0])
    assert algorithm.critic_optimizer.param_groups[0]["lr"] == 2e-3
    assert sac(lr=5e-4).critic_optimizer.param_groups[0]["lr"] == 5e-4


def test_wrong_settings_are_named() -> None:
    for settings, name in (
        ({"gamma": 1.5}, "sac.gamma"),
        ({"rollout_steps": 0}, "sac.rollout_steps"),
        ({"updates_per_step": 0.0}, "sac.updates_per_step"),
        ({"alpha": -1.0}, "sac.alpha"),
        ({"warmup_steps": -1}, "sac.warmup_steps"),
        ({"net": Net(recurrent="gru")}, "net.recurrent"),
    ):
        with pytest.raises(SpecError, match=name):
            Config(**settings)
    with pytest.raises(SpecError, match="action_space"):
        build(Config(), SEEN, Box(-np.inf, np.inf, (1,)), 0)


def test_masked_choices_are_never_made_and_worth_nothing() -> None:
    seen = Dict(state=SEEN, action_mask=MultiBinary(3))
    config = Config(net=SMALL, memory=MEMORY, warmup_steps=32)
    algorithm = build(config, seen, CHOICES, 0)
    rows = {"state": np.zeros((900, 3), np.float32), "action_mask": np.tile(np.array([1, 0, 1], np.int8), (900, 1))}
    encoded = algorithm.policy.encode(rows)
    drawn = synthetic.batch(16, 4, actions=-3, size=6)
    ends = [torch.cat([end[..., :3], torch.tensor([1.0, 0.0, 1.0]).expand(16, 4, 3)], -1) for end in
            (drawn.observation, drawn.next_observation)]  # fmt: skip
    drawn = dataclasses.replace(drawn, observation=ends[0], next_observation=ends[1])
    for _ in range(2):  # warming up, and after it
        action = algorithm.policy.act(encoded, generator=torch.Generator().manual_seed(0))[0]
        assert np.bincount(action, minlength=3) == pytest.approx([450, 0, 450], abs=150)
        metrics = algorithm.update(drawn)
    assert all(math.isfinite(value) for value in metrics.values())
    assert 0 < metrics["entropy"] <= math.log(2) + 1e-6
    distribution = algorithm.policy.distribution(*algorithm.policy.inputs.split(ends[0][0]))
    assert isinstance(distribution, Categorical)
    assert float(distribution.log_probs[:, 1].exp().sum().detach()) == 0.0


def halves(observation: Any) -> Any:
    return np.asarray(observation[:1] / 2, np.float32)


def test_state_to_input_changes_what_is_seen() -> None:
    net = dataclasses.replace(SMALL, state_to_input=halves)
    algorithm = build(Config(net=net, memory=MEMORY, warmup_steps=0), SEEN, BOX, 0)
    encoded = algorithm.policy.encode(np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(encoded, [[0.5], [0.5]])
    algorithm.update(synthetic.batch(16, 4, actions=2, size=1))
    assert algorithm.updates > 0


def test_images() -> None:
    image = Box(0, 255, (36, 36, 1), np.uint8)
    algorithm = build(Config(net=SMALL, memory=Memory(100, 4, 4), warmup_steps=0), image, BOX, 0)
    rows = synthetic.batch(4, 2, actions=2)
    seen = torch.randint(0, 256, (4, 2, 36, 36, 1), dtype=torch.uint8)
    algorithm.update(dataclasses.replace(rows, observation=seen, next_observation=seen))
    assert algorithm.updates == 4
    assert algorithm.policy.act(seen[0].numpy())[0].shape == (2, 2)


# -------------------------------------------------------------------------------------------------------------- probes


def trained(make: type[probes.Probe], updates: int = 30, **settings: Any) -> SAC:
    envs = probes.vector(make)
    fast: dict[str, Any] = {
        "net": SMALL, "memory": Memory(2_000, 64, 64), "rollout_steps": 8, "lr": 1e-2, "tau": 0.05, "gamma": 0.8,
        "warmup_steps": 64, "updates_per_step": 0.5,
    }  # fmt: skip
    algorithm = build(Config(**fast | settings), envs.single_observation_space, envs.single_action_space, 0)
    probes.batches(envs, algorithm, updates)
    return algorithm


def values(algorithm: SAC, *observations: float) -> list[float]:
    """Soft values of the policy: E[Q - alpha log pi]."""
    seen = torch.tensor(observations).unsqueeze(1)
    with torch.no_grad():
        distribution = algorithm.policy.distribution(seen)
        value, _ = algorithm._soft_value(algorithm.critics, seen, distribution, torch.tensor(0.0))
    return value.tolist()  # type: ignore[no-any-return]


def choices(algorithm: SAC, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].reshape(-1).tolist()  # type: ignore[no-any-return]


def boxed(make: type[probes.Probe]) -> type[probes.Probe]:
    """The probe with an action that is a number, and that it does not look at."""
    return type(make.__name__, (make,), {"action_space": Box(-1.0, 1.0, (1,))})


@pytest.mark.parametrize("form", [boxed, lambda make: make], ids=["box", "choices"])
def test_probe_values(form: Any) -> None:
    assert values(trained(form(probes.OneReward), alpha=0.0), 0.0) == pytest.approx([1.0], abs=0.05)
    seen = values(trained(form(probes.RewardOfObservation), alpha=0.0), -1.0, 1.0)
    assert seen == pytest.approx([-1.0, 1.0], abs=0.1)
    assert values(trained(form(probes.LaterReward), alpha=0.0), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


@pytest.mark.parametrize("form", [boxed, lambda make: make], ids=["box", "choices"])
def test_probe_time_limit_keeps_the_bootstrap(form: Any) -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(form(probes.Endless), tau=0.1, alpha=0.0), 0.0) == pytest.approx([5.0], abs=0.25)


def test_probe_entropy_is_worth_its_temperature() -> None:
    # Two choices without consequence for ever: the policy stays uniform, and each later step is worth alpha log 2.
    # Q = 1 + 0.8 (Q + 0.5 log 2) -> Q = (1 + 0.8 * 0.3465736) / 0.2 = 6.3863
    assert values(trained(probes.Endless, 40, tau=0.1, alpha=0.5), 0.0) == pytest.approx([6.386], abs=0.3)


def test_probe_reward_of_the_action() -> None:
    assert choices(trained(probes.RewardOfAction), 0.0) == [1]


def test_probe_action_by_the_observation() -> None:
    assert choices(trained(probes.Imitate), -1.0, 1.0) == [0, 1]


def test_probe_soft_choice() -> None:
    # One step, rewards -1 and 1, alpha 1: pi(1) = e / (e + 1/e) = 0.8808.
    algorithm = trained(probes.RewardOfAction, 40, alpha=1.0)
    distribution = algorithm.policy.distribution(torch.zeros(1, 1))
    assert isinstance(distribution, Categorical)
    assert float(distribution.log_probs[0, 1].detach().exp()) == pytest.approx(0.8808, abs=0.03)


def test_probe_continuous_action() -> None:
    algorithm = trained(probes.Aim, 40)
    action = algorithm.policy.act(np.zeros((1, 1), np.float32), deterministic=True)[0]
    assert float(algorithm.policy.for_env(action)[0, 0]) == pytest.approx(0.5, abs=0.15)
