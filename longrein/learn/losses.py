"""Losses and what is measured beside them: pure functions over [N] tensors of valid rows, each giving one number."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """The policy loss of PPO, to be minimised.

    See "Proximal Policy Optimization Algorithms", Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    log_ratio [N] is log pi(a|s) - log mu(a|s), where mu is the policy that acted; advantage [N]. Returns a scalar.
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error of value [N] against target [N], in squared reward units. Returns a scalar."""
    return 0.5 * (value - target).square().mean()


def clipped_value_loss(value: Tensor, target: Tensor, old_value: Tensor, clip: float) -> Tensor:
    """Value loss that gives no reward for moving further than `clip` (reward units) from old_value [N].

    Not in the paper: it is in the authors' code. Returns a scalar.
    """
    near = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - target).square(), (near - target).square()).mean()


def approx_kl(log_ratio: Tensor) -> Tensor:
    """KL(mu || pi) in nats, estimated from actions of mu: the mean of (rho - 1) - log rho, never negative.

    See "Approximating KL Divergence", Schulman 2020, estimator k3. log_ratio [N] is log pi - log mu. Returns a scalar.
    """
    return (torch.expm1(log_ratio) - log_ratio).mean()


def clip_fraction(log_ratio: Tensor, clip: float) -> Tensor:
    """The share of rows whose probability ratio lies outside [1 - clip, 1 + clip]. Returns a scalar in [0, 1]."""
    return (torch.expm1(log_ratio).abs() > clip).float().mean()


def explained_variance(value: Tensor, target: Tensor) -> float:
    """1 - Var(target - value) / Var(target), over [N]: 1 is perfect, 0 is no better than a constant, below is worse.

    NaN where the target does not vary, since nothing is there to explain.
    """
    variance = target.var(correction=0)
    if variance == 0:
        return float("nan")
    return float(1 - (target - value).var(correction=0) / variance)


def normalised(advantage: Tensor) -> Tensor:
    """Advantages [N] with mean 0 and standard deviation 1; a single one has no deviation, and comes back as it is."""
    if len(advantage) < 2:
        return advantage
    return (advantage - advantage.mean()) / (advantage.std() + 1e-8)
