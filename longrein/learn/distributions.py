"""Distributions over actions, and the form of an action in its space. Knows probabilities, no network.

Ours rather than torch.distributions: they take a generator, check nothing on the hot path, and cost a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError


class Distribution(Protocol):
    """N independent distributions over one action each."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One action for each: [N, ...]."""

    def mode(self) -> Tensor:
        """The likeliest action for each: [N, ...]."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability (or log-density) of actions [N, ...]: [N], in nats."""

    def entropy(self) -> Tensor:
        """Entropy of each: [N], in nats (differential for densities, so it may be negative)."""


class Categorical:
    """One of K choices: actions int64 [N]."""

    def __init__(self, logits: Tensor) -> None:
        self.log_probs = logits.log_softmax(-1)  # [N, K]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions int64 [N]."""
        return torch.multinomial(self.log_probs.exp(), 1, generator=generator).squeeze(-1)

    def mode(self) -> Tensor:
        """Actions int64 [N]; the first of equals."""
        return self.log_probs.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """[N], in nats."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """[N], in nats."""
        # A finite stand-in for log 0: 0 * -inf is NaN, 0 * -1e9 is 0.
        return -(self.log_probs.exp() * self.log_probs.clamp(min=-1e9)).sum(-1)


class MultiCategorical:
    """K independent choices, each with its own number of options: actions int64 [N, K]. Logs and entropies add."""

    def __init__(self, logits: Tensor, sizes: tuple[int, ...]) -> None:
        self.parts = [Categorical(part) for part in torch.split(logits, list(sizes), -1)]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions int64 [N, K]."""
        return torch.stack([part.sample(generator) for part in self.parts], -1)

    def mode(self) -> Tensor:
        """Actions int64 [N, K]."""
        return torch.stack([part.mode() for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """[N], in nats."""
        parts = zip(self.parts, action.unbind(-1), strict=True)
        return torch.stack([part.log_prob(choice) for part, choice in parts]).sum(0)

    def entropy(self) -> Tensor:
        """[N], in nats."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)


class Bernoulli:
    """K independent yes-or-no choices: actions int64 [N, K], 0 or 1."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # [N, K]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions int64 [N, K]."""
        return torch.bernoulli(self.logits.sigmoid(), generator=generator).long()

    def mode(self) -> Tensor:
        """Actions int64 [N, K]; 0 of equals."""
        return (self.logits > 0).long()

    def log_prob(self, action: Tensor) -> Tensor:
        """[N], in nats."""
        # log sigmoid(x) for 1, log sigmoid(-x) for 0.
        return torch.nn.functional.logsigmoid(self.logits * (2 * action - 1)).sum(-1)

    def entropy(self) -> Tensor:
        """[N], in nats."""
        logsigmoid = torch.nn.functional.logsigmoid
        p = self.logits.sigmoid()
        return -(p * logsigmoid(self.logits) + (1 - p) * logsigmoid(-self.logits)).sum(-1)


class DiagonalGaussian:
    """K independent normal variables, unbounded: actions float32 [N, K]. log_std [K] or [N, K]."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std.expand_as(mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions float32 [N, K]."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        """Actions float32 [N, K]."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density [N], in nats."""
        z = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy [N], in nats."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


@dataclass(frozen=True)
class ActionForm:
    """How a policy's output becomes a distribution, and its action an action of the space."""

    num_parameters: int
    """Numbers that the network gives for one observation."""
    distribution: Callable[[Tensor, Tensor | None], Distribution]
    """(network output [N, num_parameters], log_std [K] or None) -> Distribution."""
    for_env: Callable[[NDArray[Any]], NDArray[Any]]
    """Stored actions [N, ...] -> what the environment takes: shaped, shifted, clipped to its bounds."""
    num_deviations: int = 0
    """Standard deviations to learn beside the network's output; 0 for choices."""


def action_form(space: gymnasium.Space[Any]) -> ActionForm:
    """The form of one environment's actions: Discrete, MultiDiscrete, MultiBinary or a float Box.

    A Box's actions are stored unclipped, since their density is that of the unclipped variable.
    Raises SpecError for any other space.
    """
    if isinstance(space, Discrete):
        first = int(space.start)
        return ActionForm(int(space.n), lambda output, _: Categorical(output), lambda action: action + first)
    if isinstance(space, MultiDiscrete):
        sizes = tuple(int(n) for n in space.nvec.reshape(-1))
        shape, firsts = space.nvec.shape, space.start
        return ActionForm(
            sum(sizes),
            lambda output, _: MultiCategorical(output, sizes),
            lambda action: action.reshape(-1, *shape) + firsts,
        )
    if isinstance(space, MultiBinary):
        form = space.shape
        return ActionForm(
            math.prod(form),
            lambda output, _: Bernoulli(output),
            lambda action: action.reshape(-1, *form).astype(np.int8),
        )
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        low, high = space.low, space.high
        size = math.prod(space.shape)
        return ActionForm(
            size,
            _gaussian,
            lambda action: action.reshape(-1, *space.shape).clip(low, high).astype(space.dtype),
            num_deviations=size,
        )
    raise SpecError(
        "env.action_space",
        f"a policy cannot act in {space}",
        hint="Discrete, MultiDiscrete, MultiBinary and float Box will do; wrap the environment to give one of them",
    )


def _gaussian(output: Tensor, log_std: Tensor | None) -> Distribution:
    assert log_std is not None, "a Box needs deviations"
    return DiagonalGaussian(output, log_std)
