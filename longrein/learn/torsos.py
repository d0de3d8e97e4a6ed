"""From an encoded observation to features: which torso a space asks for. Knows spaces, no head and no algorithm.

An observation space is encoded in one array for each environment: one image (a uint8 Box of three dimensions) stays
uint8 [height, width, channels] or [channels, height, width]; everything else becomes one flat float32 row, images
within a Dict or a Tuple included.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Tuple
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.networks import ACTIVATIONS, flat_observation, members, observation_size, orthogonal, unset

FeatureMaker = Callable[["gymnasium.Space[Any]"], nn.Module]
ModelMaker = Callable[["gymnasium.Space[Any]", "gymnasium.Space[Any]"], nn.Module]
StateToInput = Callable[[Any], NDArray[Any]]


@dataclass(frozen=True)
class Net:
    """What stands between observations and heads; every algorithm has one of these as its setting `net`."""

    hidden: tuple[int, ...] = (64, 64)
    """Units of each hidden layer, after the convolutions where there are any."""
    activation: str = "tanh"
    """Of the hidden layers: tanh, relu, elu or silu."""
    layer_norm: bool = False
    """Whether what each hidden layer gives, and each convolution of nature or minatar, is normalised first."""
    image: str = "nature"
    """How images are seen: nature (three convolutions), resnet (IMPALA's), minatar (a small one) or flat. With minatar
    any Box of three dimensions is an image, MinAtar's of bool among them."""
    recurrent: str = "none"
    """A recurrent layer behind the hidden ones: none, gru or lstm."""
    recurrent_size: int = 128
    """Its units."""
    feature_maker: FeatureMaker | str | None = None
    """A network of your own: observation space -> module from encoded observations [N, ...] to features [N, F].
    A function, or its name as `package.module:function`."""
    model_maker: ModelMaker | str | None = None
    """Torso and heads of your own: (observation space, action space) -> module from encoded observations [N, ...] to
    (numbers of the action's distribution [N, P], value [N]). Wins over all else here. A function or its name."""
    state_to_input: StateToInput | str | None = None
    """One observation -> the array that is encoded in its place, of a fixed shape. A function or its name."""
    rescale_observation: bool = False
    """Whether what a Box has is brought to [-1, 1] by its own bounds, images left alone."""

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise SpecError("net.activation", f"{self.activation!r} is none", hint="one of " + ", ".join(ACTIVATIONS))
        if self.image not in ("nature", "resnet", "minatar", "flat"):
            raise SpecError("net.image", f"{self.image!r} is none of nature, resnet, minatar, flat")
        if self.recurrent not in ("none", "gru", "lstm"):
            raise SpecError("net.recurrent", f"{self.recurrent!r} is none of none, gru, lstm")

    @property
    def behind_inputs(self) -> Net:
        """What is left to the torso where Inputs have done their part."""
        return replace(self, state_to_input=None, rescale_observation=False)


def is_image(space: gymnasium.Space[Any]) -> bool:
    """Whether a space is one image: a Box of uint8 with three dimensions."""
    return isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) == 3


def has_image(space: gymnasium.Space[Any]) -> bool:
    """Whether a space is one image, or a Dict or Tuple with images in it."""
    if isinstance(space, Dict | Tuple):
        return any(map(has_image, members(space)))
    return is_image(space)


def encode(space: gymnasium.Space[Any], observation: Any) -> NDArray[np.generic]:
    """N observations, batched as Gymnasium batches them -> [N, ...] as a torso takes them. Raises SpecError."""
    return np.asarray(observation) if is_image(space) else flat_observation(space, observation)


