"""Critics that learn a target side by side. Knows an ensemble and a loss, no policy and no target's making."""

from __future__ import annotations

import torch
from torch import Tensor

from longrein.learn.ensemble import Ensemble
from longrein.learn.losses import ensemble_value_loss, ensemble_value_slope


def set_gradients(
    critics: Ensemble,
    seen: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    action: Tensor | None = None,
    choice: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Set the gradients of `ensemble_value_loss` by the critics' weights; (the loss, the values [K, N]), without any.

    seen [N, ...]; target, weight [N]. Of actions [N, inputs] that the critics take beside it, or of choices int64 [N]
    that they give one number each for. By hand where the critics are chains, by autograd elsewhere.
    """
    there = critics.there(seen, action) if critics.chains else None
    said = critics(seen, action) if there is None else there.output.detach()
    index = None if choice is None else choice.expand(critics.copies, -1).unsqueeze(-1)
    values = (said if index is None else said.gather(-1, index)).squeeze(-1)
    loss = ensemble_value_loss(values, target, weight)
    if there is None:
        for parameter in critics.parameters():
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    else:
        slope = ensemble_value_slope(values, target, weight).unsqueeze(-1)
        there.back(slope if index is None else torch.zeros_like(said).scatter_(-1, index, slope))
    return loss.detach(), values.detach()
