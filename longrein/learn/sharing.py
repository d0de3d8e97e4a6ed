"""Weights that several algorithms have in common: one torso under the heads of several environments. No environment.

An agent in several environments is one algorithm for each, since spaces, replay, normalisers, schedules and clocks are
an environment's own. What they share are the torsos' inner weights. An input head is what looks at an observation (the
convolutions, where there are any, and the first hidden layer); an output head is what stands behind the torso.
An update of one is spread to the others at once, so that the next update begins where it ended, whoever makes it:
as with a single torso whose statistics in the optimizer are kept for each environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.algorithms import Algorithm
from longrein.learn.ensemble import Ensemble
from longrein.learn.recurrent import Core
from longrein.learn.torsos import Torso


class Shared:
    """The weights that several algorithms of one Config share, from now on those of the first.

    Raises SpecError when there are none: with fewer than two hidden layers an input head is all there is.
    """

    def __init__(self, algorithms: Sequence[Algorithm]) -> None:
        self._algorithms = tuple(algorithms)
        self._weights = _common([dict(_weights(algorithm)) for algorithm in algorithms])
        if not self._weights[0] and any(list(n.parameters()) for _, n in _networks(self._algorithms[0])):
            raise SpecError("net.hidden", "one agent in several environments has no layer to share between its heads",
                            hint="two hidden layers or more: hidden: [64, 64]")  # fmt: skip
        self.spread(self._algorithms[0])
        self._copies_follow()

    @property
    def names(self) -> list[str]:
        """Of the shared weights."""
        return list(self._weights[0])

    @torch.no_grad()
    def spread(self, of: Algorithm) -> None:
        """Give the others what an update of one algorithm has made of the weights."""
        own = next(w for algorithm, w in zip(self._algorithms, self._weights, strict=True) if algorithm is of)
        for other in self._weights:
            if other is not own:
                for name, weight in own.items():
                    other[name].copy_(weight)

    @torch.no_grad()
    def _copies_follow(self) -> None:
        """Target networks and averages begin as what they are copies of."""
        frozen = _common([dict(_weights(algorithm, learnt=False)) for algorithm in self._algorithms])
        for other in frozen[1:]:
            for name, weight in frozen[0].items():
                other[name].copy_(weight)


def _weights(algorithm: Algorithm, learnt: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The inner weights of all torsos of an algorithm, by name; those of its target networks where not learnt."""
    for name, network in _networks(algorithm):
        for path, module in network.named_modules():
            for key, inner in _inner(module):
                for last, weight in inner.named_parameters():
                    if weight.requires_grad == learnt:
                        yield f"{name}.{path}.{key}.{last}", weight


def _inner(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a torso behind its input head; nothing of what is no torso."""
    if isinstance(module, Core):
        yield "core", module
    elif isinstance(module, Ensemble):
        yield from ((f"layers.{index}", layer) for index, layer in enumerate(module.layers) if index >= 1)
        # The first renormalises the input, the second what the input head gives.
        yield from ((f"norms.{index}", norm) for index, norm in enumerate(module.norms or ()) if index >= 2)
    elif isinstance(module, Torso):
        linear = 0
        for name, layer in module.net.named_modules():
            linear += isinstance(layer, nn.Linear)
            if linear >= 2 and list(layer.parameters(recurse=False)):
                yield name, layer


def _networks(algorithm: Any) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, value in vars(algorithm).items():
        if isinstance(value, nn.Module) and id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _common(named: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Those weights that all have, in one form."""
    names = [
        name for name, weight in named[0].items()
        if all(name in other and other[name].shape == weight.shape for other in named)
    ]  # fmt: skip
    return [{name: weights[name] for name in names} for weights in named]