class Torso(nn.Module):
    """Encoded observations [N, ...] -> features [N, size]."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net = net
        self.size = size

    def forward(self, observation: Tensor) -> Tensor:
        features: Tensor = self.net(observation)
        return features


def make_torso(space: gymnasium.Space[Any], net: Net, generator: torch.Generator | None = None) -> Torso:
    """The torso for one environment's observations, without its recurrent layer. Raises SpecError."""
    for name in ("model_maker", "state_to_input", "rescale_observation"):
        if getattr(net, name):
            raise SpecError(f"net.{name}", "this algorithm does not use it", hint="feature_maker, or a wrapper")
    if net.feature_maker is not None:
        module = made(net.feature_maker, "net.feature_maker", generator, space)
        with torch.no_grad():
            features = module(zeros(space, 1))
        if features.ndim != 2 or len(features) != 1:
            raise SpecError("net.feature_maker", f"its module gives {tuple(features.shape)} for one observation",
                            hint="[N, ...] -> [N, F], where F is a fixed number of features")  # fmt: skip
        return Torso(module, features.shape[1])
    seen, size = _eye(space, net, generator)
    layers: list[nn.Module] = [seen]
    for width in net.hidden:
        layers.append(orthogonal(size, width, math.sqrt(2), generator))
        layers += [nn.LayerNorm(width)] if net.layer_norm else []
        layers.append(ACTIVATIONS[net.activation]())
        size = width
    return Torso(nn.Sequential(*layers), size)


def named(function: Callable[..., Any] | str, field: str) -> Callable[..., Any]:
    """A function itself, or found by its name `package.module:function`. Raises SpecError naming the field."""
    if callable(function):
        return function
    module, _, name = function.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "package.module:function, importable from where this runs"
        raise SpecError(field, f"{function!r} is not found: {error}", hint=hint) from error
    return found  # type: ignore[return-value]  # a module is only where the search began


def made(
    maker: Callable[..., Any] | str, field: str, generator: torch.Generator | None, *spaces: gymnasium.Space[Any]
) -> nn.Module:
    """What somebody's maker makes of spaces, the same for the same generator. Raises SpecError if it is no module."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):  # modules start from the global generator, which is not ours to move
        torch.manual_seed(seed)
        module = named(maker, field)(*spaces)
    if not isinstance(module, nn.Module):
        raise SpecError(field, f"gave {type(module).__name__}", hint="it must return a torch.nn.Module")
    return module


def zeros(space: gymnasium.Space[Any], rows: int) -> Tensor:
    """Encoded observations of zeros [rows, ...]."""
    if is_image(space):
        return torch.zeros(rows, *(space.shape or ()), dtype=torch.uint8)
    return torch.zeros(rows, observation_size(space))


def _eye(space: gymnasium.Space[Any], net: Net, generator: torch.Generator | None) -> tuple[nn.Module, int]:
    """What looks at an encoded observation, and how many features it gives."""
    if is_image(space) and net.image != "flat":
        return _image(space.shape or (), net, generator)
    if isinstance(space, Dict | Tuple) and net.image != "flat":
        return _parts(space, net, generator)
    if net.image == "minatar" and isinstance(space, Box) and len(space.shape) == 3:
        return _image(space.shape, net, generator, white=1.0)  # stored as it is: MinAtar's cells are 0 and 1
    return Flat(), observation_size(space)


class Flat(nn.Module):
    """Anything [N, ...] -> float32 [N, F]."""

    def forward(self, observation: Tensor) -> Tensor:
        """[N, ...] -> [N, F]."""
        return observation.flatten(1).float()


class Parts(nn.Module):
    """A flat row [N, size] cut into the parts of a Dict or Tuple: images are seen, the rest passes."""

    def __init__(self, eyes: list[nn.Module], sizes: list[int]) -> None:
        super().__init__()
        self.eyes = nn.ModuleList(eyes)
        self._sizes = sizes

    def forward(self, row: Tensor) -> Tensor:
        """[N, size] -> [N, F]."""
        parts = torch.split(row, self._sizes, 1)
        return torch.cat([eye(part) for eye, part in zip(self.eyes, parts, strict=True)], 1)


def _parts(space: Dict | Tuple, net: Net, generator: torch.Generator | None) -> tuple[nn.Module, int]:
    parts = members(space)
    eyes, total = [], 0
    for member in parts:
        eye, features = _eye(member, net, generator)
        eyes.append(eye)
        total += features
    return Parts(eyes, [observation_size(member) for member in parts]), total


# ---------------------------------------------------------------------------------------------------------- images


class Image(nn.Module):
    """Images, as they are or as flat rows -> features [N, F], by convolutions over values from 0 to 1."""

    def __init__(self, convolutions: nn.Module, shape: tuple[int, ...], channels_last: bool, white: float) -> None:
        """shape: [H, W, C] or [C, H, W]. white: the value that is seen as 1."""
        super().__init__()
        self.convolutions = convolutions
        self._shape = shape
        self._last = channels_last
        self._white = white

    def forward(self, image: Tensor) -> Tensor:
        """[N, *shape], or a flat row for each [N, size]; any type of numbers."""
        pixels = image.reshape(len(image), *self._shape)
        # Channels last in memory, however they come: a pass there and back takes a fifth less on a processor.
        planes = (pixels.permute(0, 3, 1, 2) if self._last else pixels).to(
            torch.float32, copy=True, memory_format=torch.channels_last
        )
        features: Tensor = self.convolutions(planes.div_(self._white))
        return features.flatten(1)


def _image(
    shape: tuple[int, ...], net: Net, generator: torch.Generator | None, white: float = 255.0
) -> tuple[nn.Module, int]:
    last = shape[2] < shape[0]  # channels are few: 84x84x4 has them last, a stack 4x84x84 first
    channels, height, width = (shape[2], shape[0], shape[1]) if last else shape
    if net.image == "minatar":
        seen: nn.Module = _minatar(channels, net.layer_norm, generator)
    else:
        nature = net.image == "nature"
        seen = _nature(channels, net.layer_norm, generator) if nature else _resnet(channels, generator)
    try:
        with torch.no_grad():
            size = seen(torch.zeros(1, channels, height, width)).numel()
    except RuntimeError:
        size = 0
    if size == 0:
        raise SpecError("net.image", f"an image of {height}x{width} is too small for {net.image}", hint="image: flat")
    return Image(seen, shape, last, white), size


def convolution(inputs: int, outputs: int, kernel: int, stride: int, padding: int = 0, *,
                generator: torch.Generator | None = None) -> nn.Conv2d:  # fmt: skip
    """A convolution with orthogonal weights of gain sqrt 2 and biases 0."""
    layer = unset(nn.Conv2d, inputs, outputs, kernel, stride, padding)
    nn.init.orthogonal_(layer.weight, math.sqrt(2), generator=generator)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _nature(channels: int, layer_norm: bool, generator: torch.Generator | None) -> nn.Module:
    """Mnih et al. 2015 (Nature 518), without its last hidden layer, which is `hidden`'s."""
    plan = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    layers: list[nn.Module] = []
    for outputs, kernel, stride in plan:
        layers.append(convolution(channels, outputs, kernel, stride, generator=generator))
        layers += [nn.GroupNorm(1, outputs), nn.ReLU()] if layer_norm else [nn.ReLU()]
        channels = outputs
    return nn.Sequential(*layers)


