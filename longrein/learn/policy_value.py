"""The network of a policy and of its value: one torso or two, recurrent or not, or a model of the user's own.

Knows what goes in and out of it; no masks, no normalisation, no update rule.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.chain import Chain, Pass
from longrein.learn.distributions import ActionForm, Distribution, quick_categorical
from longrein.learn.networks import orthogonal
from longrein.learn.recurrent import Core, Sequences
from longrein.learn.torsos import Net, made, make_torso, zeros

ROWS_AT_ONCE, NUMBERS_AT_ONCE = 2048, 2_000_000
"""Rows of one pass without gradient, and numbers in them, at most: convolutions keep some 20 bytes for each number."""


class Stem(nn.Module):
    """A torso, and the recurrent layer behind it where the net has one."""

    def __init__(self, space: gymnasium.Space[Any], net: Net, generator: torch.Generator | None) -> None:
        super().__init__()
        self.torso = make_torso(space, net, generator)
        self.core: Core | None = None
        self.size, self.state_size = self.torso.size, 0
        if net.recurrent != "none":
            self.core = Core(net.recurrent, self.torso.size, net.recurrent_size, generator)
            self.size, self.state_size = self.core.size, self.core.state_size

    def step(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Inputs [N, ...], state [N, state_size] or None -> features [N, size], next state or None."""
        features: Tensor = self.torso(inputs)
        if self.core is None:
            return features, None
        assert state is not None, "a recurrent layer needs its state"
        return self.core.step(features, state)

    def run(
        self, inputs: Tensor, state: Tensor, sequences: Sequences, ends: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs [T, B, ...] from states [B, state_size] -> features of the rows, and of their successors.

        ends: bool [T, B] of M rows that end a sequence, and their successors' inputs [M, ...].
        """
        assert self.core is not None
        features = self.torso(inputs.flatten(0, 1)).view(*inputs.shape[:2], -1)
        seen = None if ends is None else (ends[0], self.torso(ends[1]))
        return sequences.run(self.core, features, state, seen)


class PolicyValue(nn.Module):
    """Numbers for the action's distribution, and a value, of each observation.

    shared: both heads on one stem; else one each, since sharing is worse on classic control and MuJoCo.
    log_std does not depend on the observation and starts at 0; there is none for choices.
    A row of state is the policy's, then the value's where it has its own. Raises SpecError.
    """

    def __init__(
        self,
        space: gymnasium.Space[Any],
        form: ActionForm,
        net: Net,
        *,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        # Gain 0.01: every action starts about equally likely. Gain 1: values start on the scale of their inputs.
        self.actor_stem = Stem(space, net, generator)
        self.actor = orthogonal(self.actor_stem.size, form.num_parameters, 0.01, generator)
        self.critic_stem = None if shared else Stem(space, net, generator)
        self.critic = orthogonal(self.actor_stem.size, 1, 1.0, generator)
        self.log_std = nn.Parameter(torch.zeros(form.num_deviations)) if form.num_deviations else None
        self.state_size = self.actor_stem.state_size * (1 if shared else 2)  # 0: not recurrent
        self.actor_chain = None if self.state_size else Chain.of(self.actor_stem.torso, self.actor)
        self.critic_chain = None
        if self.critic_stem is not None and not self.state_size:
            self.critic_chain = Chain.of(self.critic_stem.torso, self.critic)
        self.joint = shared and not self.state_size and self.actor_chain is None  # `evaluate` costs what `act` does

    def act(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Inputs [N, ...], state [N, state_size] -> the distribution's numbers [N, P], and the next state."""
        if self.actor_chain is not None and not torch.is_grad_enabled():
            return self.actor_chain(inputs), None
        if not self.state_size:
            numbers: Tensor = self.actor(self.actor_stem.torso(inputs))
            return numbers, None
        assert state is not None
        if self.critic_stem is None:
            features, next_state = self.actor_stem.step(inputs, state)
            return self.actor(features), next_state
        # The value's state is taken along, so that what is stored with a rollout's first row holds for both.
        actor_state, critic_state = state.chunk(2, -1)
        features, next_actor = self.actor_stem.step(inputs, actor_state)
        _, next_critic = self.critic_stem.step(inputs, critic_state)
        assert next_actor is not None
        assert next_critic is not None
        return self.actor(features), torch.cat([next_actor, next_critic], -1)

    def evaluate(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Without recurrence. Inputs [N, ...] -> (the distribution's numbers [N, P], values [N])."""
        features = self.actor_stem.torso(inputs)
        numbers = self.actor(features)
        if self.critic_stem is not None:
            features = self.critic_stem.torso(inputs)
        return numbers, self.critic(features).squeeze(-1)

    def evaluate_apart(self, inputs: Tensor) -> tuple[Tensor, Tensor, tuple[Pass, ...]]:
        """As `evaluate`, and the passes that are to go `back` when the loss has; none where autograd does that."""
        if self.actor_chain is None or self.critic_chain is None:
            return *self.evaluate(inputs), ()
        actor, critic = self.actor_chain.there(inputs), self.critic_chain.there(inputs)
        return actor.output, critic.output.squeeze(-1), (actor, critic)

    def value(self, inputs: Tensor) -> Tensor:
        """Without recurrence. Inputs [N, ...] -> values [N], in reward units."""
        if self.critic_chain is not None and not torch.is_grad_enabled():
            return self.critic_chain(inputs).squeeze(-1)
        value: Tensor = self.critic((self.critic_stem or self.actor_stem).torso(inputs)).squeeze(-1)
        return value

    def evaluate_sequences(self, inputs: Tensor, state: Tensor, begin: Tensor) -> tuple[Tensor, Tensor]:
        """With recurrence. Inputs [T, B, ...], state before the first row [B, state_size], begin bool [T, B].

        Returns (the distribution's numbers [T, B, P], values [T, B]), as step by step with the state set to 0 at
        `begin` (see `recurrent.begins`).
        """
        sequences = Sequences.of(begin)
        if self.critic_stem is None:
            features, _ = self.actor_stem.run(inputs, state, sequences)
            return self.actor(features), self.critic(features).squeeze(-1)
        actor_state, critic_state = state.chunk(2, -1)
        features, _ = self.actor_stem.run(inputs, actor_state, sequences)
        seen, _ = self.critic_stem.run(inputs, critic_state, sequences)
        return self.actor(features), self.critic(seen).squeeze(-1)

    def value_sequences(
        self, inputs: Tensor, ends: tuple[Tensor, Tensor], state: Tensor, begin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """With recurrence. Values of the rows and of their successors, each [T, B]; as `values` below."""
        stem = self.critic_stem or self.actor_stem
        own = state if self.critic_stem is None else state.chunk(2, -1)[1]
        now, later = stem.run(inputs, own, Sequences.of(begin), ends)
        return self.critic(now).squeeze(-1), self.critic(later).squeeze(-1)


class OwnModel(nn.Module):
    """A user's model, inputs [N, ...] -> (numbers [N, P], value [N] or [N, 1]), in PolicyValue's place.

    P is what the action's form asks for; with as many more as it has deviations, these are their logarithms, of each
    observation. Raises SpecError when the model gives something else.
    """

    state_size = 0
    joint = True  # `evaluate` costs what `act` does

    def __init__(
        self,
        space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        form: ActionForm,
        net: Net,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if net.recurrent != "none":
            raise SpecError("net.recurrent", f"{net.recurrent!r} beside net.model_maker", hint="recurrent: none")
        assert net.model_maker is not None
        self.model = made(net.model_maker, "net.model_maker", generator, space, action_space)
        with torch.no_grad():
            given = self.model(zeros(space, 2))
        sizes = {form.num_parameters, form.num_parameters + form.num_deviations}
        shapes = [tuple(part.shape) for part in given] if isinstance(given, tuple | list) else [type(given).__name__]
        if len(shapes) != 2 or shapes[0] not in {(2, size) for size in sizes} or shapes[1] not in {(2,), (2, 1)}:
            sought = " or ".join(f"[N, {size}]" for size in sorted(sizes))
            raise SpecError("net.model_maker", f"its model gives {shapes} for 2 observations",
                            hint=f"a pair: numbers of the action's distribution {sought}, and values [N]")  # fmt: skip
        own = shapes[0] == (2, form.num_parameters)
        self.log_std = nn.Parameter(torch.zeros(form.num_deviations)) if form.num_deviations and own else None

    def act(self, inputs: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Inputs [N, ...] -> the distribution's numbers [N, P], and no state."""
        return self.model(inputs)[0], None

    def evaluate(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs [N, ...] -> (the distribution's numbers [N, P], values [N])."""
        numbers, value = self.model(inputs)
        return numbers, value.reshape(-1)

    def evaluate_apart(self, inputs: Tensor) -> tuple[Tensor, Tensor, tuple[Pass, ...]]:
        """As `evaluate`: autograd does all that is to be done."""
        return *self.evaluate(inputs), ()

    def value(self, inputs: Tensor) -> Tensor:
        """Inputs [N, ...] -> values [N], in reward units."""
        return self.evaluate(inputs)[1]


def make_policy_value(
    space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    form: ActionForm,
    net: Net,
    *,
    shared: bool = False,
    generator: torch.Generator | None = None,
) -> PolicyValue | OwnModel:
    """The network that a Net describes, for what is seen and for the form of actions. Raises SpecError."""
    if net.model_maker is not None:
        return OwnModel(space, action_space, form, net, generator)
    return PolicyValue(space, form, net.behind_inputs, shared=shared, generator=generator)


def distribution(
    network: PolicyValue | OwnModel, form: ActionForm, numbers: Tensor, mask: Tensor | None = None
) -> Distribution:
    """The distribution over actions: numbers [N, P] that the network gave, mask bool [N, num_choices] or None."""
    if numbers.shape[-1] == form.num_parameters:
        return form.distribution(numbers, network.log_std, mask)
    parameters, log_std = torch.split(numbers, [form.num_parameters, form.num_deviations], -1)
    return form.distribution(parameters, log_std, mask)


def quick_choice(
    network: PolicyValue | OwnModel, form: ActionForm, rows: NDArray[Any], generator: torch.Generator | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Actions int64 [N] drawn for what the network takes [N, ...], and their log-probabilities [N], by NumPy alone.

    None where that is not possible or not faster: with many rows, for other actions than one choice.
    """
    chain = network.actor_chain if isinstance(network, PolicyValue) else None
    if chain is None or not _one_choice(form) or not chain.few(len(rows)):
        return None
    return quick_categorical(chain.of_few(rows), generator)


def quick_chains(network: PolicyValue | OwnModel, form: ActionForm, rows: int) -> tuple[Chain, Chain] | None:
    """The chains to one choice's logits and to the value, where NumPy is the faster for so many rows; else None."""
    if not isinstance(network, PolicyValue) or not _one_choice(form):
        return None
    actor, critic = network.actor_chain, network.critic_chain
    return None if actor is None or critic is None or not (actor.few(rows) and critic.few(rows)) else (actor, critic)


def _one_choice(form: ActionForm) -> bool:
    return form.single and form.num_choices == form.num_parameters


@torch.no_grad()
def values(
    network: PolicyValue | OwnModel,
    inputs: Tensor,
    ends: tuple[Tensor, Tensor],
    state: Tensor | None = None,
    begin: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Values of a rollout's rows [T, B, ...] and of their true successors, each [T, B], without gradient.

    ends: bool [T, B] of those M rows whose successor is not the next row, and its inputs [M, ...]; V(s'_t) of the
    others is V(s_{t+1}), which is there already. Of a recurrent network also the state before the first row, and
    bool [T, B] where states begin. The last row's successor is without meaning unless it is among the ends.
    known: the rows' values [T, B], where one who is not recurrent has them already.
    """
    if isinstance(network, PolicyValue) and network.state_size:
        assert state is not None
        assert begin is not None
        return network.value_sequences(inputs, ends, state, begin)
    at, successor = ends
    value = _in_parts(network, inputs.flatten(0, 1)).view(inputs.shape[:2]) if known is None else known
    next_value = torch.cat([value[1:], torch.zeros_like(value[:1])])
    if len(successor):
        next_value[at] = _in_parts(network, successor)
    return value, next_value


def _in_parts(network: PolicyValue | OwnModel, rows: Tensor) -> Tensor:
    at_once = max(min(ROWS_AT_ONCE, NUMBERS_AT_ONCE // rows[0].numel()), 1)
    return torch.cat([network.value(part) for part in torch.split(rows, at_once)])
