"""Losses, what is measured beside them, and ACER's directions: pure functions over [N] tensors of valid rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


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


def ensemble_value_loss(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The loss of K critics that learn the same target: the sum over K of half the weighted mean squared error.

    See "Soft Actor-Critic", Haarnoja et al. 2018, eq. 7 (arXiv:1801.01290), once for each critic.
    values [K, N]; target, weight [N], without gradient. In squared reward units. Returns a scalar.
    """
    return 0.5 * (weight * (values - target).square()).mean(1).sum()


def ensemble_value_slope(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `ensemble_value_loss` by values: [K, N], in reward units."""
    return weight * (values - target) / len(target)


def temperature_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """What raises alpha where the policy has less than the target entropy, and lowers it where it has more.

    See "Soft Actor-Critic Algorithms and Applications", Haarnoja et al. 2018, eq. 18 (arXiv:1812.05905).
    log_alpha: scalar; log_prob [N] of the policy's own actions, in nats (no gradient goes there). Returns a scalar.
    """
    return -(log_alpha.exp() * (log_prob.detach() + target_entropy)).mean()


def mean_measured(names: Sequence[str], measured: Sequence[Tensor]) -> dict[str, float]:
    """Means by name over rows of measurements [len(names)], leaving NaN out; NaN for what was never measured."""
    if not measured:
        return dict.fromkeys(names, math.nan)
    means = torch.stack(tuple(measured)).nanmean(0) if len(measured) > 1 else measured[0]
    return dict(zip(names, means.tolist(), strict=True))


def mean_of_numbers(names: Sequence[str], measured: Sequence[Sequence[float]]) -> dict[str, float]:
    """As `mean_measured`, of rows that are numbers already."""
    if len(measured) == 1:
        return dict(zip(names, measured[0], strict=True))
    columns = zip(*measured, strict=True) if measured else [()] * len(names)
    kept = [[number for number in column if number == number] for column in columns]  # NaN is not even itself
    means = [sum(column) / len(column) if column else math.nan for column in kept]
    return dict(zip(names, means, strict=True))


def policy_gradient(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """The loss whose gradient is minus the policy gradient: -mean of log pi(a|s) times advantage.

    See "Simple Statistical Gradient-Following Algorithms", Williams 1992, theorem 1 (Machine Learning 8).
    log_prob [N] of the actions taken; advantage [N], a constant: no gradient flows into it. Returns a scalar.
    """
    return -(log_prob * advantage.detach()).mean()


def quick_policy_gradient(
    logits: NDArray[np.float32], action: NDArray[np.int64], advantage: NDArray[np.float32], entropy_weight: float
) -> tuple[float, float, NDArray[np.float32]]:
    """`policy_gradient` and the mean entropy of choices by their logits [N, A], and the gradient of the loss with both.

    In NumPy, for few rows. action [N]; advantage [N]. Returns (the loss of the policy, the entropy in nats, the
    gradient of loss - entropy_weight * entropy by the logits [N, A]).
    """
    count, choices = logits.shape
    log_probs = logits - logits.max(1, keepdims=True)
    probs = np.exp(log_probs)
    total = probs.sum(1, keepdims=True)
    probs /= total
    log_probs -= np.log(total)
    taken = np.arange(0, count * choices, choices) + action
    # d -log pi(a) / d logits = pi - onehot(a), and d entropy / d logits = -pi (log pi + entropy).
    gradient = probs * advantage[:, None]
    gradient.ravel()[taken] -= advantage
    weighted = probs * log_probs
    entropy = -weighted.sum(1, keepdims=True)
    if entropy_weight:
        gradient += entropy_weight * (weighted + probs * entropy)
    gradient /= count
    return -float(log_probs.take(taken).dot(advantage)) / count, float(entropy.sum()) / count, gradient


def self_imitation(log_prob: Tensor, value: Tensor, return_: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Learn from past actions that turned out better than expected: (policy loss, value loss), two scalars.

    See "Self-Imitation Learning", Oh et al. 2018, eq. 2 and 3 (arXiv:1806.05635): -log pi(a|s) (R - V(s))_+ and
    0.5 (R - V(s))_+^2, where only the second has a gradient in V. All [N]; weight is that of prioritized drawing.
    """
    better = (return_ - value).clamp(min=0.0)
    return -(weight * log_prob * better.detach()).mean(), 0.5 * (weight * better.square()).mean()


def categorical_ascent(
    log_pi: Tensor,
    log_mu: Tensor,
    action: Tensor,
    action_value: Tensor,
    target: Tensor,
    value: Tensor,
    *,
    truncation: float,
) -> Tensor:
    """Which way ACER moves a state's logits: the truncated gradient with its bias correction, before any trust region.

    See "Sample Efficient Actor-Critic with Experience Replay", Wang et al. 2017, eq. 9 (arXiv:1611.01224).
    log_pi, log_mu [..., A], of the policy and of the one that acted; action int64 [...]; action_value [..., A] is
    Q(s, .); target [...] is Retrace's for the action; value [...] is sum_a pi Q. Returns the direction of ascent
    [..., A] for each state by itself, never a mean: a trust region of a mean over N would be N times too wide.
    """
    pi = log_pi.exp()
    log_rho = log_pi - log_mu
    taken = log_rho.gather(-1, action.unsqueeze(-1)).exp().clamp(max=truncation) * (target - value).unsqueeze(-1)
    # d log pi(a) / d logits = onehot(a) - pi
    ascent = torch.zeros_like(log_pi).scatter(-1, action.unsqueeze(-1), taken) - pi * taken
    # pi (1 - c / rho)+, by logs: with c = inf it is 0 for every rho.
    beyond = pi * (1 - torch.exp(math.log(truncation) - log_rho)).clamp(min=0.0)
    correction = beyond * (action_value - value.unsqueeze(-1))
    return ascent + correction - pi * correction.sum(-1, keepdim=True)


def categorical_entropy_ascent(log_pi: Tensor) -> Tensor:
    """The gradient of a categorical's entropy by its logits: log_pi [..., A] -> [..., A], in nats."""
    pi = log_pi.exp()
    entropy = -(pi * log_pi).sum(-1, keepdim=True)
    return -pi * (log_pi + entropy)


def gaussian_score(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """The gradient of a diagonal Gaussian's log-density by (mean, log_std): each [..., d] -> [..., 2 d]."""
    z = (action - mean) * (-log_std).exp()
    return torch.cat([z * (-log_std).exp(), z.square() - 1], -1)


def gaussian_ascent(
    mean: Tensor,
    log_std: Tensor,
    action: Tensor,
    log_ratio: Tensor,
    advantage: Tensor,
    drawn: Tensor,
    drawn_log_ratio: Tensor,
    drawn_advantage: Tensor,
    *,
    truncation: float,
) -> Tensor:
    """Which way ACER moves a state's mean and log deviation: `categorical_ascent` with one drawn action for the sum.

    See "Sample Efficient Actor-Critic with Experience Replay", Wang et al. 2017, eq. 14 (arXiv:1611.01224).
    mean, log_std, action (of mu, the policy that acted) and drawn (of pi) [..., d]; log pi - log mu of both [...];
    advantage [...] is Q^opc - V, drawn_advantage [...] Q~(s, drawn) - V. Returns [..., 2 d], for each state by itself.
    """
    taken = log_ratio.exp().clamp(max=truncation) * advantage
    beyond = (1 - torch.exp(math.log(truncation) - drawn_log_ratio)).clamp(min=0.0) * drawn_advantage
    scores = gaussian_score(mean, log_std, action), gaussian_score(mean, log_std, drawn)
    return taken.unsqueeze(-1) * scores[0] + beyond.unsqueeze(-1) * scores[1]


def gaussian_kl(old_mean: Tensor, old_log_std: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(old || new) between diagonal Gaussians, in nats: each [..., d] -> [...].

    log(std / old_std) + (old_std^2 + (mean - old_mean)^2) / (2 std^2) - 1/2, summed over d.
    """
    spread = (2 * old_log_std).exp() + (mean - old_mean).square()
    return (log_std - old_log_std + 0.5 * spread * (-2 * log_std).exp() - 0.5).sum(-1)


def gaussian_kl_ascent(mean: Tensor, log_std: Tensor, old_mean: Tensor, old_log_std: Tensor) -> Tensor:
    """The gradient of `gaussian_kl`, KL(old || new), by the new (mean, log_std): each [..., d] -> [..., 2 d]."""
    variance = (2 * log_std).exp()
    by_mean = (mean - old_mean) / variance
    by_log_std = 1 - ((2 * old_log_std).exp() + (mean - old_mean).square()) / variance
    return torch.cat([by_mean, by_log_std], -1)


def trust_region(ascent: Tensor, kl_gradient: Tensor, delta: float) -> tuple[Tensor, Tensor]:
    """The direction nearest to `ascent` along which KL(average || pi) grows by at most `delta` nats.

    See "Sample Efficient Actor-Critic with Experience Replay", Wang et al. 2017, eq. 12 (arXiv:1611.01224); its
    quadratic program has this closed form.
    ascent, kl_gradient [..., A]: of each state, by the statistics of its distribution.
    Returns (direction [..., A], bool [...]: where the region was left and the direction bent).
    """
    excess = (kl_gradient * ascent).sum(-1, keepdim=True) - delta
    # Where k = 0, excess is -delta: never positive, and 0 / tiny is 0.
    tiny = torch.finfo(ascent.dtype).tiny
    pull = (excess / kl_gradient.square().sum(-1, keepdim=True).clamp(min=tiny)).clamp(min=0.0)
    return ascent - pull * kl_gradient, excess.squeeze(-1) > 0


def huber(error: Tensor, delta: float = 1.0) -> Tensor:
    """Half the square of an error within `delta`, and beyond it a line whose slope is delta: [...] -> [...].

    See "Human-level control through deep reinforcement learning", Mnih et al. 2015, methods (Nature 518): clipping the
    error term to [-1, 1] is this with delta 1. delta is in units of the error.
    """
    return nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def c51_projection(probs: Tensor, reward: Tensor, discount: Tensor, support: Tensor) -> Tensor:
    """The distribution of r + D z, put back on the atoms it began with: each particle splits between its neighbours.

    See "A Distributional Perspective on Reinforcement Learning", Bellemare et al. 2017, eq. 7 and algorithm 1
    (arXiv:1707.06887). probs [N, Z] on the atoms support [Z], evenly spaced; reward, discount [N], where discount is 0
    after termination. What leaves the support goes to its end. Returns [N, Z], each row of the mass it had.
    """
    atoms = len(support)
    low, high = support[0], support[-1]
    moved = torch.addcmul(reward.unsqueeze(1), discount.unsqueeze(1), support).clamp(low, high)
    place = ((moved - low) * ((atoms - 1) / (high - low))).clamp(0, atoms - 1)
    # The lower neighbour is never the last atom: a particle on an atom then has an upper share of 0 or 1, where
    # floor and ceil would be the same atom with a share of 0 each, and its mass would be lost.
    lower = place.floor().clamp(max=atoms - 2)
    upper_share = place - lower
    index = lower.long()
    projected = torch.zeros_like(probs)
    projected.scatter_add_(1, index, probs * (1 - upper_share))
    return projected.scatter_add_(1, index + 1, probs * upper_share)


def c51_loss(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax of logits) in nats: its gradient is that of the cross-entropy, and it is 0 where they agree.

    See Bellemare et al. 2017, section 4 (arXiv:1707.06887). logits, target [N, Z]. Returns [N].
    """
    distance: Tensor = torch.special.xlogy(target, target) - target * logits.log_softmax(-1)
    return distance.sum(-1)


def quantile_loss(quantile: Tensor, target: Tensor, kappa: float = 1.0) -> Tensor:
    """The quantile Huber loss, whose minimum is where `quantile` holds the quantiles of the target's distribution.

    See "Distributional RL with Quantile Regression", Dabney et al. 2018, eq. 10 and algorithm 1 (arXiv:1710.10044).
    quantile [N, Z], for the fractions (i + 1/2) / Z; target [N, M], samples all alike. kappa, in reward units: where
    the square ends and the line begins; 0 is the plain quantile loss. Returns [N]: summed over Z, the mean over M.
    """
    count = quantile.shape[1]
    fraction = (torch.arange(count, dtype=quantile.dtype) + 0.5) / count
    error = target.unsqueeze(1) - quantile.unsqueeze(2)  # [N, Z, M]
    size = huber(error, kappa) / kappa if kappa > 0 else error.abs()
    weight = (fraction.unsqueeze(1) - (error.detach() < 0).to(error.dtype)).abs()
    return (weight * size).mean(2).sum(1)
