"""Distributions over actions, and the form of an action in its space. Knows probabilities, no network.

Ours rather than torch.distributions: they take a generator, check nothing on the hot path, and cost a third.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError

_TINY = torch.finfo(torch.float32).tiny
RULED_OUT = -1e9
"""Logit of a masked option. Finite: with -inf, p * log p would be NaN, and so would a row with every option masked."""


class Distribution(Protocol):
    """N independent distributions over one action each."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One action for each: [N, ...]."""

    def mode(self) -> Tensor:
        """The likeliest action for each: [N, ...]."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability (or log-density) of actions [N, ...]: [N], in nats."""

    def entropy(self) -> Tensor:
        """Entropy of each: [N], in nats (differential for densities, so it may be negative)."""


class Categorical:
    """One of K choices: actions int64 [N]."""

    def __init__(self, logits: Tensor) -> None:
        self.log_probs = logits.log_softmax(-1)  # [N, K]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions int64 [N]."""
        # What torch.multinomial does, in a third of its time: probabilities over exponential noise, the largest wins.
        # Its noise may be 0, and 0 / 0 would win; here an option that is ruled out stays so.
        noise = torch.empty_like(self.log_probs).exponential_(generator=generator).clamp_(min=_TINY)
        return (self.log_probs.exp() / noise).argmax(-1)

    def mode(self) -> Tensor:
        """Actions int64 [N]; the first of equals."""
        return self.log_probs.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """[N], in nats."""
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """[N], in nats."""
        # A finite stand-in for log 0: 0 * -inf is NaN, 0 * -1e9 is 0.
        return -(self.log_probs.exp() * self.log_probs.clamp(min=RULED_OUT)).sum(-1)


