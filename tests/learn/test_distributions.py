"""Distributions against sums and integrals over all their actions, and the forms of actions."""

from __future__ import annotations

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete

from longrein.errors import SpecError
from longrein.learn.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    action_form,
)


def all_actions(sizes: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(list(itertools.product(*[range(n) for n in sizes])))


FINITE: dict[str, tuple[Distribution, torch.Tensor]] = {
    # Each distribution repeated for all of its actions, so that one call gives all probabilities.
    "categorical": (Categorical(torch.tensor([[0.3, -1.0, 2.0]]).repeat(3, 1)), torch.arange(3)),
    "multi": (
        MultiCategorical(torch.tensor([[0.1, 0.7, -0.2, 1.5, 0.0]]).repeat(6, 1), (2, 3)),
        all_actions((2, 3)),
    ),
    "bernoulli": (Bernoulli(torch.tensor([[0.4, -2.0, 1.0]]).repeat(8, 1)), all_actions((2, 2, 2))),
}


@pytest.mark.parametrize("name", FINITE)
def test_probabilities_sum_to_one_and_give_the_entropy(name: str) -> None:
    distribution, actions = FINITE[name]
    log_prob = distribution.log_prob(actions)
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    assert distribution.entropy()[0].item() == pytest.approx(-(log_prob.exp() * log_prob).sum().item(), abs=1e-6)
    assert torch.equal(distribution.mode()[0], actions[log_prob.argmax()])


@pytest.mark.parametrize("name", FINITE)
def test_samples_come_as_often_as_their_probability(name: str) -> None:
    distribution, actions = FINITE[name]
    generator = torch.Generator().manual_seed(1)
    draws = torch.cat([distribution.sample(generator) for _ in range(2000)])
    for action, log_prob in zip(actions, distribution.log_prob(actions), strict=True):
        share = (draws == action).reshape(len(draws), -1).all(1).float().mean().item()
        deviation = math.sqrt(log_prob.exp().item() / len(draws))
        assert abs(share - log_prob.exp().item()) < 5 * deviation


def test_a_choice_that_is_ruled_out_leaves_a_finite_entropy() -> None:
    entropy = Categorical(torch.tensor([[0.0, 0.0, -math.inf]])).entropy()
    assert entropy.item() == pytest.approx(math.log(2))


def test_gaussian_density_integrates_to_one_and_gives_the_entropy() -> None:
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64).unsqueeze(1)
    distribution = DiagonalGaussian(torch.full_like(x, 0.7), torch.tensor([0.3], dtype=torch.float64))
    log_prob = distribution.log_prob(x)
    width = (x[1] - x[0]).item()
    assert (log_prob.exp().sum() * width).item() == pytest.approx(1.0, abs=1e-6)
    assert distribution.entropy()[0].item() == pytest.approx(
        -(log_prob.exp() * log_prob).sum().item() * width, abs=1e-5
    )


def test_gaussian_dimensions_add() -> None:
    # Two standard normals at 0: -log(2 pi) in density, log(2 pi e) in entropy.
    distribution = DiagonalGaussian(torch.zeros(1, 2), torch.zeros(2))
    assert distribution.log_prob(torch.zeros(1, 2)).item() == pytest.approx(-math.log(2 * math.pi))
    assert distribution.entropy().item() == pytest.approx(math.log(2 * math.pi * math.e))


SPACES: list[gymnasium.Space[object]] = [
    Discrete(3, start=5),
    MultiDiscrete([2, 4]),
    MultiDiscrete([[2, 4], [3, 2]]),
    MultiBinary(3),
    Box(-0.1, 0.1, (2,), np.float32),
    Box(-0.1, 0.1, (2, 3), np.float64),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actions_belong_to_their_space(space: gymnasium.Space[object]) -> None:
    form = action_form(space)
    distribution = form.distribution(torch.randn(6, form.num_parameters), torch.zeros(form.num_deviations))
    stored = distribution.sample(torch.Generator().manual_seed(0))
    sent = form.for_env(stored.numpy())
    for action in sent:
        given_ = space.dtype.type(action) if isinstance(space, Discrete) else action
        assert space.contains(given_)
    assert distribution.log_prob(stored).shape == (6,)


def test_continuous_actions_are_clipped_only_when_sent() -> None:
    form = action_form(Box(-0.1, 0.1, (2,)))
    stored = np.array([[3.0, -3.0]], np.float32)
    assert form.for_env(stored).tolist() == [[np.float32(0.1), np.float32(-0.1)]]
    assert stored.tolist() == [[3.0, -3.0]]


@pytest.mark.parametrize("space", [gymnasium.spaces.Text(4), Box(0, 255, (2,), np.uint8)], ids=str)
def test_a_space_nobody_can_act_in_is_refused(space: gymnasium.Space[object]) -> None:
    with pytest.raises(SpecError, match=r"env\.action_space"):
        action_form(space)
