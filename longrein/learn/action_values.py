"""Networks that value every action, and the policy that acts on them. Knows heads and exploration, no update rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Discrete
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.arrays import Views, as_arrays
from longrein.learn.chain import Chain, Pass
from longrein.learn.distributions import action_form
from longrein.learn.exploration import allowed, boltzmann, epsilon_greedy, quick_epsilon_greedy
from longrein.learn.inputs import Inputs
from longrein.learn.networks import ACTIVATIONS, orthogonal
from longrein.learn.noisy import NoisyLinear, quiet, resample
from longrein.learn.torsos import Net, made, make_torso, zeros


@dataclass(frozen=True)
class Head:
    """What stands between features and action values."""

    hidden: int = 0
    """Units of a hidden layer of the head's own, one for each of a dueling head's two streams; 0: none."""
    dueling: bool = False
    """Whether a state's value and its actions' advantages have streams of their own."""
    noisy: str = "none"
    """Noise in the head's layers: none, independent or factorised."""
    sigma: float | None = None
    """Its deviation at the start, times 1 / sqrt(inputs) where factorised; None takes the paper's, 0.017 or 0.5."""
    distribution: str = "none"
    """What the head says of each action's return: its mean (none), probabilities of atoms (c51), quantiles (qr)."""
    outputs: int = 1
    """Numbers for each action: atoms or quantiles; 1 for none."""
    low: float = 0.0
    """The lowest atom, in reward units."""
    high: float = 1.0
    """The highest."""


