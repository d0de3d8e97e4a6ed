"""TD3 against its equations, on probe environments, and under the rules of replay."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from learn import probes, synthetic

from longrein.errors import SpecError
from longrein.learn.algorithms.td3 import METRICS, TD3, Config, build
from longrein.learn.replay import Memory, Sample
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

SEEN, BOX = Box(-1, 1, (3,)), Box(-2.0, 2.0, (2,))
SMALL = Net(hidden=(16,), activation="relu")
MEMORY = Memory(capacity=2_000, batch_size=32, min_size=32)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def td3(seed: int = 0, **settings: Any) -> TD3:
    settings = {"net": SMALL, "memory": MEMORY, "rollout_steps": 8, "warmup_steps": 0} | settings
    return build(Config(**settings), SEEN, BOX, seed)


def sample(algorithm: TD3) -> Sample:
    algorithm.replay.add(synthetic.batch(16, 4, actions=2))
    return algorithm.replay.sample(32, torch.Generator().manual_seed(5))


# ----------------------------------------------------------------------------------------------------------- equations


def test_the_critics_learn_the_smoothed_clipped_target() -> None:
    algorithm = td3(target_noise=0.4, target_noise_clip=0.3)
    drawn = sample(algorithm)
    other = td3(seed=1)
    algorithm.target_critics.load_state_dict(other.critics.state_dict())
    algorithm.target_policy.load_state_dict(other.policy.state_dict())
    generator = torch.Generator()
    generator.set_state(algorithm.generator.get_state())
    with torch.no_grad():
        noise = (0.4 * torch.empty(32, 2).normal_(generator=generator)).clamp(-0.3, 0.3)
        action = (other.policy(drawn.next_observation) + noise).clamp(-1, 1)
        y = drawn.reward + drawn.discount * other.critics(drawn.next_observation, action).squeeze(-1).min(0).values
        p1, p2 = algorithm.critics(drawn.observation, drawn.action).squeeze(-1)
        wanted = (0.5 * (p1 - y) ** 2).mean() + (0.5 * (p2 - y) ** 2).mean()
    assert float(noise.abs().max()) == pytest.approx(0.3)
    torch.testing.assert_close(algorithm._learn_critics(drawn)[0], wanted)
    assert (drawn.discount[:, None] == torch.tensor([0.0, 0.99])).any(1).all()
    assert 0 < int((drawn.discount == 0).sum()) < 32


def test_the_policy_climbs_the_first_critic_and_leaves_both_alone() -> None:
    algorithm = td3()
    drawn = sample(algorithm)
    wanted = -algorithm.critics(drawn.observation, algorithm.policy(drawn.observation))[0].mean()
    gradients = torch.autograd.grad(wanted, list(algorithm.policy.parameters()))
    before = copy.deepcopy(algorithm.critics.state_dict())
    torch.testing.assert_close(algorithm._learn_policy(drawn.observation), wanted.detach())
    for parameter, gradient in zip(algorithm.policy.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(parameter.grad is None for parameter in algorithm.critics.parameters())
    assert all(torch.equal(value, before[name]) for name, value in algorithm.critics.state_dict().items())


def test_policy_and_targets_wait_for_their_turn() -> None:
    algorithm = td3(policy_delay=3, tau=0.1)
    sample(algorithm)
    targets = [*algorithm.target_policy.parameters(), *algorithm.target_critics.parameters()]
    old, policy = [target.clone() for target in targets], copy.deepcopy(algorithm.policy.state_dict())
    measured = [algorithm._step() for _ in range(2)]
    assert all(torch.equal(value, policy[name]) for name, value in algorithm.policy.state_dict().items())
    assert all(torch.equal(one, two) for one, two in zip(old, targets, strict=True))
    measured.append(algorithm._step())
    assert [math.isnan(float(row[METRICS.index("policy_loss")])) for row in measured] == [True, True, False]
    online = [*algorithm.policy.parameters(), *algorithm.critics.parameters()]
    for before, after, now in zip(old, targets, online, strict=True):
        torch.testing.assert_close(after, 0.9 * before + 0.1 * now.detach())
        assert not after.requires_grad


# ----------------------------------------------------------------------------------------------------- acting, counting


def test_noise_explores_and_evaluation_has_none() -> None:
    algorithm = td3(exploration_noise=0.2)
    rows = np.zeros((4_000, 3), np.float32)
    still, extras = algorithm.policy.act(rows, deterministic=True)
    assert extras == {}
    assert (still == still[0]).all()
    noisy = algorithm.policy.act(rows, generator=torch.Generator().manual_seed(0))[0]
    assert float((noisy - still).std()) == pytest.approx(0.2, abs=0.01)
    with torch.no_grad():
        algorithm.policy.noise.fill_(50.0)
    assert np.abs(algorithm.policy.act(rows)[0]).max() == 1.0  # cut at the bounds
    np.testing.assert_array_equal(algorithm.policy.for_env(np.array([[-1.0, 0.5]], np.float32)), [[-2.0, 1.0]])


def test_warming_up_is_uniform_and_schedules_follow_env_steps() -> None:
    algorithm = td3(warmup_steps=64, exploration_noise=Linear(0.4, 0.0, 128), lr=Linear(1e-3, 0.0, 64))
    action = algorithm.policy.act(np.zeros((4_000, 3), np.float32), generator=torch.Generator().manual_seed(0))[0]
    assert float(action.var()) == pytest.approx(1 / 3, abs=0.02)
    seen = []
    for seed in range(3):
        metrics = algorithm.update(synthetic.batch(8, 4, actions=2, seed=seed))
        seen.append((bool(algorithm.policy.warming), float(algorithm.policy.noise), metrics["lr"]))
    assert seen == [(True, pytest.approx(0.3), 1e-3), (False, pytest.approx(0.2), 5e-4), (False, pytest.approx(0.1), 0)]


def test_gradient_steps_follow_env_steps_whatever_the_batches() -> None:
    made = []
    for steps, envs in ((96, 1), (12, 8), (32, 3)):
        algorithm = td3(updates_per_step=0.3)
        rows = synthetic.batch(96 // envs, envs, actions=2)
        for start in range(0, 96 // envs, steps):
            fields = {name: getattr(rows, name)[start : start + steps] for name in rows.__slots__[:7]}
            algorithm.update(type(rows)(**fields))
        made.append(algorithm.updates)
    assert made == [int(0.3 * (96 - 32))] * 3


def test_nothing_is_learnt_before_there_is_enough() -> None:
    algorithm = td3(memory=Memory(capacity=1_000, batch_size=8, min_size=100))
    metrics = algorithm.update(synthetic.batch(8, 4, actions=2))
    assert all(math.isnan(metrics[name]) for name in METRICS)
    after = algorithm.update(synthetic.batch(32, 4, actions=2))
    assert after.keys() == metrics.keys()
    assert not any(math.isnan(value) for value in after.values())
    assert after["gradient_steps"] == 32 + 128 - 100


@pytest.mark.parametrize("memory", [{}, {"prioritized": True, "n_steps": 3}], ids=["plain", "prioritized 3-step"])
def test_invalid_rows_change_nothing(memory: dict[str, Any]) -> None:
    settings = {"memory": dataclasses.replace(MEMORY, **memory)}
    one, two = td3(**settings), td3(**settings)
    clean = synthetic.batch(24, 4, actions=2, valid=0.7)
    assert one.update(clean) == two.update(synthetic.nonsense(clean))
    assert one.updates > 0
    for name, value in one.policy.state_dict().items():
        assert torch.equal(value, two.policy.state_dict()[name])


def test_a_batch_without_a_valid_row_is_refused() -> None:
    with pytest.raises(ValueError, match="no row"):
        td3().update(synthetic.batch(4, 2, actions=2, valid=0.0))


def test_wrong_settings_are_named() -> None:
    for settings, name in (
        ({"tau": 1.5}, "td3.tau"),
        ({"policy_delay": 0}, "td3.policy_delay"),
        ({"updates_per_step": 0.0}, "td3.updates_per_step"),
        ({"target_noise": -1.0}, "td3.target_noise"),
        ({"net": Net(recurrent="gru")}, "net.recurrent"),
    ):
        with pytest.raises(SpecError, match=name):
            Config(**settings)
    with pytest.raises(SpecError, match="action_space"):
        build(Config(), SEEN, Discrete(2), 0)


# -------------------------------------------------------------------------------------------------------------- probes


def trained(make: type[probes.Probe], updates: int = 30, **settings: Any) -> TD3:
    envs = probes.vector(make)
    fast: dict[str, Any] = {
        "net": SMALL, "memory": Memory(2_000, 64, 64), "rollout_steps": 8, "lr": 1e-2, "tau": 0.05, "gamma": 0.8,
        "warmup_steps": 64, "updates_per_step": 0.5,
    }  # fmt: skip
    algorithm = build(Config(**fast | settings), envs.single_observation_space, envs.single_action_space, 0)
    probes.batches(envs, algorithm, updates)
    return algorithm


def values(algorithm: TD3, *observations: float) -> list[float]:
    seen = torch.tensor(observations).unsqueeze(1)
    with torch.no_grad():
        return algorithm.critics(seen, algorithm.policy(seen)).squeeze(-1).amin(0).tolist()  # type: ignore[no-any-return]


def boxed(make: type[probes.Probe]) -> type[probes.Probe]:
    """The probe with an action that is a number, and that it does not look at."""
    return type(make.__name__, (make,), {"action_space": Box(-1.0, 1.0, (1,))})


class Follow(probes.Probe):
    """One step, a continuous action, reward -(action - observation)^2: does the policy look?"""

    action_space: gymnasium.Space[Any] = Box(-2.0, 2.0, (1,), np.float32)

    def first(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def step(self, action: Any) -> probes.Step:
        return self.observation(), -float((action[0] - self.seen) ** 2), True, False, {}


def test_probe_values() -> None:
    assert values(trained(boxed(probes.OneReward)), 0.0) == pytest.approx([1.0], abs=0.05)
    assert values(trained(boxed(probes.RewardOfObservation)), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)
    assert values(trained(boxed(probes.LaterReward)), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(boxed(probes.Endless), tau=0.1), 0.0) == pytest.approx([5.0], abs=0.25)


def test_probe_action_by_the_observation() -> None:
    algorithm = trained(Follow, 40)
    action = algorithm.policy.act(np.array([[-1.0], [1.0]], np.float32), deterministic=True)[0]
    assert algorithm.policy.for_env(action).reshape(-1).tolist() == pytest.approx([-1.0, 1.0], abs=0.15)
