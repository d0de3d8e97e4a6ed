"""PPO: proximal policy optimization with a clipped surrogate (Schulman et al. 2017, arXiv:1707.06347).

With the details of "The 37 Implementation Details of PPO" (Huang et al. 2022); docs/algorithms/ppo.md lists them and
where we differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn import losses, policy_value
from longrein.learn.batch import Batch
from longrein.learn.chain import Pass, backward
from longrein.learn.distributions import ActionForm, Distribution, action_form
from longrein.learn.eager import Adam
from longrein.learn.inputs import Inputs
from longrein.learn.networks import observation_size
from longrein.learn.normalise import ObservationNormaliser, RewardScale
from longrein.learn.optimizers import FlatParameters, set_lr
from longrein.learn.recurrent import begins
from longrein.learn.returns import continues, gae
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.torsos import Net, has_image

ACTION_SPACES = (Discrete, MultiDiscrete, MultiBinary, Box, Tuple, Dict)
TOLERATES_LAG = True  # the ratio is to the policy that acted, and it is clipped; advantages are not corrected


@dataclass(frozen=True)
class Config:
    """PPO's settings. A schedule is a function of env steps over all environments together."""

    NAME: ClassVar[str] = "ppo"  # in the table of algorithms

    rollout_steps: int = 128
    """Vector steps between updates; a batch has this many rows for each environment."""
    epochs: int = 4
    """Passes over each batch."""
    minibatch_size: int = 256
    """Rows of one optimizer step, at most; a batch is cut into minibatches of equal size."""
    gamma: float = 0.99
    """Discount per env step."""
    lambda_: float = 0.95
    """GAE's weight of longer sums, from 0 (one-step TD error) to 1 (whole return)."""
    lr: Schedule = 3e-4
    """Adam's learning rate; the paper's is Linear(lr, 0, all env steps)."""
    clip: Schedule = 0.2
    """How far the probability ratio may move from 1 before its gradient ends."""
    entropy_weight: Schedule = 0.0
    """Weight of the entropy bonus, in loss per nat."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    value_clip: float | None = None
    """How far a value may move in one update, in reward units; None leaves it free."""
    max_grad_norm: float = 0.5
    """Global norm to which gradients are clipped."""
    target_kl: float | None = None
    """Nats of approximate KL beyond which the update's other epochs are left out; None runs them all."""
    normalise_advantage: bool = True
    """Whether the advantages of each minibatch are brought to mean 0 and deviation 1."""
    normalise_observation: bool = False
    """Whether observations are brought to mean 0 and deviation 1, by running statistics inside the policy."""
    scale_reward: bool = False
    """Whether rewards are divided by the running deviation of the discounted return."""
    normal_clip: float = 10.0
    """Deviations to which normalised observations and scaled rewards are clipped."""
    initial_log_std: float = 0.0
    """Logarithm of the deviation, in units of the action, with which a Box's numbers are drawn at the start."""
    shared: bool = False
    """Whether policy and value share one torso (and recurrent layer), rather than having one each."""
    net: Net = Net()
    """What stands between observations and heads."""

    def __post_init__(self) -> None:
        refuse_negative(self.NAME, self)
        for name in ("rollout_steps", "epochs", "minibatch_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"{self.NAME}.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "lambda_"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"{self.NAME}.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")


