"""Heads over action values, exploration, and noise in weights."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from torch import nn

from longrein.errors import SpecError
from longrein.learn.action_values import ActionValues, Head, ValuePolicy
from longrein.learn.exploration import boltzmann, boltzmann_probs, epsilon_greedy, epsilon_greedy_probs
from longrein.learn.noisy import NoisyLinear, noisy_layers, quiet, resample
from longrein.learn.torsos import Net

SPACE = Box(-1, 1, (3,))
ROWS = torch.linspace(-1, 1, 15).view(5, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(actions: torch.Tensor, choices: int) -> list[float]:
    return (torch.bincount(actions, minlength=choices) / len(actions)).tolist()  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- exploration


def test_epsilon_greedy_takes_each_action_as_often_as_it_says() -> None:
    value = torch.tensor([[0.0, 2.0, 1.0]]).expand(60_000, 3)
    probs = epsilon_greedy_probs(value[0], 0.3)
    assert probs.tolist() == pytest.approx([0.1, 0.8, 0.1])
    assert shares(epsilon_greedy(value, 0.3, generator()), 3) == pytest.approx(probs.tolist(), abs=0.006)


def test_epsilon_may_differ_from_row_to_row() -> None:
    value = torch.tensor([[0.0, 2.0]]).expand(40_000, 2)
    epsilon = torch.tensor([0.0, 1.0]).repeat(20_000)
    action = epsilon_greedy(value, epsilon, generator())
    assert action[::2].tolist() == [1] * 20_000
    assert shares(action[1::2], 2) == pytest.approx([0.5, 0.5], abs=0.01)
    assert epsilon_greedy_probs(value[:2], epsilon[:2]).tolist() == [[0.0, 1.0], [0.5, 0.5]]


def test_boltzmann_follows_its_temperature() -> None:
    # exp(1), exp(2) by temperature 0.5 of values 0.5, 1: 1 / (1 + e) = 0.2689
    value = torch.tensor([[0.5, 1.0]]).expand(60_000, 2)
    assert boltzmann_probs(value[0], 0.5).tolist() == pytest.approx([0.26894, 0.73106], abs=1e-5)
    assert shares(boltzmann(value, 0.5, generator()), 2) == pytest.approx([0.26894, 0.73106], abs=0.006)
    assert boltzmann(value, 1e-4, generator()).tolist() == [1] * 60_000


def test_a_mask_rules_actions_out() -> None:
    value = torch.tensor([[5.0, 1.0, 2.0]]).expand(30_000, 3)
    mask = torch.tensor([[False, True, True]]).expand(30_000, 3)
    assert epsilon_greedy_probs(value[0], 0.4, mask[0]).tolist() == pytest.approx([0.0, 0.2, 0.8])
    assert shares(epsilon_greedy(value, 0.4, generator(), mask), 3) == pytest.approx([0.0, 0.2, 0.8], abs=0.01)
    assert boltzmann_probs(value[0], 1.0, mask[0])[0] == 0.0
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert epsilon_greedy_probs(value[:2], 1.0, nothing).tolist() == [[pytest.approx(1 / 3)] * 3] * 2
    epsilon_greedy(value[:2], 1.0, generator(), nothing)


def test_exploring_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    epsilon_greedy(torch.zeros(3, 2), 0.5, generator())
    boltzmann(torch.zeros(3, 2), 0.5, generator())
    assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", ["independent", "factorised"])
def test_the_noise_has_the_moments_of_the_paper(kind: str) -> None:
    # Independent: E ~ N(0, 1). Factorised: f(x) = sgn(x) sqrt|x| has mean 0 and second moment E|x| = sqrt(2 / pi), so
    # E, a product of two, has variance 2 / pi, and the bias's noise sqrt(2 / pi).
    layer = NoisyLinear(4, 3, kind=kind, sigma=0.5, generator=generator())
    x = torch.tensor([[1.0, -2.0, 0.5, 0.0]])
    draws, noise = [], generator(1)
    with torch.no_grad():
        for _ in range(20_000):
            layer.resample(noise)
            draws.append(layer(x))
        mean = nn.functional.linear(x, layer.weight, layer.bias)
    y = torch.cat(draws)
    weight_variance, bias_variance = (1.0, 1.0) if kind == "independent" else (2 / np.pi, (2 / np.pi) ** 0.5)
    expected = 0.25 * (float(x.square().sum()) * weight_variance + bias_variance)
    torch.testing.assert_close(y.mean(0), mean[0], atol=0.03, rtol=0)
    assert y.var(0).tolist() == pytest.approx([expected] * 3, rel=0.06)


def test_the_start_is_that_of_the_paper() -> None:
    for kind, bound, sigma in (("independent", (3 / 16) ** 0.5, 0.017), ("factorised", 0.25, 0.125)):
        layer = NoisyLinear(16, 2_000, kind=kind, generator=generator())
        assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
        assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.02)
        assert layer.weight_sigma.detach().unique().tolist() == pytest.approx([sigma])
        assert layer.bias_sigma.detach().unique().tolist() == pytest.approx([sigma])


@pytest.mark.parametrize("kind", ["independent", "factorised"])
def test_noise_goes_on_and_off_and_stays_until_it_is_drawn_anew(kind: str) -> None:
    net = nn.Sequential(NoisyLinear(3, 4, kind=kind, generator=generator()), nn.ReLU(), nn.Linear(4, 2))
    means = net(ROWS)  # nothing drawn yet
    resample(net, generator(1))
    noisy = net(ROWS)
    assert not torch.equal(noisy, means)
    with quiet(net):
        assert torch.equal(net(ROWS), means)
    assert torch.equal(net(ROWS), noisy)
    resample(net, generator(1))
    assert torch.equal(net(ROWS), noisy)
    resample(net, generator(2))
    assert not torch.equal(net(ROWS), noisy)
    assert len(noisy_layers(net)) == 1


def test_deviations_learn() -> None:
    layer = NoisyLinear(3, 2, kind="factorised", generator=generator())
    layer.resample(generator())
    layer(ROWS).square().sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in layer.parameters() if p.grad is not None)
    assert len([p for p in layer.parameters() if p.grad is not None]) == 4


# ---------------------------------------------------------------------------------------------------------------- heads


def test_a_dueling_head_is_value_plus_centred_advantages() -> None:
    net = ActionValues(SPACE, 4, Net(hidden=(8,)), Head(dueling=True), generator())
    assert net.value is not None
    said = net.mean(net(ROWS))
    features = net.torso(ROWS)
    torch.testing.assert_close(said.mean(1), net.value(features).squeeze(1))
    advantage = net.advantage(features)
    torch.testing.assert_close(said[:, 1] - said[:, 0], advantage[:, 1] - advantage[:, 0])


def test_a_dueling_torso_gets_its_gradient_by_the_root_of_two() -> None:
    net = ActionValues(SPACE, 2, Net(hidden=(8,)), Head(dueling=True), generator())
    parameters = list(net.torso.parameters())
    loss = net(ROWS).square().sum()
    scaled = torch.autograd.grad(loss, parameters)
    features = net.torso(ROWS)
    said = net.advantage(features).view(5, 2, 1)
    assert net.value is not None
    said = said - said.mean(1, keepdim=True) + net.value(features).unsqueeze(1)
    plain = torch.autograd.grad(said.square().sum(), parameters)
    for one, other in zip(scaled, plain, strict=True):
        torch.testing.assert_close(one, other / 2**0.5)


def test_values_are_means_of_what_is_said() -> None:
    c51 = ActionValues(SPACE, 2, Net(hidden=()), Head(distribution="c51", outputs=3, low=-1.0, high=1.0), generator())
    said = torch.tensor([[[0.0, 0.0, 0.0], [-1e9, -1e9, 0.0]]])  # even over -1, 0, 1; and all on 1
    assert c51.mean(said).tolist() == [[0.0, 1.0]]
    qr = ActionValues(SPACE, 2, Net(hidden=()), Head(distribution="qr", outputs=3), generator())
    assert qr.mean(torch.tensor([[[1.0, 2.0, 6.0]]])).tolist() == [[3.0]]
    assert c51(ROWS).shape == qr(ROWS).shape == (5, 2, 3)


def policy(space: gymnasium.Space[object] = SPACE, **settings: object) -> ValuePolicy:
    head = settings.pop("head", Head())
    assert isinstance(head, Head)
    return ValuePolicy(space, Discrete(3, start=5), Net(hidden=(8,)), head, exploration=0.0, generator=generator())


def test_a_noisy_policy_explores_by_its_noise_alone_and_is_quiet_when_deterministic() -> None:
    noisy = policy(head=Head(noisy="factorised", sigma=5.0))
    rows = np.zeros((1, 3), np.float32)
    draws = generator()
    assert len({int(noisy.act(rows, False, draws)[0][0]) for _ in range(50)}) > 1
    assert len({int(noisy.act(rows, True, draws)[0][0]) for _ in range(50)}) == 1
    assert not any(layer.quiet for layer in noisy_layers(noisy))
    assert int(noisy.for_env(noisy.act(rows, True)[0])[0]) in (5, 6, 7)


def test_a_mask_in_the_observation_is_heeded() -> None:
    space = Dict(seen=SPACE, action_mask=MultiBinary(3))
    masked = policy(space)
    masked.exploration.fill_(0.5)
    allowed = np.eye(3, dtype=np.int8)[np.arange(200) % 3]
    rows = masked.encode({"seen": np.zeros((200, 3), np.float32), "action_mask": allowed})
    for deterministic in (True, False):
        assert masked.act(rows, deterministic, generator())[0].tolist() == (np.arange(200) % 3).tolist()


def test_what_has_no_action_values_is_refused() -> None:
    with pytest.raises(SpecError, match="action_space"):
        ValuePolicy(SPACE, Box(-1, 1, (2,)), Net(), Head(), exploration=0.0)
    with pytest.raises(SpecError, match="recurrent"):
        ValuePolicy(SPACE, Discrete(2), Net(recurrent="gru"), Head(), exploration=0.0)
    with pytest.raises(SpecError, match="noisy"):
        NoisyLinear(2, 2, kind="loud")


def test_a_copy_explores_as_it_is_told() -> None:
    policy = ValuePolicy(SPACE, Discrete(3), Net(hidden=(8,)), Head(), exploration=0.0, generator=generator())
    rows = np.tile(ROWS.numpy()[:1], (300, 1))
    assert len(set(policy.act(rows, generator=generator())[0].tolist())) == 1
    other = copy.deepcopy(policy)
    other.explore(1.0)
    assert float(other.exploration) == 1.0
    assert len(set(other.act(rows, generator=generator())[0].tolist())) == 3
    assert len(set(policy.act(rows, generator=generator())[0].tolist())) == 1
    policy.load_state_dict(other.state_dict())
    assert len(set(policy.act(rows, generator=generator())[0].tolist())) == 3
