"""K networks of one form that share no weight, computed together: a layer of all is one product of matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import torch
from torch import Tensor, nn

from longrein.learn.chain import Chain, Pass
from longrein.learn.networks import ACTIVATIONS, orthogonal
from longrein.learn.renorm import BatchRenorm
from longrein.learn.torsos import Flat, Net, Torso, make_torso


@dataclass(frozen=True)
class Renorm:
    """How an ensemble renormalises its input and each hidden layer's output."""

    momentum: float = 0.99
    """Share of the running statistics that one training pass keeps."""
    warmup: int = 100_000
    """Training passes of plain batch normalization before renormalization begins."""


class StackedLinear(nn.Module):
    """K linear layers: [K, N, inputs] -> [K, N, outputs]. Orthogonal weights of the given gain, biases 0."""

    def __init__(
        self, copies: int, inputs: int, outputs: int, gain: float, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        layers = [orthogonal(inputs, outputs, gain, generator) for _ in range(copies)]
        self.weight = nn.Parameter(torch.stack([layer.weight.detach().T for layer in layers]))
        self.bias = nn.Parameter(torch.zeros(copies, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[K, N, inputs] -> [K, N, outputs]; of the first k layers only, where x is [k, N, inputs]."""
        weight, bias = self.weight[: len(x)], self.bias[: len(x)]
        if weight.shape[2] == 1:
            # A third of the time that a product with matrices of one column takes, there and back.
            return (x * weight.transpose(1, 2)).sum(2, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class StackedLayerNorm(nn.Module):
    """K layer normalizations, each with its own gain and shift: [K, N, F] -> the same."""

    def __init__(self, copies: int, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(copies, 1, features))
        self.shift = nn.Parameter(torch.zeros(copies, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        """[K, N, F] -> the same; of the first k alone, where x is [k, N, F]."""
        normal = nn.functional.layer_norm(x, x.shape[-1:])
        return torch.addcmul(self.shift[: len(x)], normal, self.gain[: len(x)])


class Ensemble(nn.Module):
    """K networks from an observation, and `inputs` numbers beside it, to `outputs` numbers each.

    Images are seen as `net` says, by eyes of their own for each network; the numbers join behind the eyes, before the
    hidden layers. With `renorm` the input of the hidden layers and the output of each are renormalised.
    """

    def __init__(
        self,
        space: gymnasium.Space[Any],
        net: Net,
        *,
        inputs: int = 0,
        outputs: int = 1,
        copies: int = 2,
        last_gain: float = 1.0,
        renorm: Renorm | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.copies = copies
        eyes: list[nn.Module] = [make_torso(space, replace(net, hidden=()), generator) for _ in range(copies)]
        size = int(eyes[0].size) + inputs  # type: ignore[arg-type]  # a Torso's
        # Eyes without weights see the same: one pair is enough.
        self.eyes = nn.ModuleList(eyes if list(eyes[0].parameters()) else eyes[:1])
        self.activation = ACTIVATIONS[net.activation]()
        layers, widths = [], [size]
        for width in net.hidden:
            layer: nn.Module = StackedLinear(copies, widths[-1], width, math.sqrt(2), generator)
            layers.append(nn.Sequential(layer, StackedLayerNorm(copies, width)) if net.layer_norm else layer)
            widths.append(width)
        self.layers = nn.ModuleList(layers)
        self.last = StackedLinear(copies, widths[-1], outputs, last_gain, generator)
        self.norms = None
        if renorm is not None:
            made = [BatchRenorm(width, copies, momentum=renorm.momentum, warmup=renorm.warmup) for width in widths]
            self.norms = nn.ModuleList(made)
        self.chains = self._chains()  # one for each network; none where there is more to them than linear layers

    def forward(
        self, observation: Tensor, beside: Tensor | None = None, *, train: bool = False, first: int | None = None
    ) -> Tensor:
        """Encoded observations [N, ...] and numbers [N, inputs] -> [K, N, outputs].

        train: renormalise by the batch, and learn its statistics. first: of the first networks only.
        """
        copies = self.copies if first is None else first
        if self.chains and not torch.is_grad_enabled():
            x = _row(observation, beside)
            return torch.stack([chain(x) for chain in self.chains[:copies]])
        seen = torch.stack([eye(observation) for eye in self.eyes[:copies]])  # [1 or K, N, F]
        if beside is not None:
            seen = torch.cat([seen, beside.expand(len(seen), *beside.shape)], -1)
        x = seen.expand(copies, *seen.shape[1:])
        if self.norms is not None:
            x = self.norms[0](x, train)
        for number, layer in enumerate(self.layers, 1):
            x = self.activation(layer(x))
            if self.norms is not None:
                x = self.norms[number](x, train)
        out: Tensor = self.last(x)
        return out

    def there(self, observation: Tensor, beside: Tensor | None = None, *, first: int | None = None) -> EnsemblePass:
        """What `forward` gives, without gradient, and the way back by hand; only where there are `chains`."""
        x = _row(observation, beside)
        passes = [chain.there(x) for chain in self.chains[:first]]
        return EnsemblePass(passes, torch.stack([one.output.detach() for one in passes]))

    def _chains(self) -> list[Chain]:
        layers = [*self.layers, self.last]
        plain = type(self.activation) in (nn.Tanh, nn.ReLU) and all(type(layer) is StackedLinear for layer in layers)
        if not plain or self.norms is not None or len(self.eyes) > 1 or not _blind(self.eyes[0]):
            return []
        return [Chain(layers, type(self.activation) is nn.Tanh, copy) for copy in range(self.copies)]


@dataclass(frozen=True, slots=True)
class EnsemblePass:
    """One pass through an ensemble whose networks are chains."""

    passes: list[Pass]
    output: Tensor  # [K, N, P]

    def back(self, gradient: Tensor) -> None:
        """Set the gradients of the weights from that of the output [K, N, P]."""
        for one, its in zip(self.passes, gradient, strict=True):
            one.back(its)

    @torch.no_grad()
    def slope(self, which: Tensor, columns: int) -> Tensor:
        """How the one output of network which[n] grows with the last `columns` numbers beside observation n.

        which int64 [N] -> [N, columns]. A row costs what one network does: the others are not asked.
        """
        slope = torch.empty(len(which), columns)
        for number, one in enumerate(self.passes):
            rows = (which == number).nonzero().squeeze(1)
            slope.index_copy_(0, rows, one.slope(rows, columns))
        return slope


def _row(observation: Tensor, beside: Tensor | None) -> Tensor:
    """[N, ...] and [N, inputs] -> [N, all of them]."""
    row = observation.flatten(1).float()
    return row if beside is None else torch.cat([row, beside], 1)


def _blind(eye: nn.Module) -> bool:
    """Whether it gives an observation as it is."""
    return isinstance(eye, Torso) and isinstance(eye.net, nn.Sequential) and [type(one) for one in eye.net] == [Flat]
