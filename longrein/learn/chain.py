"""Linear layers in a row, computed without what torch asks for each operation. Knows weights, no policy and no loss.

For networks of 64 units most of the time of a pass is not arithmetic: it is what modules and autograd cost for each
operation. A Chain looks through the modules to the weights, which stay theirs. It computes
1. few rows, as an actor or a small update has them, in NumPy: a quarter of the time;
2. the way back from the gradient of its output by hand. Autograd then sees the loss alone, which is cut off from the
   network at a Pass: 0.7 of the time with 256 rows. Of few rows a QuickPass needs no torch at all;
3. tanh(x) as 2 sigmoid(2 x) - 1, whose error is that of one rounding of numbers around 1: a third of the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.learn.arrays import Views
from longrein.learn.torsos import Flat, Torso

# Within these OpenBLAS takes one thread (a product of a row, or of several), as torch does in a session.
_LARGEST_WEIGHT = 8192
_MOST_WORK = 2**18
_ZERO = np.zeros((), np.float32)  # a Python number is made an array first, in as much time as it takes to compare


class Chain:
    """Encoded observations [N, ...] -> what the last of the layers gives [N, P]."""

    def __init__(self, layers: list[nn.Linear], tanh: bool) -> None:
        self.layers = layers
        self.tanh = tanh  # or relu, between the layers
        self._largest = max(layer.weight.numel() for layer in layers)
        self._weights = Views()
        self._gradients = Views()

    @classmethod
    def of(cls, torso: nn.Module, head: nn.Module) -> Self | None:
        """The chain of a torso and of the head behind it; None where there is more to them than linear layers."""
        if type(torso) is not Torso or not isinstance(torso.net, nn.Sequential) or type(torso.net[0]) is not Flat:
            return None
        heads = list(head) if isinstance(head, nn.Sequential) else [head]
        rest = [*list(torso.net)[1:], *heads]
        layers = [layer for layer in rest[::2] if type(layer) is nn.Linear]
        between = {type(module) for module in rest[1::2]}
        if len(layers) < len(rest[::2]) or between not in ({nn.Tanh}, {nn.ReLU}, set()):  # set(): one layer
            return None
        return cls(layers, nn.Tanh in between)

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """The output [N, P], without gradient."""
        if type(inputs) is not Tensor or not self.few(len(inputs)):  # what torch.export looks with NumPy cannot read
            return self._forward(inputs)[-1]
        return torch.from_numpy(self.of_few(inputs.numpy()))

    def there(self, inputs: Tensor) -> Pass:
        """The output as a leaf, from which a loss can be made; `Pass.back` then takes its gradient to the weights."""
        with torch.no_grad():
            *kept, output = self._forward(inputs)
        return Pass(self, kept, output.requires_grad_())

    def few(self, rows: int) -> bool:
        """Whether so many rows are so few, and the layers so small, that NumPy is the faster."""
        return self._largest <= _LARGEST_WEIGHT and rows * self._largest <= _MOST_WORK

    def of_few(self, inputs: NDArray[Any]) -> NDArray[np.float32]:
        """The output [N, P], by NumPy."""
        return self._forward_few(inputs)[-1]

    def there_of_few(self, inputs: NDArray[Any]) -> QuickPass:
        """The output by NumPy, and the way back from it."""
        return QuickPass(self, self._forward_few(inputs))

    def parameters(self) -> list[Tensor]:
        """The weight and the bias of each layer, in their order."""
        # What `layer.weight` finds too, but not before a module has looked for it elsewhere.
        return [part for layer in self.layers for part in layer._parameters.values() if part is not None]

    def views(self) -> list[NDArray[np.float32]]:
        """The parameters as arrays over the same memory."""
        return self._weights.of(self.parameters())

    def gradients(self) -> list[NDArray[np.float32]]:
        """The parameters' gradients as arrays over the same memory; those that are not there yet are made."""
        parts = self.parameters()
        for part in parts:
            if part.grad is None:
                part.grad = torch.zeros_like(part)
        return self._gradients.of([part.grad for part in parts if part.grad is not None])

    def _forward_few(self, inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """The input of each layer, and the output."""
        x: NDArray[np.float32] = inputs.reshape(len(inputs), -1).astype(np.float32, copy=False)
        views, kept = self.views(), [x]
        for number in range(0, len(views), 2):
            x = x.dot(views[number].T)
            x += views[number + 1]
            if number + 2 < len(views):
                x = np.tanh(x, out=x) if self.tanh else np.maximum(x, _ZERO, out=x)
            kept.append(x)
        return kept

    def _forward(self, inputs: Tensor) -> list[Tensor]:
        """The input of each layer, and the output."""
        x = inputs.flatten(1).float()
        kept = [x]
        for number, layer in enumerate(self.layers, 1):
            x = torch.addmm(layer.bias, x, layer.weight.t())
            if number < len(self.layers):
                x = x.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0) if self.tanh else x.relu_()
            kept.append(x)
        return kept


def backward(loss: Tensor, passes: Iterable[Pass]) -> None:
    """Set the gradients of a loss by all weights under it: by autograd, and from the passes it stands on by hand."""
    loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
    for one in passes:
        one.back()


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through a chain, on whose output a loss stands."""

    chain: Chain
    kept: list[Tensor]  # the input of each layer
    output: Tensor

    @torch.no_grad()
    def back(self) -> None:
        """Set the gradients of the weights from that of the output, which `backward` of the loss has made."""
        gradient = self.output.grad
        assert gradient is not None, "the loss does not depend on the output, or its backward was not called"
        for number in range(len(self.kept) - 1, -1, -1):
            layer, x = self.chain.layers[number], self.kept[number]
            for parameter in (layer.weight, layer.bias):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
            torch.mm(gradient.t(), x, out=layer.weight.grad)
            torch.sum(gradient, 0, out=layer.bias.grad)
            if number:
                gradient = gradient.mm(layer.weight)
                if self.chain.tanh:
                    gradient = torch.ops.aten.tanh_backward(gradient, x)
                else:
                    gradient = torch.ops.aten.threshold_backward(gradient, x, 0)


@dataclass(frozen=True, slots=True)
class QuickPass:
    """One pass of few rows through a chain."""

    chain: Chain
    kept: list[NDArray[np.float32]]  # the input of each layer, and the output

    @property
    def output(self) -> NDArray[np.float32]:
        """[N, P]."""
        return self.kept[-1]

    def back(self, gradient: NDArray[np.float32]) -> None:
        """Set the gradients of the weights from that of the output [N, P]."""
        weights, gradients = self.chain.views(), self.chain.gradients()
        for number in range(len(self.kept) - 2, -1, -1):
            x = self.kept[number]
            np.dot(gradient.T, x, out=gradients[2 * number])
            np.add.reduce(gradient, 0, out=gradients[2 * number + 1])
            if number:
                gradient = gradient.dot(weights[2 * number])
                gradient *= 1.0 - x * x if self.chain.tanh else x > 0.0
