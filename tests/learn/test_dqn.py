"""DQN and its switches: losses worked by hand, probes, and the double target."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from learn import probes

from longrein.errors import SpecError
from longrein.learn import algorithms, losses
from longrein.learn.algorithms.dqn import DQN, Config, build
from longrein.learn.batch import Batch
from longrein.learn.replay import Drawn, Memory, Sample
from longrein.learn.schedules import Exponential, Linear, Periodic, plain_shape, shape_from, value_at
from longrein.learn.torsos import Net


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------------------------- losses


def projected(probs: torch.Tensor, reward: torch.Tensor, discount: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """By the triangular kernel: atom i gets p_j max(0, 1 - |T z_j - z_i| / dz), one particle after the other."""
    gap = float(support[1] - support[0])
    out = torch.zeros_like(probs)
    for n in range(len(probs)):
        for j in range(len(support)):
            moved = float(torch.clamp(reward[n] + discount[n] * support[j], support[0], support[-1]))
            for i in range(len(support)):
                out[n, i] += probs[n, j] * max(0.0, 1.0 - abs(moved - float(support[i])) / gap)
    return out


@pytest.mark.parametrize("seed", range(3))
def test_the_projection_is_that_of_a_walk_over_particles(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    support = torch.linspace(-2.0, 3.0, 11, dtype=torch.float64)
    probs = torch.randn(20, 11, generator=generator, dtype=torch.float64).softmax(1)
    reward = torch.randn(20, generator=generator, dtype=torch.float64) * 2
    discount = 0.9 * (torch.rand(20, generator=generator) < 0.7).double()
    result = losses.c51_projection(probs, reward, discount, support)
    torch.testing.assert_close(result, projected(probs, reward, discount, support))
    torch.testing.assert_close(result.sum(1), torch.ones(20, dtype=torch.float64))


def test_the_projection_keeps_the_mean_within_the_support() -> None:
    generator = torch.Generator().manual_seed(0)
    support = torch.linspace(-10.0, 10.0, 51, dtype=torch.float64)
    probs = torch.randn(30, 51, generator=generator, dtype=torch.float64).softmax(1)
    reward = torch.rand(30, generator=generator, dtype=torch.float64)
    discount = torch.full((30,), 0.9, dtype=torch.float64)  # |r + 0.9 z| <= 10
    result = losses.c51_projection(probs, reward, discount, support)
    torch.testing.assert_close(result @ support, reward + 0.9 * (probs @ support))


def test_mass_that_falls_on_an_atom_is_not_lost() -> None:
    # Support 0, 1, 2; all mass on 1. With D = 1: r = 1 moves it onto 2, r = -1 onto 0, r = 0.25 a quarter of the way.
    support = torch.tensor([0.0, 1.0, 2.0])
    probs = torch.tensor([[0.0, 1.0, 0.0]]).repeat(5, 1)
    reward = torch.tensor([1.0, -1.0, 0.0, 0.25, 7.0])
    result = losses.c51_projection(probs, reward, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]), support)
    expected = [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0.75, 0.25], [0, 0, 1]]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float32))


def test_the_c51_loss_is_0_where_distributions_agree_and_has_the_gradient_of_cross_entropy() -> None:
    target = torch.tensor([[0.2, 0.8, 0.0]])
    assert losses.c51_loss(torch.tensor([[0.2, 0.8, 1e-30]]).log(), target).item() == pytest.approx(0.0, abs=1e-6)
    logits = torch.tensor([[0.3, -0.1, 0.7]], requires_grad=True)
    losses.c51_loss(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - target)


def test_the_quantile_loss_by_hand() -> None:
    # Two quantiles (fractions 1/4, 3/4) at 0 and 2, one target at 3: errors 3 and 1, Huber 2.5 and 0.5.
    # 1/4 * 2.5 + 3/4 * 0.5 = 1. Target -1: errors -1 and -3: 3/4 * 0.5 + 1/4 * 2.5 = 1.
    quantile = torch.tensor([[0.0, 2.0]])
    assert losses.quantile_loss(quantile, torch.tensor([[3.0]])).tolist() == pytest.approx([1.0])
    assert losses.quantile_loss(quantile, torch.tensor([[-1.0]])).tolist() == pytest.approx([1.0])
    assert losses.quantile_loss(quantile, torch.tensor([[3.0, -1.0]])).tolist() == pytest.approx([1.0])
    # kappa 0: 1/4 * 3 + 3/4 * 1 = 1.5
    assert losses.quantile_loss(quantile, torch.tensor([[3.0]]), 0.0).tolist() == pytest.approx([1.5])


def test_the_quantile_loss_finds_the_quantiles() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, generator=generator).exp()  # skewed
    quantile = torch.zeros(1, 5, requires_grad=True)
    optimizer = torch.optim.Adam([quantile], lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        losses.quantile_loss(quantile, samples.unsqueeze(0), 0.01).sum().backward()
        optimizer.step()
    expected = torch.quantile(samples, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    torch.testing.assert_close(quantile.detach()[0], expected, atol=0.06, rtol=0.03)


def test_huber_is_a_square_and_then_a_line() -> None:
    assert losses.huber(torch.tensor([0.5, -1.0, -3.0])).tolist() == pytest.approx([0.125, 0.5, 2.5])
    assert losses.huber(torch.tensor([3.0]), 2.0).tolist() == pytest.approx([4.0])


# ------------------------------------------------------------------------------------------------------------ schedules


def test_schedules_by_hand() -> None:
    falling = Exponential(1.0, 0.2, 100)
    assert [value_at(falling, steps) for steps in (0, 100, 200)] == pytest.approx([1.0, 0.6, 0.4])
    wave = Periodic(1.0, 0.0, 100, 50)
    assert [value_at(wave, steps) for steps in (0, 25, 50, 100)] == pytest.approx([1.0, 0.0, 0.5**0.5, 0.5])
    for shape in (falling, wave, Linear(1.0, 0.0, 10)):
        assert shape_from(plain_shape(shape)) == shape
    assert shape_from({"start": 1.0, "end": 0.2, "half_life": 100}) == falling
    assert shape_from({"linear": [1.0, 0.0]}) is None
    assert shape_from({"exponential": [1.0, 0.0, "x"]}) is None
    with pytest.raises(SpecError, match="period must be over 0, got 0"):
        Periodic(1.0, 0.0, 100, 0)


@pytest.mark.parametrize("name", ["dqn", "sarsa"])
def test_a_temperature_by_which_values_are_divided_stays_over_0(name: str) -> None:
    config_class, _ = algorithms.load(name)
    config_class(temperature=Linear(1.0, 0.0, 10))
    with pytest.raises(SpecError, match="temperature: must stay over 0"):
        config_class(exploration="boltzmann", temperature=Linear(1.0, 0.0, 10))


# --------------------------------------------------------------------------------------------------------------- target


def small(**settings: Any) -> DQN:
    memory = settings.pop("memory", Memory(capacity=100, batch_size=8, min_size=1))
    config = Config(**{"net": Net(hidden=(8,)), "memory": memory} | settings)
    return build(config, Box(-1, 1, (2,)), Discrete(3), 0)


def sample(rows: int = 6) -> Sample:
    generator = torch.Generator().manual_seed(3)
    observation, following = torch.randn(2, rows, 2, generator=generator)
    discount = torch.tensor([0.9, 0.81, 0.0] * rows)[:rows]
    reward = torch.randn(rows, generator=generator)
    action = torch.randint(3, (rows,), generator=generator)
    return Sample(observation, action, reward, following, discount, torch.ones(rows), torch.arange(rows))


def arrays(rows: Sample) -> Drawn:
    """The same as `Replay.draw` gives them."""
    columns = {name: getattr(rows, name).numpy() for name in Sample.__slots__[:-1]}
    return Drawn(**columns, extras={})


def disturbed(algorithm: DQN) -> DQN:
    """Its target network is another than the online one."""
    generator = torch.Generator().manual_seed(9)
    for parameter in algorithm.target.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator))
    return algorithm


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dueling", [False, True])
def test_the_target_row_by_row(double: bool, dueling: bool) -> None:
    algorithm, rows = disturbed(small(double=double, dueling=dueling)), sample()
    target = algorithm._target(rows)
    with torch.no_grad():
        for i in range(6):
            ours = algorithm.target(rows.next_observation[i : i + 1])[0, :, 0]
            theirs = algorithm.policy.net(rows.next_observation[i : i + 1])[0, :, 0]
            best = int(theirs.argmax()) if double else int(ours.argmax())
            assert float(target[i]) == pytest.approx(float(rows.reward[i] + rows.discount[i] * ours[best]), rel=1e-5)


def test_the_c51_target_row_by_row() -> None:
    algorithm, rows = disturbed(small(distribution="c51", num_atoms=7, v_min=-2.0, v_max=2.0)), sample()
    target = algorithm._target(rows)
    support = torch.linspace(-2, 2, 7)
    with torch.no_grad():
        for i in range(6):
            chooser = algorithm.policy.net(rows.next_observation[i : i + 1])[0].softmax(-1) @ support
            probs = algorithm.target(rows.next_observation[i : i + 1])[0, int(chooser.argmax())].softmax(-1)
            expected = projected(probs[None], rows.reward[i : i + 1], rows.discount[i : i + 1], support)[0]
            torch.testing.assert_close(target[i], expected)


def test_a_masked_action_is_no_target() -> None:
    space = Dict(seen=Box(-1, 1, (2,)), action_mask=MultiBinary(3))
    algorithm = build(Config(net=Net(hidden=(8,)), memory=Memory(capacity=10, min_size=1)), space, Discrete(3), 0)
    rows = sample()
    mask = torch.eye(3)[torch.arange(6) % 3]
    masked = Sample(
        torch.cat([rows.observation, mask], 1), rows.action, rows.reward, torch.cat([rows.next_observation, mask], 1),
        rows.discount, rows.weight, rows.index,
    )  # fmt: skip
    with torch.no_grad():
        value = algorithm.target(rows.next_observation)[..., 0]
    expected = rows.reward + rows.discount * value[torch.arange(6), torch.arange(6) % 3]
    torch.testing.assert_close(algorithm._target(masked).squeeze(1), expected)


def test_noise_of_target_selector_and_online_are_three_samples() -> None:
    algorithm = small(noisy="factorised")
    seen = []
    for net in (algorithm.target, algorithm.policy.net):
        net.register_forward_pre_hook(lambda net, _: seen.append(net.advantage[0].bias_noise.clone()))
    probes.batches(probes.vector(Ones, 2), algorithm, 1)
    acted, target, selector, online = *[seen[:4]], *seen[4:7]
    assert len(seen) == 7  # four steps acted, then one gradient step
    assert len({tuple(noise.tolist()) for noise in [*acted, target, selector, online]}) == 7


class Ones(probes.Probe):
    """Observation [2], three actions, reward 1 for ever."""

    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Discrete(3)

    def observation(self) -> Any:
        return np.zeros(2, np.float32)

    def step(self, action: Any) -> Any:
        self.time += 1
        return self.observation(), 1.0, False, self.time == 5, {}


def test_gradient_steps_and_copies_follow_env_steps_however_many_environments() -> None:
    made = []
    for envs, updates in ((1, 60), (4, 15)):
        algorithm = small(updates_per_step=0.5, target_every=40, rollout_steps=4)
        copies = []
        before = [p.clone() for p in algorithm.target.parameters()]
        for _ in range(updates):
            probes.batches(probes.vector(Ones, envs), algorithm, 1)
            now = [p.clone() for p in algorithm.target.parameters()]
            copies.append(any(not torch.equal(a, b) for a, b in zip(before, now, strict=True)))
            before = now
        made.append((algorithm.replay.env_steps, algorithm.updates, sum(copies)))
    assert made == [(240, 119, 5)] * 2  # (240 - 1) / 2 steps, copies at env steps 40, 80, ... 200


def test_polyak_goes_its_share_of_the_way() -> None:
    algorithm = disturbed(small(target_update="polyak", tau=0.25, lr=0.0))
    target, online = (next(iter(net.parameters())).detach().clone() for net in (algorithm.target, algorithm.policy.net))
    algorithm._follow()
    torch.testing.assert_close(next(iter(algorithm.target.parameters())), target + 0.25 * (online - target))


def test_exploration_follows_env_steps_and_is_saved() -> None:
    for settings, expected in (
        ({"epsilon": Linear(1.0, 0.0, 80)}, 0.6),
        ({"exploration": "boltzmann", "temperature": Linear(3.0, 1.0, 80)}, 2.2),
    ):
        algorithm = small(**settings)
        probes.batches(probes.vector(Ones, 8), algorithm, 1)
        assert float(algorithm.policy.exploration) == pytest.approx(expected)
        other = small(**settings)
        other.load_state_dict(algorithm.state_dict())
        assert float(other.policy.exploration) == pytest.approx(expected)


def test_prioritized_replay_gets_errors_and_weighs_the_loss() -> None:
    algorithm = small(memory=Memory(capacity=100, batch_size=8, min_size=1, prioritized=True, beta=1.0))
    given: list[torch.Tensor] = []
    drawn: list[Drawn] = []
    draw = algorithm.replay.draw
    algorithm.replay.draw = lambda *a: drawn.append(draw(*a)) or drawn[-1]  # type: ignore[method-assign,func-returns-value]
    algorithm.replay.update_priorities = lambda _, error: given.append(error)  # type: ignore[method-assign]
    probes.batches(probes.vector(Ones, 8), algorithm, 1)
    assert len(given) == len(drawn) == 7
    assert given[0].shape == (8,)
    assert not given[0].requires_grad


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "mse"}, {"double": False}, {"max_grad_norm": 0.01, "prioritized": True},
     {"max_grad_value": 0.02, "target_update": "polyak"}],
)  # fmt: skip
def test_a_step_by_hand_is_autograds(settings: dict[str, Any]) -> None:
    # Errors on both sides of 1 and of either sign, and weights.
    rows = dataclasses.replace(sample(64), reward=torch.linspace(-3, 3, 64), weight=torch.linspace(0.2, 1, 64))
    settings = {"max_grad_norm": None} | settings
    memory = Memory(capacity=100, batch_size=64, min_size=1, prioritized=settings.pop("prioritized", False))
    found: list[list[Any]] = []
    for way in ("numpy", "torch", "autograd"):
        algorithm = disturbed(small(memory=memory, **settings))
        chain, errors = algorithm.policy.net.chain, list[torch.Tensor]()
        assert chain is not None
        if way == "torch":
            chain.few = lambda _: False  # type: ignore[method-assign]
        if way == "autograd":
            algorithm.policy.net.chain = None
        algorithm.replay.draw = lambda *_: arrays(rows)  # type: ignore[method-assign]
        algorithm.replay.update_priorities = lambda _, error, to=errors: to.append(error)  # type: ignore[method-assign,misc]
        measured = [algorithm._step() for _ in range(3)]  # the first makes the optimizer's statistics
        if not memory.prioritized:
            errors.clear()
        found.append([measured, algorithm._online.gradient, errors, algorithm._online.whole, algorithm._followed.whole])
    assert found[2][1].norm() > 0.009
    for quick in found[:2]:
        torch.testing.assert_close(quick, found[2], rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- probes

FAST: dict[str, Any] = {
    "net": Net(hidden=(32,), activation="relu"), "memory": Memory(capacity=2_000, batch_size=32, min_size=32),
    "rollout_steps": 4, "updates_per_step": 0.5, "lr": 5e-3, "gamma": 0.8, "target_every": 64,
    "epsilon": Linear(1.0, 0.1, 500),
}  # fmt: skip
SWITCHES: list[dict[str, Any]] = [
    {},
    {"double": False, "loss": "mse", "target_update": "polyak", "tau": 0.1},
    {"dueling": True, "head_hidden": 16},
    {"noisy": "factorised", "epsilon": 0.0, "noisy_sigma": 1.0},
    {"noisy": "independent", "epsilon": 0.1, "max_grad_value": 1.0, "max_grad_norm": None},
    {"distribution": "c51", "v_min": -2.0, "v_max": 6.0, "num_atoms": 33},
    {"distribution": "qr", "num_quantiles": 8},
    {"exploration": "boltzmann", "temperature": 0.3},
    {"memory": Memory(capacity=2_000, batch_size=32, min_size=32, prioritized=True, n_steps=3, combined=True)},
    {"memory": Memory(capacity=500, batch_size=32, min_size=32, prioritized=True, eviction="sampled")},
    {
        "dueling": True, "noisy": "factorised", "epsilon": 0.0, "distribution": "c51", "v_min": -2.0, "v_max": 6.0,
        "num_atoms": 33, "head_hidden": 16,
        "memory": Memory(capacity=2_000, batch_size=32, min_size=32, prioritized=True, n_steps=3),
    },
]  # fmt: skip


def names(settings: dict[str, Any]) -> str:
    return ",".join(settings) or "plain"


def trained(make: type[probes.Probe], updates: int, **settings: Any) -> DQN:
    envs = probes.vector(make)
    algorithm = build(Config(**FAST | settings), envs.single_observation_space, envs.single_action_space, 0)
    probes.batches(envs, algorithm, updates)
    return algorithm


def values(algorithm: DQN, *observations: float) -> torch.Tensor:
    """Of each observation its actions' values [N, A]."""
    with torch.no_grad():
        net = algorithm.policy.net
        return net.mean(net(torch.tensor(observations).unsqueeze(1)))


