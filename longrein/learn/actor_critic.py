"""A policy with a value beside it, and the values of a rollout's rows and of their successors. Knows no update rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn import policy_value
from longrein.learn.batch import Batch
from longrein.learn.chain import Pass
from longrein.learn.distributions import Distribution, action_form
from longrein.learn.inputs import Inputs
from longrein.learn.policy_value import OwnModel, PolicyValue
from longrein.learn.recurrent import begins
from longrein.learn.returns import continues
from longrein.learn.torsos import Net, Torso

ACTION_SPACES: tuple[type[gymnasium.Space[Any]], ...] = (Discrete, MultiDiscrete, MultiBinary, Box, Tuple, Dict)


class ActorCriticPolicy(nn.Module):
    """pi(a|s), and V(s) unless `critic` is off.

    shared: one torso for both heads, rather than one each. recurrent: whether the net may have a recurrent layer.
    Acts with the generator it is given. Raises SpecError for spaces it cannot see or act in.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        net: Net,
        *,
        shared: bool = False,
        critic: bool = True,
        recurrent: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if net.recurrent != "none" and not recurrent:
            raise SpecError("net.recurrent", f"this algorithm has no recurrent policy, got {net.recurrent!r}",
                            hint="recurrent: none")  # fmt: skip
        self.form = action_form(action_space)
        self.inputs = Inputs(observation_space, net, self.form)
        self.with_critic = critic
        self.net = policy_value.make_policy_value(
            self.inputs.space, action_space, self.form, net, shared=shared or not critic, generator=generator
        )

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...], masks included."""
        return self.inputs.encode(observation)

    def initial_state(self, num_envs: int) -> NDArray[np.float32] | None:
        """What a recurrent policy remembers when B episodes begin: [B, S] of zeros; None when it is not recurrent."""
        return np.zeros((num_envs, self.net.state_size), np.float32) if self.net.state_size else None

    @torch.no_grad()
    def act(
        self,
        observation: NDArray[np.generic],
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...], state [B, S] of a recurrent policy (zeros if left out) -> actions [B, ...].

        Extras are empty, or of a recurrent policy `state`, as it was given, and `next_state`.
        """
        if not deterministic and not self.inputs.choices:
            chosen = policy_value.quick_choice(self.net, self.form, observation, generator)
            if chosen is not None:
                return chosen[0], {}
        if state is None:
            state = self.initial_state(len(observation))
        seen, mask = self.inputs.split(torch.from_numpy(observation))
        numbers, next_state = self.net.act(seen, None if state is None else torch.from_numpy(state))
        distribution = policy_value.distribution(self.net, self.form, numbers, mask)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        if state is None or next_state is None:
            return action.numpy(), {}
        return action.numpy(), {"state": state, "next_state": next_state.numpy()}

    def for_env(self, action: NDArray[np.generic]) -> Any:
        """Actions of `act` -> what the vector environment takes: shaped, clipped to its bounds, in parts."""
        return self.form.for_env(action)

    def distribution(self, observation: Tensor) -> Distribution:
        """Without recurrence. Encoded observations [N, ...] -> N distributions over actions."""
        seen, mask = self.inputs.split(observation)
        return policy_value.distribution(self.net, self.form, self.net.act(seen)[0], mask)

    def evaluate(self, observation: Tensor) -> tuple[Distribution, Tensor]:
        """Without recurrence. Encoded observations [N, ...] -> N distributions, and values [N], 0 without a critic."""
        if not self.with_critic:
            return self.distribution(observation), torch.zeros(len(observation))
        seen, mask = self.inputs.split(observation)
        numbers, value = self.net.evaluate(seen)
        return policy_value.distribution(self.net, self.form, numbers, mask), value

    def evaluate_apart(self, observation: Tensor) -> tuple[Distribution, Tensor, tuple[Pass, ...]]:
        """As `evaluate`, and the passes that are to go `back` when the loss has; none where autograd does that."""
        if not self.with_critic:
            return *self.evaluate(observation), ()
        seen, mask = self.inputs.split(observation)
        numbers, value, passes = self.net.evaluate_apart(seen)
        return policy_value.distribution(self.net, self.form, numbers, mask), value, passes

    def value(self, observation: Tensor) -> Tensor:
        """Without recurrence. Encoded observations [N, ...] -> values [N], in reward units; 0 without a critic."""
        if not self.with_critic:
            return torch.zeros(len(observation))
        return self.net.value(self.inputs.split(observation)[0])

    def rollout(self, batch: Batch, apart: list[Pass] | None = None) -> tuple[Distribution, Tensor, Tensor, Tensor]:
        """Of a time-major batch, N of whose rows are valid: distributions and values [N], with gradients;
        then V(s_t) and V(s'_t) [T, B] without, 0 in invalid rows.

        A recurrent policy begins in extras["state"], or in zeros where the batch has none.
        apart: where it is given, it takes the passes that the caller lets go `back` when the loss has.
        """
        valid = batch.valid
        spread = torch.zeros_like(batch.reward)
        if isinstance(self.net, PolicyValue) and self.net.state_size:
            return self._sequences(self.net, batch)
        if apart is None:
            distribution, value = self.evaluate(batch.observation[valid])
        else:
            distribution, value, passes = self.evaluate_apart(batch.observation[valid])
            apart += passes
        spread[valid] = value.detach()
        return distribution, value, spread, successor_values(self.value, batch, spread)

    def _sequences(self, net: PolicyValue, batch: Batch) -> tuple[Distribution, Tensor, Tensor, Tensor]:
        valid = batch.valid
        # What stands in invalid rows must not reach a gradient, not even times 0.
        hidden = (~valid).view(*valid.shape, *[1] * (batch.observation.ndim - 2))
        seen, mask = self.inputs.split(batch.observation.masked_fill(hidden, 0))
        ends = valid & ~batch.terminated & ~continues(batch.done, valid)  # the others' successor is the next row
        successor, _ = self.inputs.split(batch.next_observation[ends])
        state = batch.extras["state"][0] if "state" in batch.extras else torch.zeros(valid.shape[1], net.state_size)
        begin = begins(batch.done, valid)
        numbers, value = net.evaluate_sequences(seen, state, begin)
        with torch.no_grad():
            _, later = net.value_sequences(seen, (ends, successor), state, begin)
        if not self.with_critic:
            value, later = torch.zeros_like(batch.reward), torch.zeros_like(batch.reward)
        distribution = policy_value.distribution(net, self.form, numbers[valid], None if mask is None else mask[valid])
        return distribution, value[valid], value.detach() * valid, later * (valid & ~batch.terminated)

    # What looks into the layers, as K-FAC does, finds them here.

    @property
    def torso(self) -> Torso:
        """The policy's torso, and the value's where it is shared."""
        return self._layers().actor_stem.torso

    @property
    def actor(self) -> nn.Linear:
        """The policy's head."""
        return self._layers().actor

    @property
    def critic_torso(self) -> Torso | None:
        """The value's torso where it has its own."""
        stem = self._layers().critic_stem
        return None if stem is None else stem.torso

    @property
    def critic(self) -> nn.Linear | None:
        """The value's head."""
        return self._layers().critic if self.with_critic else None

    @property
    def log_std(self) -> nn.Parameter | None:
        """Logarithms of the deviations; None for choices."""
        return self.net.log_std

    def _layers(self) -> PolicyValue:
        if isinstance(self.net, OwnModel):
            raise SpecError("net.model_maker", "this algorithm looks into the layers of its network",
                            hint="feature_maker gives it a torso of your own")  # fmt: skip
        return self.net


@torch.no_grad()
def successor_values(value_of: Callable[[Tensor], Tensor], batch: Batch, value: Tensor) -> Tensor:
    """V(s'_t) of a time-major batch [T, B], 0 where it is not asked for: in invalid and in terminated rows.

    value_of: encoded observations [N, ...] -> [N]. value: V(s_t) [T, B], without gradient.
    Where the episode goes on, V(s'_t) is V(s_{t+1}), which is there already; only ends cost another pass.
    """
    goes_on = continues(batch.done, batch.valid)
    next_value = torch.zeros_like(value)
    next_value[:-1] = value[1:]
    next_value = next_value.masked_fill(~goes_on, 0.0)
    asked = batch.valid & ~batch.terminated & ~goes_on
    if asked.any():
        next_value[asked] = value_of(batch.next_observation[asked])
    return next_value
