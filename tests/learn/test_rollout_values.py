"""Action values learnt from whole rollouts: SARSA, PQN and their returns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from learn import probes

from longrein.errors import SpecError
from longrein.learn.algorithms import pqn, sarsa
from longrein.learn.batch import Batch
from longrein.learn.exploration import boltzmann_probs, epsilon_greedy_probs
from longrein.learn.returns import bounded_returns, lambda_returns, n_step_returns
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net, make_torso


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# -------------------------------------------------------------------------------------------------------------- returns


def masks(seed: int, steps: int = 12, envs: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(3, steps, envs, generator=generator)
    reward, next_value = torch.randn(2, steps, envs, generator=generator, dtype=torch.float64)
    return {
        "reward": reward, "terminated": chance[0] < 0.15, "truncated": chance[1] < 0.15, "valid": chance[2] < 0.9,
        "next_value": next_value,
    }  # fmt: skip


def follows(rows: dict[str, torch.Tensor], t: int, b: int) -> bool:
    """Whether row t + 1 goes on with row t's episode."""
    done = rows["terminated"][t, b] or rows["truncated"][t, b]
    return bool(not done and t + 1 < len(rows["valid"]) and rows["valid"][t + 1, b])


def n_step(rows: dict[str, torch.Tensor], t: int, b: int, n: int, gamma: float) -> float:
    """The return of at most n rewards from row t, by walking."""
    total, discount = 0.0, 1.0
    for i in range(n):
        total += discount * float(rows["reward"][t + i, b])
        discount *= gamma
        if not follows(rows, t + i, b):
            break
    return total + discount * float(rows["next_value"][t + i, b]) * (not rows["terminated"][t + i, b])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [1, 2, 5, 12, 40])
def test_bounded_returns_are_those_of_a_walk(seed: int, n: int) -> None:
    rows = masks(seed)
    result = bounded_returns(**rows, gamma=0.9, steps=n)
    for t in range(12):
        for b in range(3):
            expected = n_step(rows, t, b, min(n, 12 - t), 0.9) if rows["valid"][t, b] else 0.0
            assert float(result[t, b]) == pytest.approx(expected)
    if n >= 12:
        torch.testing.assert_close(result, n_step_returns(**rows, gamma=0.9))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_lambda_returns_are_the_mixture_of_all_n(seed: int, lambda_: float) -> None:
    rows = masks(seed)
    result = lambda_returns(**rows, gamma=0.9, lambda_=lambda_)
    for t in range(12):
        for b in range(3):
            if not rows["valid"][t, b]:
                assert result[t, b] == 0.0
                continue
            length = 1
            while follows(rows, t + length - 1, b):
                length += 1
            parts = [n_step(rows, t, b, n, 0.9) for n in range(1, length + 1)]
            weights = [(1 - lambda_) * lambda_ ** (n - 1) for n in range(1, length)] + [lambda_ ** (length - 1)]
            assert float(result[t, b]) == pytest.approx(float(np.dot(weights, parts)))


def test_nonsense_in_an_invalid_row_reaches_no_return() -> None:
    rows = masks(1)
    clean = [bounded_returns(**rows, gamma=0.9, steps=4), lambda_returns(**rows, gamma=0.9, lambda_=0.7)]
    for name in ("reward", "next_value"):
        rows[name] = rows[name].masked_fill(~rows["valid"], torch.nan)
    dirty = [bounded_returns(**rows, gamma=0.9, steps=4), lambda_returns(**rows, gamma=0.9, lambda_=0.7)]
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)


# -------------------------------------------------------------------------------------------------------------- targets

SPACES = Box(-1, 1, (1,)), Discrete(3)


def rollout(steps: int = 6, envs: int = 2) -> Batch:
    rows = masks(2, steps, envs)
    generator = torch.Generator().manual_seed(1)
    observation = torch.randn(steps + 1, envs, 1, generator=generator)
    action = torch.randint(3, (steps, envs), generator=generator)
    flags = (rows[name] for name in ("terminated", "truncated", "valid"))
    return Batch(observation[:-1], action, rows["reward"].float(), observation[1:], *flags)


