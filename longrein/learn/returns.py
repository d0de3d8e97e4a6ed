"""Returns and advantages: pure functions over [T, B] tensors. Knows no network and no environment.

Two masks, never one. `terminated` drops the value of the successor; `done = terminated or truncated` cuts the sum
over time. An invalid row is worth 0, and the row before it is cut, since its successor's outcome is unknown.
"""

from __future__ import annotations

import torch
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