class Policy(nn.Module):
    """PPO's policy and its value network, with the statistics that normalise their input."""

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.form: ActionForm = action_form(action_space)
        self.inputs = Inputs(observation_space, config.net, self.form)
        seen = self.inputs.space
        self.normaliser: ObservationNormaliser | None = None
        if config.normalise_observation:
            if has_image(seen):
                raise SpecError("ppo.normalise_observation", f"{seen} has images, which are scaled as they are seen",
                                hint="normalise_observation: false")  # fmt: skip
            self.normaliser = ObservationNormaliser(observation_size(seen), config.normal_clip)
        self.net = policy_value.make_policy_value(
            seen, action_space, self.form, config.net, shared=config.shared, generator=generator
        )
        if self.net.log_std is not None:
            nn.init.constant_(self.net.log_std, config.initial_log_std)

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...], masks included."""
        return self.inputs.encode(observation)

    def initial_state(self, num_envs: int) -> NDArray[np.float32] | None:
        """What a recurrent policy remembers when B episodes begin: [B, S] of zeros; None when it is not recurrent."""
        return np.zeros((num_envs, self.net.state_size), np.float32) if self.net.state_size else None

    @torch.inference_mode()
    def act(
        self,
        observation: NDArray[np.generic],
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...], state [B, S] of a recurrent policy (zeros if left out) -> actions [B, ...].

        Extras: log_prob [B] of the policy that acted; `value` [B] where the same pass gives it; where it is recurrent
        also `state`, as it was given, and `next_state`, for the next step of those episodes that go on.
        """
        if not deterministic and self.normaliser is None and not self.inputs.choices:
            chosen = policy_value.quick_choice(self.net, self.form, observation, generator)
            if chosen is not None:
                return chosen[0], {"log_prob": chosen[1]}
        if state is None:
            state = self.initial_state(len(observation))
        inputs, mask = self.split(torch.from_numpy(observation))
        extras: dict[str, NDArray[np.generic]] = {}
        if self.net.joint:
            (numbers, value), next_state = self.net.evaluate(inputs), None
            extras["value"] = value.numpy()
        else:
            numbers, next_state = self.net.act(inputs, None if state is None else torch.from_numpy(state))
        distribution = self.distribution(numbers, mask)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        extras["log_prob"] = distribution.log_prob(action).numpy()
        if state is not None and next_state is not None:
            extras |= {"state": state, "next_state": next_state.numpy()}
        return action.numpy(), extras

    def for_env(self, action: NDArray[np.generic]) -> Any:
        """Actions of `act` -> what the vector environment takes: shaped, clipped to its bounds, in parts."""
        return self.form.for_env(action)

    def split(self, observation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encoded observations [..., size] -> the network's input, normalised, and the action mask or None."""
        inputs, mask = self.inputs.split(observation)
        return inputs if self.normaliser is None else self.normaliser(inputs), mask

    def distribution(self, numbers: Tensor, mask: Tensor | None = None) -> Distribution:
        """The network's numbers [N, P] and masks [N, num_choices] -> N distributions over actions."""
        return policy_value.distribution(self.net, self.form, numbers, mask)


class PPO:
    """The update rule, around a policy that others may act with in between."""

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
    ) -> None:
        self.config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.policy = Policy(config, observation_space, action_space, self.generator)
        self.reward_scale = RewardScale(config.gamma, config.normal_clip) if config.scale_reward else None
        # 1e-5, not 1e-8: what PPO's authors run; it bounds the step where a gradient is nearly 0.
        self.parameters = FlatParameters(self.policy.parameters())
        self.optimizer = Adam([self.parameters.whole], lr=value_at(config.lr, 0), eps=1e-5, fused=True)
        self.env_steps = 0  # valid rows seen
        self.updates = 0  # optimizer steps taken

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...] that the policy acted out since the last update.

        Raises ValueError when no row is valid, or extras lack `log_prob`.
        """
        for name in ("log_prob", "state") if self.policy.net.state_size else ("log_prob",):
            if name not in batch.extras:
                raise ValueError(f"extras: PPO needs the {name} that `act` gave")
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr, clip, entropy_weight = (
            value_at(schedule, self.env_steps)
            for schedule in (self.config.lr, self.config.clip, self.config.entropy_weight)
        )
        rows, memory = self._rows(batch)
        flat = rows if memory is None else rows.at(memory.valid)
        measured: dict[str, float] = {
            "explained_variance": losses.explained_variance(flat.value, flat.target),
            "value": float(flat.value.mean()),
            "advantage_std": float(flat.advantage.std(correction=0)),
        }
        set_lr(self.optimizer, lr)
        measured |= self._epochs(rows, memory, clip, entropy_weight)
        measured |= {"lr": lr, "clip": clip}
        self.env_steps += len(flat.value)
        if self.policy.normaliser is not None:
            # After the epochs: the log_prob of the next rollout is then made with the statistics it is trained with.
            self.policy.normaliser.moments.update(self.policy.inputs.split(batch.observation[batch.valid])[0])
        return measured

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "reward_scale": self.reward_scale.state_dict() if self.reward_scale is not None else None,
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    @torch.no_grad()
    def _rows(self, batch: Batch) -> tuple[Rows, Memory | None]:
        """Values, advantages and targets of the rollout: its valid rows, or all of them beside what is remembered."""
        reward = batch.reward
        if self.reward_scale is not None:
            reward = self.reward_scale.scale(reward, batch.done, batch.valid)
        inputs, mask = self.policy.split(batch.observation)
        # The others' successor is the next row, or has no value.
        ends = batch.valid & ~batch.terminated & ~continues(batch.done, batch.valid)
        successor, _ = self.policy.split(batch.next_observation[ends])
        memory, state, begin = None, None, None
        if self.policy.net.state_size:
            state, begin = batch.extras["state"][0], begins(batch.done, batch.valid)
            memory = Memory(state, begin, batch.valid)
        value, next_value = policy_value.values(
            self.policy.net, inputs, (ends, successor), state, begin, known=self._known(batch)
        )
        log_prob, weight, advantage, target = self._credit(batch, reward, value, next_value, memory)
        rows = Rows(inputs, mask, batch.action, log_prob, weight, value, advantage, target)
        return (rows if memory is not None else rows.those(batch.valid)), memory

    def _known(self, batch: Batch) -> Tensor | None:
        """The rows' values [T, B], where `act` gave them: its weights were those of now."""
        return batch.extras.get("value")

    def _credit(
        self, batch: Batch, reward: Tensor, value: Tensor, next_value: Tensor, memory: Memory | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Log-probabilities that ratios are to, weights of rows, advantages, value targets: [T, B] each."""
        ends = batch.terminated, batch.truncated, batch.valid
        config = self.config
        advantage = gae(reward, *ends, value, next_value, gamma=config.gamma, lambda_=config.lambda_)
        return batch.extras["log_prob"], None, advantage, advantage + value

    def _epochs(self, rows: Rows, memory: Memory | None, clip: float, entropy_weight: float) -> dict[str, float]:
        limit = self.config.target_kl
        measured: list[Tensor] = []  # four of each minibatch
        log_ratios: list[Tensor] = []
        for _ in range(self.config.epochs):
            for minibatch in self._minibatches(rows, memory):
                numbers, log_ratio = self._step(self._evaluated(*minibatch), clip, entropy_weight)
                measured += numbers
                log_ratios.append(log_ratio)
                if limit is not None and losses.approx_kl(log_ratio) > limit:
                    break
            else:
                continue
            break
        # Only now: each number read, or operation on a few rows, between two steps costs as much as a layer does.
        means = torch.stack(measured).view(-1, 4).mean(0).tolist()
        ratios = torch.cat(log_ratios)
        return dict(zip(("policy_loss", "value_loss", "entropy", "grad_norm"), means, strict=True)) | {
            "approx_kl": float(losses.approx_kl(ratios)),
            "clip_fraction": float(losses.clip_fraction(ratios, clip)),
            "last_kl": float(losses.approx_kl(log_ratios[-1])),
            "minibatches": float(len(log_ratios)),
        }

    def _minibatches(self, rows: Rows, memory: Memory | None) -> Iterator[tuple[Rows, Memory | None]]:
        """The rows of one epoch, shuffled, in pieces of equal size: a small last one would be mostly noise."""
        if memory is None:
            order = torch.randperm(len(rows.value), generator=self.generator)
            for piece in self._pieces(len(order), len(order)):
                yield rows.drawn(order[piece]), None
            return
        # A recurrent policy needs whole time lines: its minibatches are of environments, those with anything to learn.
        envs = memory.valid.any(0).nonzero().squeeze(1)
        order = envs[torch.randperm(len(envs), generator=self.generator)]
        for piece in self._pieces(int(memory.valid.sum()), len(envs)):
            yield rows.at((slice(None), order[piece])), memory.of(order[piece])

    def _pieces(self, count: int, units: int) -> list[slice]:
        """Where to cut `units` that hold `count` rows, so that no piece has more than `minibatch_size` if it can be."""
        number = min(-(-count // self.config.minibatch_size), units)
        cuts = [units * i // number for i in range(number + 1)]
        return [slice(*ends) for ends in pairwise(cuts)]

    def _evaluated(self, rows: Rows, memory: Memory | None) -> tuple[Distribution, Tensor, Rows, tuple[Pass, ...]]:
        """Distributions and values [N] of the policy as it is now, a minibatch's valid rows [N, ...], its passes."""
        passes: tuple[Pass, ...] = ()
        if memory is None:
            numbers, value, passes = self.policy.net.evaluate_apart(rows.inputs)
        else:
            assert isinstance(self.policy.net, policy_value.PolicyValue)
            numbers, value = self.policy.net.evaluate_sequences(rows.inputs, memory.state, memory.begin)
            numbers, value, rows = numbers[memory.valid], value[memory.valid], rows.at(memory.valid)
        return self.policy.distribution(numbers, rows.mask), value, rows, passes

    def _step(
        self, minibatch: tuple[Distribution, Tensor, Rows, tuple[Pass, ...]], clip: float, entropy_weight: float
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """One optimizer step on one minibatch; what was measured before it: four scalars, and log ratios [N]."""
        distribution, value, rows, passes = minibatch
        log_ratio = distribution.log_prob(rows.action) - rows.log_prob
        advantage = losses.normalised(rows.advantage) if self.config.normalise_advantage else rows.advantage
        if rows.weight is not None:
            advantage = advantage * rows.weight
        policy_loss = losses.clipped_surrogate(log_ratio, advantage, clip)
        if self.config.value_clip is None:
            value_loss = losses.value_loss(value, rows.target)
        else:
            value_loss = losses.clipped_value_loss(value, rows.target, rows.value, self.config.value_clip)
        loss = policy_loss + self.config.value_weight * value_loss
        with torch.set_grad_enabled(entropy_weight != 0):
            entropy = distribution.entropy().mean()
        if entropy_weight != 0:
            loss = loss - entropy_weight * entropy
        self.parameters.zero_grad()
        backward(loss, passes)
        norm = self.parameters.clip_(self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        return (policy_loss.detach(), value_loss.detach(), entropy.detach(), norm), log_ratio.detach()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a rollout: its valid ones [N, ...]; or, where the policy is recurrent, all of them [T, B, ...]."""

    inputs: Tensor
    mask: Tensor | None
    action: Tensor
    log_prob: Tensor
    weight: Tensor | None
    value: Tensor
    advantage: Tensor
    target: Tensor

    def those(self, valid: Tensor) -> Rows:
        """Of rows [T, B, ...] the valid ones [N, ...]: without a copy where all of them are."""
        return self._each(lambda rows: rows.flatten(0, 1)) if valid.all() else self.at(valid)

    def drawn(self, index: Tensor) -> Rows:
        """Rows [N, ...] of those numbers, which is faster than `at` for images."""
        return self._each(lambda rows: rows.index_select(0, index))

    def at(self, index: Any) -> Rows:
        """Those at a tensor's index, or at a tuple of them."""
        return self._each(lambda rows: rows[index])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(
            change(self.inputs),
            None if self.mask is None else change(self.mask),
            change(self.action),
            change(self.log_prob),
            None if self.weight is None else change(self.weight),
            change(self.value),
            change(self.advantage),
            change(self.target),
        )


@dataclass(frozen=True, slots=True)
class Memory:
    """What a recurrent policy's rows [T, B] hang together by."""

    state: Tensor  # [B, S], before the first row
    begin: Tensor  # [T, B]: where it was set to zeros
    valid: Tensor  # [T, B]

    def of(self, envs: Tensor) -> Memory:
        return Memory(self.state[envs], self.begin[:, envs], self.valid[:, envs])


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> PPO:
    """A PPO for one environment's spaces; `seed` decides its weights and its shuffles."""
    return PPO(config, observation_space, action_space, seed)