def _minatar(channels: int, layer_norm: bool, generator: torch.Generator | None) -> nn.Module:
    """Young and Tian 2019 (arXiv:1903.03176), without its hidden layer of 128, which is `hidden`'s."""
    layers: list[nn.Module] = [convolution(channels, 16, 3, 1, generator=generator)]
    layers += [nn.GroupNorm(1, 16)] if layer_norm else []
    return nn.Sequential(*layers, nn.ReLU())


class Residual(nn.Module):
    """relu, conv 3x3, relu, conv 3x3, and the input added: [N, C, H, W] -> the same."""

    def __init__(self, channels: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.first = convolution(channels, channels, 3, 1, 1, generator=generator)
        self.second = convolution(channels, channels, 3, 1, 1, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same."""
        inner: Tensor = self.second(torch.relu(self.first(torch.relu(x))))
        return x + inner


def _resnet(channels: int, generator: torch.Generator | None) -> nn.Module:
    """The deeper network of IMPALA (Espeholt et al. 2018, figure 3, arXiv:1802.01561), without its last layer."""
    layers: list[nn.Module] = []
    for outputs in (16, 32, 32):
        layers.append(convolution(channels, outputs, 3, 1, 1, generator=generator))
        layers += [nn.MaxPool2d(3, 2, 1), Residual(outputs, generator), Residual(outputs, generator)]
        channels = outputs
    return nn.Sequential(*layers, nn.ReLU())
