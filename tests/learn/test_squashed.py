"""The squashed normal distribution against numeric integration, and bounded actions against their bounds."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from longrein.errors import SpecError
from longrein.learn.bounded import SquashedGaussian, bounded_form


def one(mean: float, std: float) -> SquashedGaussian:
    return SquashedGaussian(
        torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[math.log(std)]], dtype=torch.float64)
    )


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.3), (-1.5, 0.7), (0.0, 0.05)])
def test_the_density_integrates_to_one_and_to_the_normal_probability(mean: float, std: float) -> None:
    # Midpoints, fine towards the bounds where the density of a wide distribution rises.
    edges = torch.linspace(-9, 9, 200_001, dtype=torch.float64).tanh()
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1:] - edges[:-1]
    mass = one(mean, std).log_prob(middle.unsqueeze(1)).exp() * width
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-5)
    # P(a < 0.3) = P(u < atanh 0.3), by the normal's own distribution function.
    below = 0.5 * (1 + math.erf((math.atanh(0.3) - mean) / (std * math.sqrt(2))))
    assert float(mass[middle < 0.3].sum()) == pytest.approx(below, abs=1e-4)


def test_a_sample_comes_with_its_own_log_density() -> None:
    generator = torch.Generator().manual_seed(0)
    distribution = SquashedGaussian(torch.tensor([[0.3, -0.2]]).repeat(1000, 1), torch.full((1000, 2), -0.5))
    action, log_prob = distribution.rsample(generator)
    torch.testing.assert_close(log_prob, distribution.log_prob(action), atol=2e-3, rtol=1e-3)


def test_by_hand() -> None:
    # u = 0.5 of N(0, 1): -0.125 - 0.9189385 - log(1 - tanh(0.5)^2) = -1.0439385 + 0.2402290 (tanh 0.5 = 0.4621172)
    action = torch.tensor([[math.tanh(0.5)]], dtype=torch.float64)
    assert float(one(0.0, 1.0).log_prob(action)) == pytest.approx(-1.0439385 + 0.2402290, abs=1e-6)


def test_far_out_the_density_and_its_gradient_stay_finite() -> None:
    # tanh(20) is 1 in float32: log(1 - tanh^2) would be -inf; it is 2 (log 2 - 20) to within e^-40.
    mean = torch.tensor([[20.0]], requires_grad=True)
    action, log_prob = SquashedGaussian(mean, torch.tensor([[-10.0]])).rsample(torch.Generator().manual_seed(0))
    normal = log_prob.item() + 2 * (math.log(2) - 20.0)
    assert normal == pytest.approx(10.0 - 0.5 * math.log(2 * math.pi), abs=2.0)  # less half the square of the noise
    log_prob.sum().backward()
    assert mean.grad is not None
    assert float(mean.grad) == pytest.approx(2.0, abs=1e-4)  # d/du of -2 (log 2 - u - softplus(-2u)) is 2 tanh(u)
    assert action.item() == 1.0
    assert math.isfinite(float(one(0.0, 1.0).log_prob(torch.tensor([[1.0]], dtype=torch.float64))))


def test_the_gradient_of_the_log_density_is_that_of_finite_differences() -> None:
    def log_prob(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
        return SquashedGaussian(mean, log_std).rsample(torch.Generator().manual_seed(3))[1]

    mean = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    log_std = torch.full((4, 2), -0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_prob, (mean, log_std))


def test_the_same_generator_gives_the_same_actions() -> None:
    distribution = SquashedGaussian(torch.zeros(5, 2), torch.zeros(5, 2))
    first, second = (distribution.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, distribution.rsample(torch.Generator().manual_seed(7))[0])
    assert torch.equal(one(0.7, 0.1).mode(), torch.tensor([[0.7]], dtype=torch.float64).tanh())


def test_actions_are_scaled_to_the_bounds() -> None:
    form = bounded_form(Box(np.array([[-2.0, 0.0]], np.float32), np.array([[2.0, 10.0]], np.float32)))
    assert form.size == 2
    given = form.for_env(np.array([[-1.0, -1.0], [0.0, 0.5], [1.0, 1.0]], np.float32))
    np.testing.assert_array_equal(given, [[[-2.0, 0.0]], [[0.0, 7.5]], [[2.0, 10.0]]])
    assert given.dtype == np.float32


def test_scaled_actions_lie_in_the_space() -> None:
    rng = np.random.default_rng(0)
    space = Box(np.float32(-0.1), np.float32(0.7), (3,))
    for action in bounded_form(space).for_env(rng.choice([-1.0, 1.0, 0.3], (100, 3)).astype(np.float32)):
        assert space.contains(action)


@pytest.mark.parametrize(
    "space", [Discrete(2), Box(-np.inf, np.inf, (1,)), Box(0, 5, (1,), np.int64), Box(0.0, np.inf, (2,))], ids=str
)
def test_other_spaces_are_refused(space: gymnasium.Space[object]) -> None:
    with pytest.raises(SpecError, match="action_space"):
        bounded_form(space)
