"""Actions between bounds: kept in [-1, 1], scaled for the environment, and a normal distribution squashed into that.

Knows spaces and probabilities, no network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError


@dataclass(frozen=True)
class BoundedForm:
    """Actions of a bounded float Box, kept as float32 [N, size] in [-1, 1], whose ends are the bounds of the space."""

    space: Box

    @property
    def size(self) -> int:
        """Numbers in one action."""
        return math.prod(self.space.shape)

    def for_env(self, action: NDArray[Any]) -> NDArray[Any]:
        """Kept actions [N, size] -> what the environment takes: shaped and scaled to its bounds."""
        low, high = self.space.low, self.space.high
        share = 0.5 * (action.reshape(-1, *self.space.shape).astype(np.float64) + 1.0)
        # Clipped, since what was within bounds in float64 may be outside in the space's own precision.
        between: NDArray[Any] = (low + share * (high.astype(np.float64) - low)).astype(self.space.dtype).clip(low, high)
        return between


def bounded_form(space: gymnasium.Space[Any]) -> BoundedForm:
    """The form of one environment's actions for a policy that acts in [-1, 1]. Raises SpecError unless it can."""
    if not isinstance(space, Box) or not np.issubdtype(space.dtype, np.floating):
        raise SpecError(
            "env.action_space",
            f"a policy of bounded actions cannot act in {space}",
            hint="a float Box with bounds will do; for other actions take ppo",
        )
    if not space.is_bounded("both"):
        raise SpecError(
            "env.action_space",
            f"{space} has no bounds to scale actions to",
            hint="give it some with gymnasium.wrappers.TransformAction, or take ppo",
        )
    return BoundedForm(space)


class SquashedGaussian:
    """tanh of K independent normal variables: actions float32 [N, K] in [-1, 1]. mean and log_std [N, K], before it.

    See "Soft Actor-Critic", Haarnoja et al. 2018, appendix C, eq. 21 (arXiv:1801.01290). Its log(1 - tanh(u)^2) is
    2 (log 2 - u - softplus(-2u)) here: exact far out too, where tanh is 1 in float32 and the logarithm has no gradient.
    There is no entropy in closed form; the mean of -log_prob over samples estimates it.
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std

    def rsample(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """One action for each, with gradient: (actions [N, K], their log-densities [N] in nats)."""
        drawn = self.draw(generator)
        return drawn.action, drawn.log_prob

    def draw(self, generator: torch.Generator | None = None) -> Draw:
        """One action for each, as `rsample` gives it."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        spread = self.log_std.exp() * noise
        u = self.mean + spread
        return Draw(u.tanh(), self._log_density(noise, u), spread)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions float32 [N, K]."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return (self.mean + self.log_std.exp() * noise).tanh()

    def mode(self) -> Tensor:
        """Actions float32 [N, K]: tanh of the mean, the median of each; the density's own peak may lie at a bound."""
        return self.mean.tanh()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of actions in [-1, 1]: [N], in nats. An action at a bound counts as the nearest one inside."""
        inside = 1.0 - torch.finfo(action.dtype).eps
        u = action.clamp(-inside, inside).atanh()
        return self._log_density((u - self.mean) * (-self.log_std).exp(), u)

    def _log_density(self, z: Tensor, u: Tensor) -> Tensor:
        """u [N, K], and z [N, K], how many deviations it lies from the mean: [N]."""
        normal = -0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)
        squash = 2.0 * (math.log(2.0) - u - torch.nn.functional.softplus(-2.0 * u))
        return (normal - squash).sum(-1)


@dataclass(frozen=True, slots=True)
class Draw:
    """N actions of a squashed Gaussian, with the way back by hand."""

    action: Tensor  # [N, K]
    log_prob: Tensor  # [N]
    spread: Tensor  # [N, K], from the mean to the normal variable

    def back(self, by_action: Tensor, by_log_prob: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradients of a loss by action [N, K] and log_prob (one number for all) to those by mean and log_std.

        The noise is what it is: with u = mean + exp(log_std) noise and a = tanh(u), da/du = 1 - a^2 and
        d log_prob / du = 2 a; on log_std the log-density depends by -log_std besides.
        """
        by_u = by_action * (1.0 - self.action.square()) + 2.0 * by_log_prob * self.action
        return by_u, by_u * self.spread - by_log_prob