@pytest.mark.parametrize("settings", [{}, {"expected": True}, {"exploration": "boltzmann", "temperature": 0.5}])
def test_sarsa_bootstraps_with_the_action_taken_next(settings: dict[str, Any]) -> None:
    algorithm, batch = sarsa.build(sarsa.Config(epsilon=0.3, **settings), *SPACES, 0), rollout()
    result = algorithm._next_value(batch)
    with torch.no_grad():
        value = algorithm.policy.values(batch.next_observation.flatten(0, 1)).view(6, 2, 3)
    boltzmann = "exploration" in settings
    probs = boltzmann_probs(value, 0.5) if boltzmann else epsilon_greedy_probs(value, 0.3)
    done, taken = batch.done, 0
    for t in range(6):
        for b in range(2):
            follows_ = t < 5 and not done[t, b] and bool(batch.valid[t, b]) and bool(batch.valid[t + 1, b])
            if follows_ and "expected" not in settings:
                taken += 1
                assert result[t, b] == value[t, b, batch.action[t + 1, b]]
            else:
                assert float(result[t, b]) == pytest.approx(float((probs[t, b] * value[t, b]).sum()), abs=1e-6)
    assert taken > 3 or "expected" in settings


def test_pqn_bootstraps_with_the_best_action_and_with_a_target_network_by_double() -> None:
    batch = rollout()
    following = batch.next_observation.flatten(0, 1)
    plain = pqn.build(pqn.Config(), *SPACES, 0)
    with torch.no_grad():
        torch.testing.assert_close(plain._next_value(batch).flatten(), plain.policy.values(following).amax(1))
    double = pqn.build(pqn.Config(target_every=100), *SPACES, 0)
    assert double.target is not None
    for parameter in double.target.parameters():
        parameter.mul_(-0.5)
    with torch.no_grad():
        best = double.policy.values(following).argmax(1)
        expected = double.target(following)[torch.arange(12), best, 0]
    torch.testing.assert_close(double._next_value(batch).flatten(), expected)


def test_pqn_copies_its_target_network_by_env_steps() -> None:
    algorithm = pqn.build(pqn.Config(target_every=60, rollout_steps=16), *SPACES, 0)
    assert algorithm.target is not None
    copied = []
    for _ in range(6):  # 32 env steps each, less what is not valid
        steps = algorithm.env_steps
        batch = rollout(16)
        algorithm.update(batch)
        due = algorithm.env_steps // 60 > steps // 60
        pairs = zip(algorithm.target.parameters(), algorithm.policy.net.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) is due
        copied.append(due)
    assert 1 < sum(copied) < 6


def test_a_masked_action_is_no_target() -> None:
    space = Dict(seen=Box(-1, 1, (1,)), action_mask=MultiBinary(3))
    batch = rollout()
    mask = torch.eye(3)[torch.arange(12) % 3].view(6, 2, 3)
    observation, following = (torch.cat([x, mask], -1) for x in (batch.observation, batch.next_observation))
    masked = Batch(observation, batch.action, batch.reward, following, batch.terminated, batch.truncated, batch.valid)
    for algorithm in (
        pqn.build(pqn.Config(), space, Discrete(3), 0),
        sarsa.build(sarsa.Config(expected=True, epsilon=0.5), space, Discrete(3), 0),
    ):
        with torch.no_grad():
            value = algorithm.policy.net(batch.next_observation.flatten(0, 1)).squeeze(-1)
        expected = value[torch.arange(12), torch.arange(12) % 3].view(6, 2)
        torch.testing.assert_close(algorithm._next_value(masked), expected)


# --------------------------------------------------------------------------------------------------------------- probes

FAST: dict[str, Any] = {
    "rollout_steps": 8, "minibatch_size": 32, "epochs": 2, "gamma": 0.8, "lr": 5e-3,
    "epsilon": Linear(1.0, 0.1, 1_000), "net": Net(hidden=(32,), activation="relu", layer_norm=True),
}  # fmt: skip
KINDS: list[tuple[Any, dict[str, Any]]] = [
    (pqn, {}), (pqn, {"target_every": 64, "lambda_": 1.0}), (sarsa, {}), (sarsa, {"n_steps": 0}),
    (sarsa, {"expected": True, "n_steps": 1}), (sarsa, {"exploration": "boltzmann", "temperature": 0.1}),
]  # fmt: skip


def trained(module: Any, make: type[probes.Probe], updates: int, **settings: Any) -> Any:
    envs = probes.vector(make)
    config = module.Config(**FAST | settings)
    algorithm = module.build(config, envs.single_observation_space, envs.single_action_space, 0)
    probes.batches(envs, algorithm, updates)
    return algorithm


