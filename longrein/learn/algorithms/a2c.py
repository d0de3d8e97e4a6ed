"""A2C: synchronous advantage actor-critic (Mnih et al. 2016, arXiv:1602.01783, with all workers in step).

docs/algorithms/a2c.md lists where we differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.actor_critic import ACTION_SPACES, ActorCriticPolicy
from longrein.learn.algorithms import config_from
from longrein.learn.batch import Batch
from longrein.learn.chain import Chain, Pass, backward
from longrein.learn.episodes import EpisodeStore
from longrein.learn.imitation import Imitator, SelfImitation
from longrein.learn.natural import Natural, NaturalGradient, networks, section
from longrein.learn.normalise import RewardScale
from longrein.learn.optimizers import FlatParameters, make_optimizer, set_lr
from longrein.learn.policy_value import quick_chains
from longrein.learn.returns import gae, n_step_returns, quick_gae
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.torsos import Net

__all__ = ["ACTION_SPACES", "A2C", "Config", "Policy", "build"]

Policy = ActorCriticPolicy


@dataclass(frozen=True)
class Config:
    """A2C's settings. A schedule is a function of env steps over all environments together."""

    rollout_steps: int = 5
    """Vector steps of one batch; without `episodic`, also those between updates and the n of n-step returns."""
    episodic: bool = False
    """Whether to learn from whole episodes only, rather than from every batch."""
    episodes_per_update: int = 8
    """Whole episodes, at least, of one update; only with `episodic`."""
    max_episode_steps: int = 10_000
    """Env steps after which an episode that does not end is cut, and bootstrapped; only with `episodic`."""
    gamma: float = 0.99
    """Discount per env step."""
    advantage: str = "n_step"
    """How advantages are estimated: n_step (to the end of the rollout or of the episode) or gae."""
    lambda_: float = 0.95
    """GAE's weight of longer sums, from 0 (one-step TD error) to 1 (the same as n_step); only with gae."""
    lr: Schedule = 7e-4
    """Learning rate; the paper's falls to 0 at the end of training."""
    optimizer: str = "rmsprop_tf"
    """rmsprop_tf (epsilon inside the root), adam, sgd or any other of torch.optim."""
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's own keywords; those left out are as it has them."""
    entropy_weight: Schedule = 0.01
    """Weight of the entropy bonus, in loss per nat."""
    value_weight: float = 1.0
    """Weight of half the squared value error; 1 is the usual coefficient 0.5 of the whole square."""
    max_grad_norm: float = 0.5
    """Global norm to which gradients are clipped."""
    normalise_advantage: bool = False
    """Whether the advantages of each update are brought to mean 0 and deviation 1."""
    scale_reward: bool = False
    """Whether rewards are divided by the running deviation of the discounted return."""
    normal_clip: float = 10.0
    """Deviations to which scaled rewards are clipped."""
    shared: bool = False
    """Whether policy and value share one torso, rather than having one each."""
    imitation: SelfImitation | None = None
    """Self-imitation beside it, with its own settings; None for none."""
    natural: NaturalGradient | None = None
    """K-FAC in place of `lr`, `optimizer`, `optimizer_settings` and `max_grad_norm`, with its settings; None: not."""
    net: Net = Net()
    """What stands between observations and heads."""

    def __post_init__(self) -> None:
        refuse_negative("a2c", self)
        for name in ("rollout_steps", "episodes_per_update", "max_episode_steps"):
            if getattr(self, name) < 1:
                raise SpecError(f"a2c.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "lambda_"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"a2c.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("value_weight", "max_grad_norm"):
            if getattr(self, name) < 0:
                raise SpecError(f"a2c.{name}", f"must not be negative, got {getattr(self, name)}")
        if self.advantage not in ("n_step", "gae"):
            raise SpecError("a2c.advantage", f"{self.advantage!r} is neither n_step nor gae")
        if isinstance(self.imitation, Mapping):  # from a spec file, or a checkpoint
            object.__setattr__(self, "imitation", config_from(SelfImitation, self.imitation))
        object.__setattr__(self, "natural", section(self.natural, self.net, "a2c"))


MEASURED = ("policy_loss", "value_loss", "entropy", "grad_norm", "value", "advantage_std")


class A2C:
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
        self.policy = Policy(
            observation_space, action_space, config.net,
            shared=config.shared, recurrent=config.imitation is None, generator=self.generator,
        )  # fmt: skip
        self._flat = FlatParameters(self.policy.parameters())
        self.optimizer = make_optimizer(
            config.optimizer, [self._flat.whole], value_at(config.lr, 0), **config.optimizer_settings
        )
        self.natural: Natural | None = None  # in the optimizer's place
        self._value_weight = config.value_weight
        if config.natural is not None:
            self.natural = Natural(config.natural, networks(self.policy), self.generator)
            self._value_weight = self.natural.value_weight(config.value_weight)
        self.reward_scale = RewardScale(config.gamma, config.normal_clip) if config.scale_reward else None
        self.episodes = EpisodeStore(config.max_episode_steps) if config.episodic else None
        self.imitator = Imitator(config.imitation, gamma=config.gamma) if config.imitation is not None else None
        self.env_steps = 0  # valid rows seen
        self.updates = 0  # optimizer steps taken, but for those of imitation

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...] that the policy acted out since the last update.

        With `episodic` it is kept until enough episodes are whole, and the metrics are NaN until then.
        Raises ValueError when no row is valid.
        """
        rows = int(batch.valid.sum())
        if rows == 0:
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr, entropy_weight = (value_at(s, self.env_steps) for s in (self.config.lr, self.config.entropy_weight))
        set_lr(self.optimizer, lr)
        if self.natural is not None:
            self.natural.schedule(self.env_steps)
            lr = self.natural.lr
        self.env_steps += rows
        if self.reward_scale is not None:
            batch = replace(batch, reward=self.reward_scale.scale(batch.reward, batch.done, batch.valid))
        measured = self._on_policy(batch, entropy_weight) | {"lr": lr, "entropy_weight": entropy_weight}
        if self.imitator is not None:
            self.imitator.add(batch, self.policy.value)
            measured |= self.imitator.learn(self._judge, self._step, self.generator)
        if self.natural is not None:
            measured |= self.natural.measured()
        return measured

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "natural": None if self.natural is None else self.natural.state_dict(),
            "generator": self.generator.get_state(),
            "reward_scale": None if self.reward_scale is None else self.reward_scale.state_dict(),
            "episodes": None if self.episodes is None else self.episodes.state_dict(),
            "imitation": None if self.imitator is None else self.imitator.state_dict(),
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.natural is not None:
            self.natural.load_state_dict(state["natural"])
        self.generator.set_state(state["generator"])
        if self.reward_scale is not None:
            self.reward_scale.load_state_dict(state["reward_scale"])
        if self.episodes is not None and state["episodes"] is not None:
            self.episodes.load_state_dict(state["episodes"])
        if self.imitator is not None and state["imitation"] is not None:
            self.imitator.load_state_dict(state["imitation"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    def _on_policy(self, batch: Batch, entropy_weight: float) -> dict[str, float]:
        if self.episodes is not None:
            self.episodes.add(batch)
            if self.episodes.ended < self.config.episodes_per_update:
                return dict.fromkeys(MEASURED, float("nan"))
            batch = self.episodes.take()
        return self._learn(batch, entropy_weight)

    def _learn(self, batch: Batch, entropy_weight: float) -> dict[str, float]:
        """One optimizer step on the valid rows of [T, B, ...]; what was measured before it."""
        if self.natural is None and not self.policy.inputs.choices:  # no mask
            chains = quick_chains(self.policy.net, self.policy.form, batch.reward.numel())
            if chains is not None:
                return dict(zip(MEASURED, self._by_numpy(batch, entropy_weight, *chains), strict=True))
        valid = batch.valid
        self._observe(batch.observation[valid])
        apart: list[Pass] | None = [] if self.natural is None else None  # K-FAC looks at what autograd does
        distribution, value, *values = self.policy.rollout(batch, apart)
        advantage, target = (of_rows[valid] for of_rows in self._advantage(batch, *values))
        wanted = losses.normalised(advantage) if self.config.normalise_advantage else advantage
        policy_loss = losses.policy_gradient(distribution.log_prob(batch.action[valid]), wanted)
        value_loss = losses.value_loss(value, target)
        entropy = distribution.entropy().mean()
        norm = self._step(policy_loss + self._value_weight * value_loss - entropy_weight * entropy, apart or ())
        self.updates += 1
        with torch.no_grad():
            numbers = (policy_loss, value_loss, entropy, norm, value.mean(), advantage.std(correction=0))
            return dict(zip(MEASURED, torch.stack(numbers).tolist(), strict=True))

    def _advantage(self, batch: Batch, value: Tensor, next_value: Tensor) -> tuple[Tensor, Tensor]:
        """From V(s_t) and V(s'_t): advantages and value targets, all [T, B]."""
        rows = (batch.reward, batch.terminated, batch.truncated, batch.valid)
        if self.config.advantage == "n_step":
            target = n_step_returns(*rows, next_value, gamma=self.config.gamma)
            return target - value, target
        advantage = gae(*rows, value, next_value, gamma=self.config.gamma, lambda_=self.config.lambda_)
        return advantage, advantage + value

    def _by_numpy(self, batch: Batch, entropy_weight: float, actor: Chain, critic: Chain) -> Sequence[float]:
        """What `_learn` does, of few rows and small layers: the same but for rounding, in a third of the time."""
        valid, terminated, reward = batch.valid.numpy(), batch.terminated.numpy(), batch.reward.numpy()
        goes_on = np.zeros_like(valid)
        goes_on[:-1] = valid[:-1] & valid[1:] & ~(terminated | batch.truncated.numpy())[:-1]
        observation, count = batch.observation.numpy()[valid], int(np.count_nonzero(valid))
        judged, chosen = critic.there_of_few(observation), actor.there_of_few(observation)
        said = judged.output[:, 0]
        value, next_value = np.zeros_like(reward), np.zeros_like(reward)
        value[valid] = said
        next_value[:-1] = value[1:]
        asked = valid & ~terminated & ~goes_on
        if asked.any():  # the others' successor is the next row
            next_value[asked] = critic.of_few(batch.next_observation.numpy()[asked])[:, 0]
        lambda_ = self.config.lambda_ if self.config.advantage == "gae" else 1.0  # what n_step is
        of_all = quick_gae(
            reward, terminated, goes_on, valid, value, next_value, gamma=self.config.gamma, lambda_=lambda_
        )
        advantage: NDArray[np.float32] = of_all[valid]
        deviation = float(advantage.std())
        wanted = advantage
        if self.config.normalise_advantage and count > 1:
            wanted = (advantage - advantage.mean()) / (advantage.std(ddof=1) + 1e-8)
        policy_loss, entropy, slope = losses.quick_policy_gradient(
            chosen.output, batch.action.numpy()[valid], wanted, entropy_weight
        )
        chosen.back(slope)
        judged.back((-self._value_weight / count * advantage)[:, None])  # the target is advantage + value
        norm = self._flat.quick_clip_(self.config.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        value_loss = 0.5 * float(advantage.dot(advantage)) / count
        return policy_loss, value_loss, entropy, norm, float(said.sum()) / count, deviation

    def _judge(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """log pi(a|s) [N] and V(s) [N], with gradients: what imitation asks for."""
        self._observe(observation)
        distribution, value = self.policy.evaluate(observation)
        return distribution.log_prob(action), value

    def _observe(self, observation: Tensor) -> None:
        """Let K-FAC, where it is on, take in statistics of rows [N, ...] that a loss will be made of."""
        if self.natural is not None:
            with self.natural.recording():
                self.natural.observe(*self.policy.evaluate(observation))

    def _step(self, loss: Tensor, passes: Sequence[Pass] = ()) -> Tensor:
        """One optimizer step along the gradient of a loss, and of passes under it; its norm before it was clipped."""
        if self.natural is not None:
            return self.natural.step(loss)
        self._flat.zero_grad()
        backward(loss, passes)
        norm = self._flat.clip_(self.config.max_grad_norm)
        self.optimizer.step()
        return norm


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> A2C:
    """An A2C for one environment's spaces; `seed` decides its weights and what imitation draws."""
    return A2C(config, observation_space, action_space, seed)