@pytest.mark.parametrize("settings", SWITCHES, ids=names)
def test_probe_action_by_the_observation(settings: dict[str, Any]) -> None:
    algorithm = trained(probes.Imitate, 40, **settings)
    rows = np.array([[-1.0], [1.0]], np.float32)
    assert algorithm.policy.act(rows, deterministic=True)[0].tolist() == [0, 1]


@pytest.mark.parametrize("settings", [s for s in SWITCHES if "noisy" not in s], ids=names)
def test_probe_discount_over_two_steps(settings: dict[str, Any]) -> None:
    values_ = values(trained(probes.LaterReward, 60, **settings), 0.0, 1.0)
    torch.testing.assert_close(values_, torch.tensor([[0.8, 0.8], [1.0, 1.0]]), atol=0.07, rtol=0)


@pytest.mark.parametrize("settings", [s for s in SWITCHES if "noisy" not in s], ids=names)
def test_probe_time_limit_keeps_the_bootstrap(settings: dict[str, Any]) -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    settings = settings | {"updates_per_step": 1.0}
    values_ = values(trained(probes.Endless, 80, **settings), 0.0)
    torch.testing.assert_close(values_, torch.tensor([[5.0, 5.0]]), atol=0.35, rtol=0)


def test_an_invalid_row_changes_nothing() -> None:
    envs = probes.vector(probes.Imitate)
    spaces = envs.single_observation_space, envs.single_action_space
    settings = FAST | {"memory": Memory(capacity=2_000, batch_size=32, min_size=16, n_steps=3)}
    batches = probes.batches(envs, build(Config(**settings), *spaces, 0), 3)
    one, two = (build(Config(**settings), *spaces, 3) for _ in range(2))
    for batch in batches:
        clean = {name: getattr(batch, name).clone() for name in Batch.__slots__[:7]}
        clean["valid"][1, 0] = False
        dirty = {name: column.clone() for name, column in clean.items()}
        for name in ("reward", "observation", "next_observation"):
            dirty[name][1, 0] = 1e9
        a, b = one.update(Batch(**clean)), two.update(Batch(**dirty))
        assert a == pytest.approx(b, nan_ok=True)
    assert one.replay.env_steps == 3 * 31
    assert one.updates == int((93 - 16) * 0.5)
    for left, right in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(left, right)
    with pytest.raises(ValueError, match="no row"):
        one.update(Batch(**clean | {"valid": torch.zeros_like(clean["valid"])}))


@pytest.mark.parametrize("settings", SWITCHES, ids=names)
def test_going_on_from_a_save_is_going_on(settings: dict[str, Any], tmp_path: Path) -> None:
    one = trained(probes.Imitate, 3, **settings)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two = trained(probes.Imitate, 1, **settings)
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    measured = []
    for algorithm in (one, two):
        probes.batches(probes.vector(probes.Imitate), algorithm, 3, seed=5)
        batch = probes.batches(probes.vector(probes.Imitate), algorithm, 1, seed=6)[0]
        measured.append(algorithm.update(batch))
    assert measured[0] == measured[1]
    for left, right in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(left, right)


def test_wrong_settings_are_named() -> None:
    for name, value in {
        "gamma": 1.5, "rollout_steps": 0, "updates_per_step": 0.0, "num_atoms": 1, "v_min": 11.0, "noisy": "loud",
        "distribution": "c52", "loss": "l1", "target_update": "never", "exploration": "none", "head_hidden": -1,
    }.items():  # fmt: skip
        with pytest.raises(SpecError, match=rf"dqn\.{name}"):
            Config(**{name: value})  # type: ignore[arg-type]  # wrong on purpose