def values(algorithm: Any, *observations: float) -> torch.Tensor:
    with torch.no_grad():
        return algorithm.policy.values(torch.tensor(observations).unsqueeze(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("module", "settings"), KINDS)
def test_probe_action_by_the_observation(module: Any, settings: dict[str, Any]) -> None:
    algorithm = trained(module, probes.Imitate, 30, **settings)
    assert algorithm.policy.act(np.array([[-1.0], [1.0]], np.float32), True)[0].tolist() == [0, 1]


@pytest.mark.parametrize(("module", "settings"), KINDS)
def test_probe_discount_over_two_steps(module: Any, settings: dict[str, Any]) -> None:
    values_ = values(trained(module, probes.LaterReward, 60, **settings), 0.0, 1.0)
    torch.testing.assert_close(values_, torch.tensor([[0.8, 0.8], [1.0, 1.0]]), atol=0.08, rtol=0)


@pytest.mark.parametrize(("module", "settings"), KINDS)
def test_probe_time_limit_keeps_the_bootstrap(module: Any, settings: dict[str, Any]) -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    # Always at random: of two actions as good as each other, a greedy policy would learn one.
    random = {name: 100.0 for name in settings if name == "temperature"} | {"epsilon": 1.0, "lr": 0.1}
    values_ = values(trained(module, probes.Endless, 110, **settings | random), 0.0)
    torch.testing.assert_close(values_, torch.tensor([[5.0, 5.0]]), atol=0.35, rtol=0)


class Cliff(probes.Probe):
    """Action 0 ends with 0.4. Action 1 pays 0 and leads to a state whose actions end with 1 and with -1.

    With epsilon 1 and gamma 1 the second state is worth 0 to the one who acts, and 1 to the one who only learns.
    """

    def step(self, action: Any) -> Any:
        self.time += 1
        if self.time == 1 and action == 1:
            self.seen = 1.0
            return self.observation(), 0.0, False, False, {}
        return self.observation(), (0.4 if self.time == 1 else 1.0 - 2.0 * action), True, False, {}


def test_sarsa_values_the_policy_that_acts_and_pqn_the_best_one() -> None:
    settings = {"epsilon": 1.0, "gamma": 1.0, "lr": Linear(5e-3, 0.0, 9_600)}
    acts = trained(sarsa, Cliff, 150, n_steps=1, **settings)
    learns = trained(pqn, Cliff, 150, lambda_=0.0, **settings)
    torch.testing.assert_close(values(acts, 0.0), torch.tensor([[0.4, 0.0]]), atol=0.12, rtol=0)
    torch.testing.assert_close(values(learns, 0.0), torch.tensor([[0.4, 1.0]]), atol=0.12, rtol=0)


@pytest.mark.parametrize("module", [pqn, sarsa])
def test_an_invalid_row_changes_nothing(module: Any) -> None:
    algorithm = trained(module, probes.Imitate, 1)
    batch = probes.batches(probes.vector(probes.Imitate), algorithm, 1)[0]
    clean = {name: getattr(batch, name).clone() for name in Batch.__slots__[:7]}
    clean["valid"][3, 0] = False
    dirty = {name: column.clone() for name, column in clean.items()}
    for name in ("reward", "observation", "next_observation"):
        dirty[name][3, 0] = torch.nan
    one, two = (trained(module, probes.Imitate, 1) for _ in range(2))
    assert one.update(Batch(**clean)) == two.update(Batch(**dirty))
    for left, right in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(left, right)
    assert one.env_steps == 64 + 63
    with pytest.raises(ValueError, match="no row"):
        one.update(Batch(**clean | {"valid": torch.zeros_like(clean["valid"])}))


def test_layer_norm_stands_before_each_activation() -> None:
    net = make_torso(Box(-1, 1, (4,)), Net(hidden=(16, 8), activation="relu", layer_norm=True)).net
    assert [type(layer).__name__ for layer in net.children()] == [  # type: ignore[union-attr]  # a Sequential
        "Flat", "Linear", "LayerNorm", "ReLU", "Linear", "LayerNorm", "ReLU",
    ]  # fmt: skip
    image = make_torso(Box(0, 255, (84, 84, 4), np.uint8), Net(hidden=(), layer_norm=True))
    assert sum(isinstance(layer, torch.nn.GroupNorm) for layer in image.modules()) == 3


def test_wrong_settings_are_named() -> None:
    for module, wrong in (
        (pqn, {"gamma": 2.0, "lambda_": -1.0, "epochs": 0, "target_every": -1}),
        (sarsa, {"gamma": 2.0, "n_steps": -1, "rollout_steps": 0, "exploration": "none"}),
    ):
        for name, value in wrong.items():
            with pytest.raises(SpecError, match=rf"{module.__name__.rpartition('.')[2]}\.{name}"):
                module.Config(**{name: value})
