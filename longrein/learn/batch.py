"""What flows into an algorithm: Transition (one vector step, NumPy) and Batch (many, torch). Knows no environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of B environments, a row each.

    `next_observation` is the true successor of `observation`, never the first observation of the next episode.
    `terminated`: the MDP ended, the successor is worth 0. `truncated`: stopped from outside, the successor has a value.
    `valid` is False for a row in which nothing was learnt about the environment: the filler row of next-step autoreset,
    or a step whose outcome was lost with its environment. Such a row takes part in nothing.
    """

    observation: NDArray[np.generic]  # [B, ...]
    action: NDArray[np.generic]  # [B, ...], as the policy chose it, not as it was clipped for the environment
    reward: NDArray[np.float32]  # [B]
    next_observation: NDArray[np.generic]  # [B, ...]
    terminated: NDArray[np.bool_]  # [B]
    truncated: NDArray[np.bool_]  # [B]
    valid: NDArray[np.bool_]  # [B]
    extras: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)  # each [B, ...]: what the policy said


FIELDS = tuple(one.name for one in fields(Transition) if one.name != "extras")
"""Of a transition, in their order; extras are apart."""
EXTRAS = "extras."
"""What an extra's name begins with where it stands among the fields."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Transitions as tensors: time-major [T, B, ...] or flat [N, ...]. Fields as in Transition.

    Raises ValueError, naming the field, when one does not share the leading dimensions of `reward`,
    or when a flag is not of dtype bool.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        leading = self.reward.shape
        arrays = {name: getattr(self, name) for name in FIELDS}
        for name, array in arrays.items() | {(EXTRAS + key, value) for key, value in self.extras.items()}:
            if array.shape[: len(leading)] != leading:
                raise ValueError(
                    f"{name}: expected leading dimensions {tuple(leading)}, got shape {tuple(array.shape)}"
                )
        for name in ("terminated", "truncated", "valid"):
            array = arrays[name]
            if array.dtype != torch.bool or array.shape != leading:
                raise ValueError(f"{name}: expected bool {tuple(leading)}, got {array.dtype} {tuple(array.shape)}")
        if self.observation.shape != self.next_observation.shape:
            shapes = f"{tuple(self.next_observation.shape)}, and observation {tuple(self.observation.shape)}"
            raise ValueError(f"next_observation: must look like observation, got {shapes}")

    @property
    def done(self) -> Tensor:
        """Where an episode ended, either way: the trace is cut here. Shape as `reward`."""
        return self.terminated | self.truncated