class ActionValues(nn.Module):
    """Encoded observations [N, ...] -> what is known of each action's return: [N, A, Z].

    Z numbers an action: its value (Z = 1), logits of the atoms' probabilities, or quantiles.
    """

    support: Tensor

    def __init__(
        self,
        space: gymnasium.Space[Any],
        choices: int,
        net: Net,
        head: Head,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.choices, self.kind, self.outputs = choices, head.distribution, head.outputs
        self.chain: Chain | None = None
        self.model = None if net.model_maker is None else _own_model(space, choices, net, head, generator)
        if self.model is not None:
            self.value = None
            self.register_buffer("support", torch.zeros(1))
            return
        self.torso = make_torso(space, net, generator)
        self.advantage = _stream(self.torso.size, choices * head.outputs, net, head, generator)
        self.value = _stream(self.torso.size, head.outputs, net, head, generator) if head.dueling else None
        self.register_buffer("support", torch.linspace(head.low, head.high, head.outputs))  # of c51
        if self.value is None:
            self.chain = Chain.of(self.torso, self.advantage)

    def forward(self, observation: Tensor) -> Tensor:
        """[N, ...] -> [N, A, Z]."""
        if self.chain is not None and not torch.is_grad_enabled():
            return self.chain(observation).view(-1, self.choices, self.outputs)
        if self.model is not None:
            values: Tensor = self.model(observation)
            return values.unsqueeze(-1)
        features = self.torso(observation)
        if self.value is not None and features.requires_grad:
            # Both streams send a gradient into the torso: "Dueling Network Architectures", Wang et al. 2016, sec. 4.2.
            features.register_hook(lambda gradient: gradient / math.sqrt(2))
        said: Tensor = self.advantage(features).view(-1, self.choices, self.outputs)
        if self.value is not None:
            said = said - said.mean(1, keepdim=True) + self.value(features).unsqueeze(1)
        return said

    def apart(self, observation: Tensor) -> tuple[Tensor, tuple[Pass, ...]]:
        """As `forward`, and the pass that is to go `back` when the loss has; none where autograd does that."""
        if self.chain is None:
            return self(observation), ()
        there = self.chain.there(observation)
        return there.output.view(-1, self.choices, self.outputs), (there,)

    def mean(self, said: Tensor) -> Tensor:
        """What the network says [..., A, Z] -> action values [..., A], in reward units."""
        if self.kind == "c51":
            return said.softmax(-1) @ self.support
        return said.squeeze(-1) if self.outputs == 1 else said.mean(-1)


def _own_model(
    space: gymnasium.Space[Any], choices: int, net: Net, head: Head, generator: torch.Generator | None
) -> nn.Module:
    """A user's model, [N, ...] -> action values [N, A], in place of torso and head."""
    if head.dueling or head.hidden or head.noisy != "none" or head.distribution != "none":
        raise SpecError("net.model_maker", "gives the action values, and so leaves no head to choose",
                        hint="feature_maker; or dueling, noisy, distribution, head_hidden left out")  # fmt: skip
    assert net.model_maker is not None
    model = made(net.model_maker, "net.model_maker", generator, space, Discrete(choices))
    with torch.no_grad():
        given = model(zeros(space, 2))
    if not isinstance(given, Tensor) or given.shape != (2, choices):
        shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise SpecError("net.model_maker", f"its model gives {shape} for 2 observations",
                        hint=f"action values [N, {choices}]")  # fmt: skip
    return model


def _stream(size: int, outputs: int, net: Net, head: Head, generator: torch.Generator | None) -> nn.Module:
    layers: list[nn.Module] = []
    if head.hidden:
        layers += [_layer(size, head.hidden, math.sqrt(2), head, generator), ACTIVATIONS[net.activation]()]
        size = head.hidden
    return nn.Sequential(*layers, _layer(size, outputs, 1.0, head, generator))


def _layer(size: int, outputs: int, gain: float, head: Head, generator: torch.Generator | None) -> nn.Module:
    if head.noisy == "none":
        return orthogonal(size, outputs, gain, generator)
    sigma = head.sigma
    if sigma is not None and head.noisy == "factorised":
        sigma /= math.sqrt(size)
    return NoisyLinear(size, outputs, kind=head.noisy, sigma=sigma, generator=generator)


class ValuePolicy(nn.Module):
    """Acts on action values: the best one, or another as `exploration` has it.

    exploration: epsilon of epsilon-greedy, or with `softmax` the temperature of Boltzmann; whoever learns sets it.
    A noisy network draws new noise before every step: one sample for all environments.
    """

    exploration: Tensor

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        net: Net,
        head: Head,
        *,
        exploration: float,
        softmax: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(action_space, Discrete):
            raise SpecError("env.action_space", f"action values need a choice of actions, not {action_space}",
                            hint="Discrete will do; for others take ppo, or sac for a Box")  # fmt: skip
        if net.recurrent != "none":
            raise SpecError("net.recurrent", "this algorithm has no recurrent network", hint="recurrent: none")
        self.inputs = Inputs(observation_space, net, action_form(action_space))
        self.net = ActionValues(self.inputs.space, int(action_space.n), net.behind_inputs, head, generator)
        self.softmax = softmax
        self.noisy = head.noisy != "none"
        self._first = int(action_space.start)
        self.register_buffer("exploration", torch.tensor(exploration, dtype=torch.float64))
        self._read = Views(as_arrays)

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...]."""
        return self.inputs.encode(observation)

    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...] -> actions int64 [B], and no extras."""
        net = self.net
        chain = net.chain
        if chain is None or self.softmax or net.outputs > 1 or self.inputs.choices or not chain.few(len(observation)):
            return self._choose(torch.from_numpy(observation), deterministic, generator).numpy(), {}
        value = chain.of_few(observation)
        if deterministic:
            return value.argmax(-1), {}
        (epsilon,) = self._read.of([self.exploration])  # a fifth of the time of `exploration.item()`
        return quick_epsilon_greedy(value, float(epsilon), generator), {}

    def explore(self, exploration: float) -> None:
        """Set `exploration`."""
        (held,) = self._read.of([self.exploration])
        held[...] = exploration

    @torch.no_grad()
    def _choose(self, observation: Tensor, deterministic: bool, generator: torch.Generator | None) -> Tensor:
        """Encoded observations [B, ...] -> actions int64 [B], of any network."""
        seen, mask = self.inputs.split(observation)
        if deterministic:
            with quiet(self.net):
                value = self.net.mean(self.net(seen))
            return allowed(value, mask).argmax(-1)
        if self.noisy:
            resample(self.net, generator)
        value = self.net.mean(self.net(seen))
        explore = boltzmann if self.softmax else epsilon_greedy
        return explore(value, float(self.exploration), generator, mask)

    def values(self, observation: Tensor) -> Tensor:
        """Encoded observations [N, ...] -> action values [N, A], those of actions that are not allowed very low."""
        seen, mask = self.inputs.split(observation)
        return allowed(self.net.mean(self.net(seen)), mask)

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> those of the environment, which may count from another number than 0."""
        return action + self._first


# ------------------------------------------------------------------------------------------------------ learning to fit


@dataclass(frozen=True, slots=True)
class Taken:
    """Actions taken, and what each should be worth: [N, ...]."""

    observation: Tensor  # encoded
    action: Tensor  # int64
    target: Tensor  # in reward units

    def at(self, index: Tensor) -> Taken:
        """Some of the rows."""
        return Taken(self.observation[index], self.action[index], self.target[index])


FITTED = ("loss", "td_error", "q", "grad_norm")  # what `fit` measures


def fit(
    policy: ValuePolicy,
    optimizer: torch.optim.Optimizer,
    rows: Taken,
    *,
    epochs: int,
    minibatch_size: int,
    max_grad_norm: float | None,
    generator: torch.Generator,
) -> list[Tensor]:
    """Bring Q(s, a) to fixed targets, by squared error over shuffled minibatches of equal size.

    Returns what was measured before each gradient step, as FITTED names it: half the mean squared error, the mean
    size of the error, the mean of Q(s, a), and the gradient's norm before it was clipped.
    """
    parameters = list(policy.net.parameters())
    bound = math.inf if max_grad_norm is None else max_grad_norm
    pieces = -(-len(rows.target) // minibatch_size)
    measured = []
    for _ in range(epochs):
        # tensor_split makes equal pieces: a remainder of a few rows would be an update of mostly noise.
        for index in torch.randperm(len(rows.target), generator=generator).tensor_split(pieces):
            some = rows.at(index)
            q = policy.values(some.observation).gather(1, some.action.unsqueeze(1)).squeeze(1)
            error = some.target - q
            loss = 0.5 * error.square().mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            norm = nn.utils.clip_grad_norm_(parameters, bound)
            optimizer.step()
            measured.append(torch.stack([loss.detach(), error.detach().abs().mean(), q.detach().mean(), norm]))
    return measured
