"""Batch renormalization: batch normalization whose training agrees with its use. Knows no network around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BatchRenorm(nn.Module):
    """Features to mean 0 and deviation 1, then scaled and shifted; for K networks of one form side by side.

    See "Batch Renormalization", Ioffe 2017, algorithm 1 (arXiv:1702.03275). With mu_B, sigma_B those of the batch and
    mu, sigma the running ones, all without gradient where they stand in r and d:
        r = clip(sigma_B / sigma, 1 / r_max, r_max),  d = clip((mu_B - mu) / sigma, -d_max, d_max)
        training:  y = gamma ((x - mu_B) / sigma_B r + d) + beta;  otherwise:  y = gamma (x - mu) / sigma + beta
    For the first `warmup` training passes r is 1 and d is 0, which is batch normalization, until mu and sigma are worth
    something. The switch is a step, as CrossQ's authors have it; Ioffe raises the limits little by little.
    `train` is an argument, not a mode: an actor in the same process can then not act in the learner's mode.
    """

    mean: Tensor
    deviation: Tensor
    passes: Tensor

    def __init__(
        self,
        features: int,
        copies: int = 1,
        *,
        momentum: float = 0.99,
        warmup: int = 100_000,
        r_max: float = 3.0,
        d_max: float = 5.0,
        epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        self.momentum = momentum  # share of the running statistics that one training pass keeps
        self.warmup = warmup  # training passes
        self.r_max, self.d_max = r_max, d_max
        self.epsilon = epsilon  # added to the variance
        self.gamma = nn.Parameter(torch.ones(copies, 1, features))
        self.beta = nn.Parameter(torch.zeros(copies, 1, features))
        self.register_buffer("mean", torch.zeros(copies, 1, features))
        self.register_buffer("deviation", torch.ones(copies, 1, features))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))  # training passes so far

    def forward(self, x: Tensor, train: bool = False) -> Tensor:
        """[K, N, F] -> the same; statistics over N. With `train` those of the batch, and the running ones follow."""
        if not train:
            slope = self.gamma / self.deviation
            return torch.addcmul(self.beta - self.mean * slope, x, slope)
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        deviation = (variance + self.epsilon).sqrt()
        scale: Tensor = self.gamma / deviation
        shift: Tensor = self.beta
        if int(self.passes) >= self.warmup:
            with torch.no_grad():
                r = (deviation / self.deviation).clamp(1.0 / self.r_max, self.r_max)
                d = ((mean - self.mean) / self.deviation).clamp(-self.d_max, self.d_max)
            scale, shift = scale * r, shift + self.gamma * d
        with torch.no_grad():
            self.mean.lerp_(mean, 1.0 - self.momentum)
            self.deviation.lerp_(deviation, 1.0 - self.momentum)
            self.passes += 1
        return torch.addcmul(shift, x - mean, scale)
