"""One network for several environments: what they share in the middle, what each has of its own at both ends.

Known as a hydra. Knows spaces and networks, no algorithm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.networks import ACTIVATIONS, orthogonal
from longrein.learn.torsos import Net, make_torso


@dataclass(frozen=True)
class Ends:
    """What one environment needs of its own."""

    observation_space: gymnasium.Space[Any]
    """What its input head looks at."""
    outputs: int
    """Numbers that its output head gives for one observation: values of actions, or parameters of a distribution."""


class MultiHead(nn.Module):
    """An input head and an output head for each environment, and one torso that all of them share.

    net.hidden are the torso's layers; an input head sees its space as `net` says and gives `width` features, an output
    head is one linear layer. A step of an optimizer on the losses of some environments changes their heads and the
    torso, and no other environment's heads. Raises SpecError for no environment, and for a recurrent net.
    """

    def __init__(
        self,
        ends: Mapping[str, Ends],
        net: Net,
        *,
        width: int = 64,
        last_gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not ends:
            raise SpecError("env", "a network for several environments needs at least one")
        if net.recurrent != "none":
            raise SpecError("net.recurrent", f"{net.recurrent!r} with heads for several environments",
                            hint="recurrent: none")  # fmt: skip
        # In lists, and names beside them: a module's name may hold no dot, an environment's may.
        self.names = tuple(ends)
        eye = replace(net, hidden=(width,))
        self.heads = nn.ModuleList(make_torso(end.observation_space, eye, generator) for end in ends.values())
        if any(head.size != width for head in self.heads):
            sizes = ", ".join(str(head.size) for head in self.heads)
            raise SpecError("net.feature_maker", f"input heads give {sizes} features, the torso takes {width}",
                            hint="the same number for each environment")  # fmt: skip
        layers: list[nn.Module] = []
        size = width
        for units in net.hidden:
            layers += [orthogonal(size, units, 2**0.5, generator), ACTIVATIONS[net.activation]()]
            size = units
        self.torso = nn.Sequential(*layers)
        self.tails = nn.ModuleList(orthogonal(size, end.outputs, last_gain, generator) for end in ends.values())

    def forward(self, observations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encoded observations {name: [N, ...]}, of any of the environments -> {name: [N, outputs]}, in that order.

        The rows of all of them go through the torso together. Raises KeyError for a name that is not one of ours.
        """
        indices = [self._index(name) for name in observations]
        seen = [self.heads[i](rows) for i, rows in zip(indices, observations.values(), strict=True)]
        features = torch.split(self.torso(torch.cat(seen)), [len(rows) for rows in seen])
        outputs = (self.tails[i](rows) for i, rows in zip(indices, features, strict=True))
        return dict(zip(observations, outputs, strict=True))

    def of(self, name: str) -> nn.Sequential:
        """One environment's network [N, ...] -> [N, outputs], of the same weights. Raises KeyError."""
        index = self._index(name)
        return nn.Sequential(self.heads[index], self.torso, self.tails[index])

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise KeyError(f"{name!r}: the network has heads for {', '.join(self.names)}")
        return self.names.index(name)
