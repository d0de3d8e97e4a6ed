"""From what an environment shows to what a network takes: `state_to_input`, encoding, scale, masks. Knows no network.

An action mask is the member `action_mask` of a Dict observation: one number for each option of the action's choices
(Discrete, MultiDiscrete, and those within a Tuple or Dict, in order), 0 where the option is not allowed. The other
members are the observation; where there is only one, it is that one. The mask is the end of the encoded row, so it is
stored with each transition, and whoever has the row can rule out what was ruled out then.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, MultiBinary, Tuple
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import torsos
from longrein.learn.distributions import ActionForm
from longrein.learn.networks import members, observation_size

MASK = "action_mask"


class Inputs:
    """One environment's observations, as a policy's network takes them.

    space: what is left for the network to see. Raises SpecError for a mask that does not fit the actions.
    """

    def __init__(self, observation_space: gymnasium.Space[Any], net: torsos.Net, form: ActionForm) -> None:
        self.choices = _mask_size(observation_space)  # numbers of the mask; 0: none
        if self.choices and self.choices != form.num_choices:
            raise SpecError(
                "env.observation_space",
                f"{MASK} has {self.choices} numbers, the actions have {form.num_choices} options",
                hint="one for each option of Discrete and MultiDiscrete actions, in order",
            )
        self._shown, self._members = _without_mask(observation_space) if self.choices else (observation_space, [])
        convert = net.state_to_input
        self._convert = None if convert is None else torsos.named(convert, "net.state_to_input")
        self.space = self._shown if self._convert is None else _space_of(self._convert(_sample(self._shown)))
        self.scale = _scale(self.space, self.choices) if net.rescale_observation else None

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """N observations, batched as a vector environment batches them -> [N, ...]; flat where there is a mask."""
        return self.rescaled(self._row(observation))

    def rescaled(self, row: NDArray[np.generic]) -> NDArray[np.generic]:
        """Encoded numbers [N, size], masks included, as the network takes them: (row - centre) * per_unit."""
        if self.scale is None:
            return row
        centre, per_unit = self.scale
        scaled: NDArray[np.float32] = np.multiply(np.subtract(row, centre), per_unit)
        return scaled

    def _row(self, observation: Any) -> NDArray[np.generic]:
        mask = None
        if self.choices:
            mask = np.asarray(observation[MASK], np.float32)
            observation = {name: observation[name] for name in self._members}
            if len(self._members) == 1:
                observation = observation[self._members[0]]
        if self._convert is not None:
            rows = [self._convert(row) for row in _rows(self._shown, observation)]
            observation = np.stack(rows).astype(self.space.dtype, copy=False)
        encoded = torsos.encode(self.space, observation)
        if mask is None:
            return encoded
        return np.concatenate([encoded.reshape(len(mask), -1).astype(np.float32, copy=False), mask], axis=1)

    def split(self, encoded: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encoded [..., size] -> what the network takes, and the mask: bool [..., choices], or None without one."""
        if not self.choices:
            return encoded, None
        seen, mask = encoded[..., : -self.choices], encoded[..., -self.choices :] > 0
        if torsos.is_image(self.space):
            seen = seen.reshape(*seen.shape[:-1], *(self.space.shape or ()))
        return seen, mask


def _mask_size(space: gymnasium.Space[Any]) -> int:
    if not isinstance(space, Dict) or MASK not in space.spaces or len(space.spaces) < 2:
        return 0
    mask = space.spaces[MASK]
    if not isinstance(mask, Box | MultiBinary) or len(mask.shape) != 1:
        raise SpecError("env.observation_space", f"{MASK} is {mask}", hint="MultiBinary(n), or a Box of n numbers")
    return math.prod(mask.shape)


def _without_mask(space: gymnasium.Space[Any]) -> tuple[gymnasium.Space[Any], list[str]]:
    """The space of the other members, and their names."""
    assert isinstance(space, Dict)
    members = [name for name in space.spaces if name != MASK]
    return space[members[0]] if len(members) == 1 else Dict([(name, space[name]) for name in members]), members


def _scale(space: gymnasium.Space[Any], choices: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """What to take from each encoded number [size], and then to multiply it by, for [-1, 1]; None: leave them.

    choices: numbers of the mask, which stay. Raises SpecError for a Box without bounds.
    """
    low, high = _bounds(space)
    low, high = np.append(low, np.full(choices, -1.0)), np.append(high, np.ones(choices))
    if (low == -1).all() and (high == 1).all():
        return None
    half = np.where(high > low, (high - low) / 2, 1.0)
    return ((low + high) / 2).astype(np.float32), (1 / half).astype(np.float32)


def _bounds(space: gymnasium.Space[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The least and the greatest of each encoded number [size]; -1 and 1 of those that are to stay as they are."""
    if isinstance(space, Dict | Tuple):
        parts = [_bounds(part) for part in members(space)]
        return np.concatenate([low for low, _ in parts]), np.concatenate([high for _, high in parts])
    if not isinstance(space, Box) or len(space.shape) == 3:
        ones = np.ones(observation_size(space))
        return -ones, ones
    low, high = space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)
    if (high - low > np.finfo(np.float32).max).any():
        raise SpecError("net.rescale_observation", f"{space} has numbers without bounds",
                        hint="false, or scale them yourself, with a wrapper or with state_to_input")  # fmt: skip
    return low, high


def _sample(space: gymnasium.Space[Any]) -> Any:
    """Some observation; the space's own random numbers stay where they are."""
    own = deepcopy(space)
    own.seed(0)
    return own.sample()


def _space_of(array: Any) -> Box:
    """The space of arrays like this one."""
    array = np.asarray(array)
    if array.dtype == np.uint8:
        return Box(0, 255, array.shape, np.uint8)
    if array.dtype.kind not in "biuf":
        raise SpecError("net.state_to_input", f"gave {array.dtype} of shape {array.shape}", hint="numbers are needed")
    return Box(-np.inf, np.inf, array.shape, np.float32)


def _rows(space: gymnasium.Space[Any], observation: Any) -> list[Any]:
    """N batched observations, one by one."""
    if isinstance(space, Dict):
        parts = [_rows(part, observation[name]) for name, part in space.spaces.items()]
        return [dict(zip(space.spaces, row, strict=True)) for row in zip(*parts, strict=True)]
    if isinstance(space, Tuple):
        return list(zip(*map(_rows, space.spaces, observation), strict=True))
    return list(observation)
