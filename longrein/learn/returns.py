"""Returns and advantages: pure functions over [T, B] tensors. Knows no network and no environment.

Two masks, never one. `terminated` drops the value of the successor; `done = terminated or truncated` cuts the sum
over time. An invalid row is worth 0, and the row before it is cut, since its successor's outcome is unknown.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def continues(done: Tensor, valid: Tensor) -> Tensor:
    """Whether the next row goes on with the same episode: [T, B] bool -> [T, B] bool. False in the last row."""
    goes_on = torch.zeros_like(done)
    goes_on[:-1] = ~done[:-1] & valid[:-1] & valid[1:]
    return goes_on


def gae(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    value: Tensor,
    next_value: Tensor,
    *,
    gamma: float,
    lambda_: float,
) -> Tensor:
    """Generalized advantage estimation.

    See "High-Dimensional Continuous Control Using GAE", Schulman et al. 2016, eq. 16 (arXiv:1506.02438).
    All tensors [T, B]; next_value is V(next_observation), of the true successor.
    Returns advantages [T, B], in reward units, 0 in invalid rows; the value target is advantage + value.
    Truncation ends the sum but keeps the bootstrap; termination drops both. The last row bootstraps.
    Raises ValueError if the shapes differ.
    """
    _same_shape(reward=reward, terminated=terminated, truncated=truncated, valid=valid, value=value, next=next_value)
    delta = (reward + gamma * next_value * ~terminated - value).masked_fill(~valid, 0.0)
    decay = gamma * lambda_ * continues(terminated | truncated, valid).to(reward.dtype)
    return _backwards(delta, decay)


def quick_gae(
    reward: NDArray[np.float32],
    terminated: NDArray[np.bool_],
    goes_on: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    value: NDArray[np.float32],
    next_value: NDArray[np.float32],
    *,
    gamma: float,
    lambda_: float,
) -> NDArray[np.float32]:
    """As `gae`, of few rows: in NumPy. goes_on [T, B]: whether the next row goes on with the same episode."""
    out = np.where(valid, reward + gamma * next_value * ~terminated - value, np.float32(0.0))
    decay = np.float32(gamma * lambda_) * goes_on
    for t in range(len(out) - 2, -1, -1):
        out[t] += decay[t] * out[t + 1]
    return out


def n_step_returns(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    next_value: Tensor,
    *,
    gamma: float,
) -> Tensor:
    """Returns up to the end of the rollout or of the episode, then bootstrapped.

    See "Asynchronous Methods for Deep RL", Mnih et al. 2016, algorithm S3 (arXiv:1602.01783).
    R_t = r_t + gamma * (R_{t+1} where the episode goes on, else V(s'_t), 0 after termination).
    All tensors [T, B]; next_value is V(next_observation). Returns [T, B], 0 in invalid rows.
    Raises ValueError if the shapes differ.
    """
    _same_shape(reward=reward, terminated=terminated, truncated=truncated, valid=valid, next=next_value)
    goes_on = continues(terminated | truncated, valid)
    now = (reward + gamma * next_value * ~(terminated | goes_on)).masked_fill(~valid, 0.0)
    return _backwards(now, gamma * goes_on.to(reward.dtype))


def discounted_returns(reward: Tensor, done: Tensor, *, gamma: float) -> Tensor:
    """Sums of discounted rewards to the end of each episode, with no bootstrap: reward, done [T, B] -> [T, B].

    An episode that the rollout cuts counts as worth 0 beyond the cut. Raises ValueError if the shapes differ.
    """
    _same_shape(reward=reward, done=done)
    return _backwards(reward, gamma * (~done).to(reward.dtype))


def _backwards(term: Tensor, decay: Tensor) -> Tensor:
    """x_t = term_t + decay_t * x_{t+1}, from the last row up: [T, B], [T, B] -> [T, B]."""
    out = torch.empty_like(term)
    later = torch.zeros_like(term[0])
    for t in range(len(term) - 1, -1, -1):
        later = torch.addcmul(term[t], decay[t], later, out=out[t])
    return out


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) != 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items()))


def vtrace(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    value: Tensor,
    next_value: Tensor,
    log_ratio: Tensor,
    *,
    gamma: float,
    lambda_: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """V-trace: value targets of a policy from what another policy did.

    See "IMPALA", Espeholt et al. 2018, eq. 1 and section 4.2 (arXiv:1802.01561); lambda as in its remark 2.
    All tensors [T, B]; next_value is V(next_observation), log_ratio is log pi(a|s) - log mu(a|s) with mu the policy
    that acted. Returns (v [T, B], the target of V(s_t); q [T, B], so that q - value is the advantage, of which the
    policy gradient is still to be weighted by min(rho, its clip)). Both are 0 in invalid rows.
    With log_ratio 0, v is the bootstrapped n-step return (lambda 1) or the target of GAE (any lambda).
    Raises ValueError if the shapes differ.
    """
    _same_shape(
        reward=reward, terminated=terminated, truncated=truncated, valid=valid, value=value, next=next_value,
        log_ratio=log_ratio,
    )  # fmt: skip
    ratio = log_ratio.exp()
    goes_on = continues(terminated | truncated, valid)
    delta = (ratio.clamp(max=rho_clip) * (reward + gamma * next_value * ~terminated - value)).masked_fill(~valid, 0.0)
    # masked, not multiplied: an infinite ratio in an invalid row would leave NaN.
    decay = (gamma * lambda_ * ratio.clamp(max=c_clip)).masked_fill(~goes_on, 0.0)
    v = (_backwards(delta, decay) + value).masked_fill(~valid, 0.0)
    following = torch.where(goes_on, v.roll(-1, 0), next_value)
    return v, (reward + gamma * following * ~terminated).masked_fill(~valid, 0.0)


def retrace(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    action_value: Tensor,
    next_value: Tensor,
    trace: Tensor,
    *,
    gamma: float,
) -> Tensor:
    """Retrace: targets of Q(s_t, a_t) for a policy from what another policy did.

    See "Safe and Efficient Off-Policy Reinforcement Learning", Munos et al. 2016, eq. 4 (arXiv:1606.02647):
    Q_t = r_t + gamma * (V(s'_t) + c_{t+1} (Q_{t+1} - Q(s_{t+1}, a_{t+1})) where the episode goes on).
    All tensors [T, B]; action_value is Q(s_t, a_t), next_value is V(next_observation) = sum_a pi(a|s') Q(s', a), and
    trace is c_t: lambda min(1, rho_t) for Retrace, its d-th root for ACER's d-dimensional actions (Wang et al. 2017,
    section 5, arXiv:1611.01224), 1 for that paper's Q^opc. Returns [T, B], 0 in invalid rows.
    Raises ValueError if the shapes differ.
    """
    _same_shape(
        reward=reward, terminated=terminated, truncated=truncated, valid=valid, action_value=action_value,
        next=next_value, trace=trace,
    )  # fmt: skip
    goes_on = continues(terminated | truncated, valid)
    # x_t = Q_t - Q(s_t, a_t) gives the recursion x_t = delta_t + gamma c_{t+1} x_{t+1}.
    delta = (reward + gamma * next_value * ~terminated - action_value).masked_fill(~valid, 0.0)
    decay = (gamma * trace.roll(-1, 0)).masked_fill(~goes_on, 0.0)
    return (_backwards(delta, decay) + action_value).masked_fill(~valid, 0.0)


def expected_soft_value(log_probs: Tensor, q: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The soft value of a policy over A choices, and its mean log-probability, both as exact expectations.

    See "Soft Actor-Critic for Discrete Action Settings", Christodoulou 2019, eq. 10 (arXiv:1910.07207).
    log_probs, q [N, A]; alpha: scalar. V = sum_a pi(a) (q(a) - alpha log pi(a)). Returns (V [N], sum_a pi log pi [N]).
    """
    probs = log_probs.exp()
    log_prob = (probs * log_probs).sum(-1)
    return (probs * q).sum(-1) - alpha * log_prob, log_prob


def lambda_returns(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    next_value: Tensor,
    *,
    gamma: float,
    lambda_: float,
) -> Tensor:
    """Returns that mix the n-step returns of all n, by powers of lambda; each ends with the rollout or the episode.

    See "Reinforcement Learning", Sutton & Barto 2018, eq. 12.18; with next_value the largest action value it is the
    target of "Simplifying Deep Temporal Difference Learning", Gallici et al. 2024, algorithm 1 (arXiv:2407.04811).
    G_t = r_t + gamma * ((1 - lambda) V(s'_t) + lambda * G_{t+1}) where the episode goes on, else r_t + gamma * V(s'_t),
    0 in place of V after termination. All tensors [T, B]; next_value is V(s'_t). Returns [T, B], 0 in invalid rows.
    lambda 0 is the one-step target, lambda 1 is `n_step_returns`. Raises ValueError if the shapes differ.
    """
    _same_shape(reward=reward, terminated=terminated, truncated=truncated, valid=valid, next=next_value)
    goes_on = continues(terminated | truncated, valid)
    bootstrap = next_value.masked_fill(terminated, 0.0) * torch.where(goes_on, 1.0 - lambda_, 1.0)
    now = (reward + gamma * bootstrap).masked_fill(~valid, 0.0)
    return _backwards(now, gamma * lambda_ * goes_on.to(reward.dtype))


def bounded_returns(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    valid: Tensor,
    next_value: Tensor,
    *,
    gamma: float,
    steps: int,
) -> Tensor:
    """Returns of at most `steps` rewards, then bootstrapped; fewer where the rollout or the episode ends before.

    See "Reinforcement Learning", Sutton & Barto 2018, eq. 7.4, where next_value is Q(s', a') for the action taken next.
    All tensors [T, B]; next_value is the value of row t's successor. Returns [T, B], 0 in invalid rows.
    Raises ValueError if the shapes differ.
    """
    _same_shape(reward=reward, terminated=terminated, truncated=truncated, valid=valid, next=next_value)
    goes_on = continues(terminated | truncated, valid)
    bootstrap = next_value.masked_fill(terminated | ~valid, 0.0)
    paid = reward.masked_fill(~valid, 0.0)
    returns = paid + gamma * bootstrap
    for _ in range(min(steps, len(reward)) - 1):  # from the return of n steps to that of n + 1
        # The last row goes on nowhere: what the roll brings there is not looked at.
        returns = paid + gamma * torch.where(goes_on, returns.roll(-1, 0), bootstrap)
    return returns
