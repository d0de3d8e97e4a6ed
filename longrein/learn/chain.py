"""Linear layers in a row, computed without what torch asks for each operation. Knows weights, no policy and no loss.

For networks of 64 units most of the time of a pass is not arithmetic: it is what modules and autograd cost for each
operation. A Chain looks through the modules to the weights, which stay theirs. It computes
1. few rows, as an actor or a small update has them, in NumPy: a quarter of the time;
2. the way back from the gradient of its output by hand. Autograd then sees the loss alone, which is cut off from the
   network at a Pass: 0.7 of the time with 256 rows. Where the loss itself is differentiated by hand, a Pass takes that
   gradient, and autograd is not asked at all. Of few rows a QuickPass needs no torch at all;
3. tanh(x) as 2 sigmoid(2 x) - 1, whose error is that of one rounding of numbers around 1: a third of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

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
# A product into fewer columns than these takes MKL six times as long as one into as few rows.
_NARROW = 16


class Layer(Protocol):
    """torch's linear layer; or several of one form, whose weights [K, inputs, outputs] and biases [K, 1, outputs] are
    kept together."""

    @property
    def weight(self) -> Tensor:
        """What it multiplies with."""

    @property
    def bias(self) -> Tensor:
        """What it adds."""

    @property
    def _parameters(self) -> Mapping[str, Tensor | None]:
        """Both by their names, as every module of torch holds them."""


class Places(NamedTuple):
    """Where the layers' weights lie, or their gradients."""

    pairs: list[tuple[Tensor, Tensor]]
    """Weight [inputs, outputs] and bias [outputs] of each layer."""
    arrays: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    """The same memory."""


def _places(copy: int | None, tensors: list[Tensor]) -> Places:
    """Of weight and bias of each layer in turn; of one copy of several."""
    each = zip(tensors[::2], tensors[1::2], strict=True)
    pairs = [_of_one(weight.detach(), bias.detach(), copy) for weight, bias in each]
    return Places(pairs, [(weight.numpy(), bias.numpy()) for weight, bias in pairs])


def _of_one(weight: Tensor, bias: Tensor, copy: int | None) -> tuple[Tensor, Tensor]:
    return (weight.t(), bias) if copy is None else (weight[copy], bias[copy, 0])


class Chain:
    """Encoded observations [N, ...] -> what the last of the layers gives [N, P].

    copy: where the layers are several of one form, which of them.
    """

    def __init__(self, layers: Sequence[Layer], tanh: bool, copy: int | None = None) -> None:
        self.layers = layers
        self.tanh = tanh  # or relu, between the layers
        self._copy = copy
        self._largest = max(math.prod(layer.weight.shape[-2:]) for layer in layers)
        self._weights, self._gradients = Views(partial(_places, copy)), Views(partial(_places, copy))

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

    def weights(self) -> Places:
        """Where the weights lie."""
        return self._weights.of(self._parameters())

    def gradients(self) -> Places:
        """Where their gradients go; those that are not there yet are made."""
        parameters = self._parameters()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        places = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return self._gradients.of(places)

    def _parameters(self) -> list[Tensor]:
        # What `layer.weight` finds too, but not before a module has looked for it elsewhere.
        return [part for layer in self.layers for part in layer._parameters.values() if part is not None]

    def _forward_few(self, inputs: NDArray[Any]) -> list[NDArray[np.float32]]:
        """The input of each layer, and the output."""
        x: NDArray[np.float32] = inputs.reshape(len(inputs), -1).astype(np.float32, copy=False)
        arrays, kept = self.weights().arrays, [x]
        for number, (weight, bias) in enumerate(arrays, 1):
            x = x.dot(weight)
            x += bias
            if number < len(arrays):
                x = np.tanh(x, out=x) if self.tanh else np.maximum(x, _ZERO, out=x)
            kept.append(x)
        return kept

    def _forward(self, inputs: Tensor) -> list[Tensor]:
        """The input of each layer, and the output."""
        x = inputs.flatten(1).float()
        kept = [x]
        if type(inputs) is Tensor:
            pairs = self.weights().pairs
        else:  # what torch.export looks with lies nowhere
            pairs = [_of_one(layer.weight, layer.bias, self._copy) for layer in self.layers]
        for number, (weight, bias) in enumerate(pairs, 1):
            x = torch.addmm(bias, x, weight)
            if number < len(pairs):
                x = x.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0) if self.tanh else x.relu_()
            kept.append(x)
        return kept


def backward(loss: Tensor, passes: Iterable[Pass], inputs: Sequence[Tensor] | None = None) -> None:
    """Set the gradients of a loss by all weights under it: by autograd, and from the passes it stands on by hand.

    inputs: those that autograd is to find alone; None finds all.
    """
    loss.backward(inputs=inputs)  # type: ignore[no-untyped-call]  # torch does not annotate it
    for one in passes:
        one.back()


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass through a chain, on whose output a loss stands."""

    chain: Chain
    kept: list[Tensor]  # the input of each layer
    output: Tensor

    @torch.no_grad()
    def back(self, gradient: Tensor | None = None) -> None:
        """Set the gradients of the weights from that of the output [N, P]: what `backward` of the loss has made."""
        if gradient is None:
            gradient = self.output.grad
        assert gradient is not None, "the loss does not depend on the output, or its backward was not called"
        pairs, places = self.chain.weights().pairs, self.chain.gradients().pairs
        for number in range(len(self.kept) - 1, -1, -1):
            x, (by_weight, by_bias) = self.kept[number], places[number]
            if x.shape[1] < _NARROW <= gradient.shape[1] and by_weight.stride(0) == 1:
                by_weight.copy_(x.t().mm(gradient))
            else:
                torch.mm(x.t(), gradient, out=by_weight)
            torch.sum(gradient, 0, out=by_bias)
            if number:
                gradient = self._through(gradient.mm(pairs[number][0].t()), x)

    @torch.no_grad()
    def slope(self, rows: Tensor, columns: int) -> Tensor:
        """How the one output of each of these rows [M] grows with the last numbers of its input: [M, columns].

        The weights get no gradient from it.
        """
        pairs = self.chain.weights().pairs
        gradient = pairs[-1][0].t().repeat(len(rows), 1)
        for number in range(len(self.kept) - 1, 0, -1):
            gradient = self._through(gradient, self.kept[number].index_select(0, rows))
            weight = pairs[number - 1][0]
            gradient = gradient.mm((weight if number > 1 else weight[-columns:]).t())
        return gradient if len(self.kept) > 1 else gradient[:, -columns:]

    def _through(self, gradient: Tensor, x: Tensor) -> Tensor:
        """From the gradient of what a layer's activation gave, which is x, to that of what it took, in its place."""
        if self.chain.tanh:
            torch.ops.aten.tanh_backward.grad_input(gradient, x, grad_input=gradient)
        else:
            torch.ops.aten.threshold_backward.grad_input(gradient, x, 0, grad_input=gradient)
        return gradient


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
        weights, places = self.chain.weights().arrays, self.chain.gradients().arrays
        for number in range(len(self.kept) - 2, -1, -1):
            x, (by_weight, by_bias) = self.kept[number], places[number]
            if by_weight.flags.c_contiguous:
                np.dot(x.T, gradient, out=by_weight)
            else:  # NumPy fills rows alone, and these are the rows
                np.dot(gradient.T, x, out=by_weight.T)
            np.add.reduce(gradient, 0, out=by_bias)
            if number:
                gradient = gradient.dot(weights[number][0].T)
                gradient *= 1.0 - x * x if self.chain.tanh else x > 0.0
