"""Networks, and the way from an environment's observations to their input. Knows spaces, no algorithm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray
from torch import nn

from longrein.errors import SpecError

Layer = TypeVar("Layer", bound=nn.Module)
ACTIVATIONS: Mapping[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def members(space: Dict | Tuple) -> list[gymnasium.Space[Any]]:
    """The spaces that a space is made of, in order."""
    return list(space.spaces.values() if isinstance(space, Dict) else space.spaces)


def observation_size(space: gymnasium.Space[Any]) -> int:
    """Numbers in one observation as `flat_observation` gives it.

    Box, Discrete (one-hot), MultiDiscrete (one-hot each), MultiBinary, and Dict or Tuple of these.
    Raises SpecError for any other space.
    """
    if isinstance(space, Box | MultiBinary):
        return math.prod(space.shape)
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, MultiDiscrete):
        return int(space.nvec.sum())
    if isinstance(space, Dict | Tuple):
        return sum(map(observation_size, members(space)))
    raise SpecError(
        "env.observation_space",
        f"a network has no fixed number of inputs for {space}",
        hint="Box, Discrete, MultiDiscrete, MultiBinary, and Dict or Tuple of them will do; wrap the environment",
    )


def flat_observation(space: gymnasium.Space[Any], observation: Any) -> NDArray[np.float32]:
    """N observations of one environment's `space`, batched as Gymnasium batches them -> float32 [N, size].

    Raises SpecError for a space that has no fixed size.
    """
    if isinstance(space, Box | MultiBinary):
        rows = np.asarray(observation)
        return rows.reshape(len(rows), -1).astype(np.float32, copy=False)
    if isinstance(space, Discrete):
        return _one_hot(np.asarray(observation) - int(space.start), int(space.n))
    if isinstance(space, MultiDiscrete):
        choices = (np.asarray(observation) - space.start).reshape(-1, space.nvec.size)
        columns = zip(choices.T, space.nvec.reshape(-1), strict=True)
        return np.concatenate([_one_hot(column, int(n)) for column, n in columns], axis=1)
    if isinstance(space, Dict):
        parts = [flat_observation(part, observation[name]) for name, part in space.spaces.items()]
        return np.concatenate(parts, axis=1)
    if isinstance(space, Tuple):
        pairs = zip(space.spaces, observation, strict=True)
        return np.concatenate([flat_observation(part, value) for part, value in pairs], axis=1)
    observation_size(space)  # raises
    raise AssertionError("observation_size knows a space that flat_observation does not")


def mlp(
    size: int,
    hidden: Sequence[int],
    outputs: int,
    *,
    activation: str = "tanh",
    last_gain: float = 1.0,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Fully connected layers [N, size] -> [N, outputs].

    Orthogonal weights with gain sqrt 2 and `last_gain` in the last layer, biases 0, as PPO's authors have them
    ("The 37 Implementation Details of PPO", Huang et al. 2022, core 2). Raises SpecError for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise SpecError("activation", f"{activation!r} is none", hint="one of " + ", ".join(ACTIVATIONS))
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [orthogonal(size, width, math.sqrt(2), generator), ACTIVATIONS[activation]()]
        size = width
    return nn.Sequential(*layers, orthogonal(size, outputs, last_gain, generator))


def orthogonal(inputs: int, outputs: int, gain: float, generator: torch.Generator | None = None) -> nn.Linear:
    """A linear layer with orthogonal weights of the given gain, and biases 0."""
    layer = unset(nn.Linear, inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def unset(kind: type[Layer], *settings: Any) -> Layer:
    """A layer whose weights are yet to be set: its own start would draw from the global generator.

    Of torch.nn's own layers, which call `reset_parameters` when they are made.
    """
    # Not by way of the device "meta", as torch.nn.utils.skip_init has it: torch then imports sympy, 34 MB.
    still = type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})
    layer: Layer = still(*settings)
    layer.__class__ = kind
    return layer


def _one_hot(choice: NDArray[Any], size: int) -> NDArray[np.float32]:
    rows = np.zeros((len(choice), size), np.float32)
    rows[np.arange(len(choice)), choice] = 1.0
    return rows