def quick_categorical(
    logits: NDArray[np.float32], generator: torch.Generator | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What `Categorical` samples by the same generator, and its log-probabilities: of few rows, so in NumPy.

    logits [N, K] -> (actions int64 [N], [N] in nats). With eight environments a third of an actor's time is this.
    """
    noise = torch.empty(logits.shape).exponential_(generator=generator).numpy()
    log_probs = logits - logits.max(1, keepdims=True)
    probs = np.exp(log_probs)
    action: NDArray[np.int64] = (probs / np.maximum(noise, _TINY)).argmax(1)
    return action, log_probs[np.arange(len(action)), action] - np.log(probs.sum(1))


class MultiCategorical:
    """K independent choices, each with its own number of options: actions int64 [N, K]. Logs and entropies add."""

    def __init__(self, logits: Tensor, sizes: tuple[int, ...]) -> None:
        self.parts = [Categorical(part) for part in torch.split(logits, list(sizes), -1)]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions int64 [N, K]."""
        return torch.stack([part.sample(generator) for part in self.parts], -1)

    def mode(self) -> Tensor:
        """Actions int64 [N, K]."""
        return torch.stack([part.mode() for part in self.parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """[N], in nats."""
        parts = zip(self.parts, action.unbind(-1), strict=True)
        return torch.stack([part.log_prob(choice) for part, choice in parts]).sum(0)

    def entropy(self) -> Tensor:
        """[N], in nats."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)


class Bernoulli:
    """K independent yes-or-no choices: actions int64 [N, K], 0 or 1."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits  # [N, K]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions int64 [N, K]."""
        return torch.bernoulli(self.logits.sigmoid(), generator=generator).long()

    def mode(self) -> Tensor:
        """Actions int64 [N, K]; 0 of equals."""
        return (self.logits > 0).long()

    def log_prob(self, action: Tensor) -> Tensor:
        """[N], in nats."""
        # log sigmoid(x) for 1, log sigmoid(-x) for 0.
        return torch.nn.functional.logsigmoid(self.logits * (2 * action - 1)).sum(-1)

    def entropy(self) -> Tensor:
        """[N], in nats."""
        logsigmoid = torch.nn.functional.logsigmoid
        p = self.logits.sigmoid()
        return -(p * logsigmoid(self.logits) + (1 - p) * logsigmoid(-self.logits)).sum(-1)


class DiagonalGaussian:
    """K independent normal variables, unbounded: actions float32 [N, K]. log_std [K] or [N, K]."""

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean
        self.log_std = log_std.expand_as(mean)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions float32 [N, K]."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        """Actions float32 [N, K]."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density [N], in nats."""
        z = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """Differential entropy [N], in nats."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class Product:
    """Independent distributions side by side: an action is one flat row [N, K] of theirs. Logs and entropies add."""

    def __init__(self, parts: Sequence[Distribution], forms: Sequence[ActionForm]) -> None:
        self.parts = parts
        self._forms = forms

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Actions [N, K]: int64, or float32 where any part has numbers that are no choices."""
        return self._row([part.sample(generator) for part in self.parts])

    def mode(self) -> Tensor:
        """Actions [N, K]."""
        return self._row([part.mode() for part in self.parts])

    def log_prob(self, action: Tensor) -> Tensor:
        """[N], in nats."""
        pieces = torch.split(action, [form.width for form in self._forms], -1)
        return torch.stack(
            [
                part.log_prob((piece.squeeze(-1) if form.single else piece).to(form.dtype))
                for part, form, piece in zip(self.parts, self._forms, pieces, strict=True)
            ]
        ).sum(0)

    def entropy(self) -> Tensor:
        """[N], in nats."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def _row(self, actions: Sequence[Tensor]) -> Tensor:
        dtype = _row_dtype(self._forms)
        pairs = zip(self._forms, actions, strict=True)
        return torch.cat([(a.unsqueeze(-1) if form.single else a).to(dtype) for form, a in pairs], -1)


class Distribute(Protocol):
    """Makes distributions of a network's output."""

    def __call__(self, output: Tensor, log_std: Tensor | None, mask: Tensor | None = None, /) -> Distribution:
        """Output [N, num_parameters], deviations' logarithms [K] or [N, K], mask bool [N, num_choices]: N of them.

        mask: False rules an option out. A choice without any option left is uniform over all of them.
        """


@dataclass(frozen=True)
class ActionForm:
    """How a policy's output becomes a distribution, and its action an action of the space."""

    num_parameters: int
    """Numbers that the network gives for one observation."""
    distribution: Distribute
    """(network output [N, num_parameters], log_std [K] or None, mask [N, num_choices] or None) -> Distribution."""
    for_env: Callable[[NDArray[Any]], Any]
    """Stored actions [N, ...] -> what the environment takes: shaped, shifted, clipped to its bounds, split in parts."""
    num_deviations: int = 0
    """Standard deviations to learn beside the network's output; 0 for choices."""
    num_choices: int = 0
    """Numbers of an action mask: the options of every Discrete and MultiDiscrete, in order. 0: nothing to mask."""
    width: int = 1
    """Numbers of one stored action."""
    single: bool = False
    """Whether a stored action is one number without a dimension of its own: [N], not [N, 1]."""
    dtype: torch.dtype = torch.int64
    """Of stored actions."""


def action_form(space: gymnasium.Space[Any]) -> ActionForm:
    """The form of one environment's actions: Discrete, MultiDiscrete, MultiBinary, a float Box, Tuple or Dict of them.

    A Box's actions are stored unclipped, since their density is that of the unclipped variable. Those of a Tuple or
    Dict are one flat row. Raises SpecError for any other space.
    """
    if isinstance(space, Discrete):
        first, options = int(space.start), int(space.n)
        return ActionForm(
            options,
            lambda output, _, mask=None: Categorical(_masked(output, mask)),
            lambda action: action + first,
            num_choices=options,
            single=True,
        )
    if isinstance(space, MultiDiscrete):
        sizes = tuple(int(n) for n in space.nvec.reshape(-1))
        shape, firsts = space.nvec.shape, space.start
        return ActionForm(
            sum(sizes),
            lambda output, _, mask=None: MultiCategorical(_masked(output, mask), sizes),
            lambda action: action.reshape(-1, *shape) + firsts,
            num_choices=sum(sizes),
            width=len(sizes),
        )
    if isinstance(space, MultiBinary):
        form = space.shape
        return ActionForm(
            math.prod(form),
            lambda output, _, mask=None: Bernoulli(output),
            lambda action: action.reshape(-1, *form).astype(np.int8),
            width=math.prod(form),
        )
    if isinstance(space, Box) and np.issubdtype(space.dtype, np.floating):
        low, high = space.low, space.high
        size = math.prod(space.shape)
        return ActionForm(
            size,
            _gaussian,
            lambda action: action.reshape(-1, *space.shape).clip(low, high).astype(space.dtype),
            num_deviations=size,
            width=size,
            dtype=torch.float32,
        )
    if isinstance(space, Tuple):
        return _product([action_form(part) for part in space.spaces], tuple)
    if isinstance(space, Dict):
        names = list(space.spaces)
        forms = [action_form(part) for part in space.spaces.values()]
        return _product(forms, lambda actions: dict(zip(names, actions, strict=True)))
    raise SpecError(
        "env.action_space",
        f"a policy cannot act in {space}",
        hint="Discrete, MultiDiscrete, MultiBinary, float Box, and Tuple or Dict of them will do; wrap the environment",
    )


def _masked(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits if mask is None else torch.where(mask, logits, RULED_OUT)


def _gaussian(output: Tensor, log_std: Tensor | None, mask: Tensor | None = None) -> Distribution:
    assert log_std is not None, "a Box needs deviations"
    return DiagonalGaussian(output, log_std)


def _product(forms: list[ActionForm], together: Callable[[list[Any]], Any]) -> ActionForm:
    """The form of several actions at once. together: their parts for the environment -> its action."""
    parameters, deviations, choices, widths = (
        [getattr(form, name) for form in forms] for name in ("num_parameters", "num_deviations", "num_choices", "width")
    )
    ends = np.cumsum(widths)[:-1]

    def distribution(output: Tensor, log_std: Tensor | None, mask: Tensor | None = None, /) -> Distribution:
        outputs = torch.split(output, parameters, -1)
        log_stds = [None] * len(forms) if log_std is None else torch.split(log_std, deviations, -1)
        masks = [None] * len(forms) if mask is None else torch.split(mask, choices, -1)
        pieces = zip(forms, outputs, log_stds, masks, strict=True)
        return Product([form.distribution(out, stds, options) for form, out, stds, options in pieces], forms)

    def for_env(action: NDArray[Any]) -> Any:
        pieces = zip(forms, np.split(action, ends, axis=-1), strict=True)
        return together([form.for_env(_stored(form, piece)) for form, piece in pieces])

    return ActionForm(
        sum(parameters), distribution, for_env, sum(deviations), sum(choices), sum(widths), dtype=_row_dtype(forms)
    )


def _row_dtype(forms: Sequence[ActionForm]) -> torch.dtype:
    return torch.float32 if any(form.dtype == torch.float32 for form in forms) else torch.int64


def _stored(form: ActionForm, piece: NDArray[Any]) -> NDArray[Any]:
    """A piece of a flat row [N, width] as its own part stores it."""
    piece = piece[..., 0] if form.single else piece
    return piece if form.dtype == torch.float32 else piece.astype(np.int64)
