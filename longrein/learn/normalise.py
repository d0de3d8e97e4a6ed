"""Running statistics, and what PPO scales by them: observations and rewards. Invalid rows never count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RunningMoments(nn.Module):
    """Mean and variance of all rows seen so far; buffers, so that they travel with the weights.

    Merged by "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", Chan et al. 1979.
    Before the first row the mean is 0 and the variance 1.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        # float64: the mean of 1e8 rows must still move, and the difference of squares must not cancel.
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Take in rows [N, *shape], all of them valid."""
        if len(rows) == 0:
            return
        rows = rows.double()
        count = self.count + len(rows)
        shift = rows.mean(0) - self.mean
        spread = rows.var(0, correction=0) * len(rows) + shift.square() * self.count * len(rows) / count
        # With count 0 the placeholder variance of 1 weighs nothing.
        self.variance.copy_((self.variance * self.count + spread) / count)
        self.mean.add_(shift * len(rows) / count)
        self.count.copy_(count)


class ObservationNormaliser(nn.Module):
    """(x - mean) / deviation, clipped; part of the model, so that an exported policy cannot lose it.

    See "What Matters for On-Policy Deep Actor-Critic Methods?", Andrychowicz et al. 2021, C64 (arXiv:2006.05990).
    """

    def __init__(self, size: int, clip: float) -> None:
        super().__init__()
        self.moments = RunningMoments((size,))
        self.clip = clip  # deviations

    def forward(self, observation: Tensor) -> Tensor:
        """Observations [..., size] -> the same shape, float32."""
        deviation = (self.moments.variance + 1e-8).sqrt()
        return ((observation - self.moments.mean) / deviation).clamp(-self.clip, self.clip).float()


class RewardScale:
    """Divides rewards by the deviation of the running discounted return; the mean stays, since its sign has a meaning.

    See "Implementation Matters in Deep Policy Gradients", Engstrom et al. 2020, section 3 (arXiv:2005.12729).
    One running return for each of the B environments, reset where an episode ends.
    """

    def __init__(self, gamma: float, clip: float) -> None:
        self.gamma = gamma
        self.clip = clip  # deviations
        self.moments = RunningMoments()
        self.running: Tensor | None = None  # [B], the return so far

    def scale(self, reward: Tensor, done: Tensor, valid: Tensor) -> Tensor:
        """Take in the next T steps of B environments, then scale them: all [T, B]. Raises ValueError if B changes."""
        running = torch.zeros_like(reward[0]) if self.running is None else self.running
        if running.shape != reward[0].shape:
            raise ValueError(f"reward: expected {len(running)} environments as before, got {reward.shape[1]}")
        seen = torch.empty_like(reward)
        for t in range(len(reward)):
            running = torch.where(valid[t], self.gamma * running + reward[t], running)
            seen[t] = running
            # An episode also ends in an invalid row: one that was lost with its environment.
            running = running * ~done[t]
        self.running = running
        self.moments.update(seen[valid])
        return (reward / (self.moments.variance + 1e-8).sqrt()).clamp(-self.clip, self.clip).float()

    def state_dict(self) -> dict[str, Any]:
        """All that decides later scaling."""
        return {"moments": self.moments.state_dict(), "running": self.running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.moments.load_state_dict(state["moments"])
        self.running = state["running"]
