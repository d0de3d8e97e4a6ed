"""IMPALA: an actor-critic that corrects for old policies by V-trace (Espeholt et al. 2018, arXiv:1802.01561).

The batches may come from policies that lag behind, and from a memory of fragments: what each row's policy was is in
its log_prob.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses, policy_value
from longrein.learn.actor_critic import ACTION_SPACES, ActorCriticPolicy
from longrein.learn.batch import Batch
from longrein.learn.fragments import Fragments, replays, scaled, without_invalid
from longrein.learn.natural import Natural, NaturalGradient, networks, section
from longrein.learn.optimizers import FlatParameters, make_optimizer, set_lr
from longrein.learn.replay import Memory
from longrein.learn.returns import vtrace
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.sequence_replay import SequenceReplay
from longrein.learn.torsos import Net

__all__ = ["ACTION_SPACES", "IMPALA", "Config", "Policy", "build"]

MEASURED = ("policy_loss", "value_loss", "entropy", "grad_norm", "rho", "rho_clipped", "approx_kl", "value", "lag")
TOLERATES_LAG = True  # corrected by V-trace


@dataclass(frozen=True)
class Config:
    """IMPALA's settings. A schedule is a function of env steps over all environments together."""

    rollout_steps: int = 20
    """Vector steps between updates, and the length of a fragment."""
    gamma: float = 0.99
    """Discount per env step."""
    lambda_: float = 1.0
    """V-trace's weight of longer sums, from 0 (one-step TD error) to 1 (whole return)."""
    rho_clip: float = 1.0
    """Most that a probability ratio may weigh a TD error with: decides which policy the value belongs to."""
    c_clip: float = 1.0
    """Most that a ratio may weigh what comes later with, at most rho_clip: decides how fast the value is learnt."""
    policy_clip: float = 1.0
    """Most that a ratio may weigh the policy's gradient with."""
    epochs: int = 1
    """Updates from each fresh rollout; from the second on it is off-policy, and corrected. 0: from the memory alone."""
    lr: Schedule = 6e-4
    """Learning rate; the paper's falls to 0."""
    optimizer: str = "rmsprop_tf"
    """rmsprop_tf (epsilon within the root), adam, or another of torch.optim."""
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's own keywords; those left out are as it has them."""
    entropy_weight: Schedule = 0.01
    """Weight of the entropy bonus, in loss per nat."""
    value_weight: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 40.0
    """Global norm to which gradients are clipped."""
    reward_scale: float = 1.0
    """What rewards are multiplied with before they are learnt from."""
    reward_clip: float | None = None
    """Most that a scaled reward may count, either way; the paper has 1 for Atari. None leaves them as they are."""
    shared: bool = False
    """Whether policy and value share one torso, as in the paper, rather than having one each."""
    replay_ratio: float = 0.0
    """Replayed env steps for each fresh one, on average; 0 keeps no memory."""
    fresh_fraction: float = 0.0
    """Share of a replayed batch's columns that are out of the fresh rollout."""
    priority: str = "error"
    """What a prioritized memory goes by: error (of the value) or differential (slope of the loss by log pi and V)."""
    natural: NaturalGradient | None = None
    """K-FAC in place of `lr`, `optimizer`, `optimizer_settings` and `max_grad_norm`, with its settings; None: not."""
    net: Net = Net()
    """From observations to features."""
    memory: Memory = Memory(capacity=50_000, batch_size=8, min_size=1_000)
    """Of fragments; batch_size counts fragments."""

    def __post_init__(self) -> None:
        refuse_negative("impala", self)
        if self.rollout_steps < 1:
            raise SpecError("impala.rollout_steps", f"must be at least 1, got {self.rollout_steps}")
        if self.epochs < 0 or (self.epochs == 0 and self.replay_ratio == 0):
            raise SpecError("impala.epochs", f"must be at least 1, got {self.epochs}",
                            hint="0 goes with a replay_ratio above 0")  # fmt: skip
        for name in ("gamma", "lambda_"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"impala.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("rho_clip", "c_clip", "policy_clip"):
            if getattr(self, name) <= 0:
                raise SpecError(f"impala.{name}", f"must be positive, got {getattr(self, name)}")
        if self.c_clip > self.rho_clip:
            raise SpecError(
                "impala.c_clip", f"must be at most rho_clip, {self.rho_clip}, got {self.c_clip}",
                hint="the operator is a contraction only then",
            )  # fmt: skip
        if self.replay_ratio < 0:
            raise SpecError("impala.replay_ratio", f"must not be negative, got {self.replay_ratio}")
        if not 0 <= self.fresh_fraction < 1:
            raise SpecError("impala.fresh_fraction", f"must lie in [0, 1), got {self.fresh_fraction}")
        if self.reward_clip is not None and self.reward_clip <= 0:
            raise SpecError(
                "impala.reward_clip", f"must be positive, got {self.reward_clip}", hint="none leaves it out"
            )
        if self.priority not in ("error", "differential"):
            raise SpecError("impala.priority", f"{self.priority!r} is none", hint="error or differential")
        object.__setattr__(self, "natural", section(self.natural, self.net, "impala"))


class Policy(ActorCriticPolicy):
    """A policy that says how likely its actions were, and how many updates it has seen."""

    version: Tensor

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            observation_space, action_space, config.net, shared=config.shared, recurrent=True, generator=generator
        )
        # A buffer: it travels with the weights, so that a copy far away says how old they are.
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def act(
        self,
        observation: NDArray[np.generic],
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...], state [B, S] of a recurrent policy (zeros if left out) -> actions [B, ...].

        Extras: log_prob [B] of the policy that acted and version [B], updates that it had seen; where it is recurrent
        also `state`, as it was given, and `next_state`.
        """
        if state is None:
            state = self.initial_state(len(observation))
        seen, mask = self.inputs.split(torch.from_numpy(observation))
        numbers, next_state = self.net.act(seen, None if state is None else torch.from_numpy(state))
        distribution = policy_value.distribution(self.net, self.form, numbers, mask)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        log_prob = distribution.log_prob(action)
        extras: dict[str, NDArray[np.generic]] = {
            "log_prob": log_prob.numpy(), "version": self.version.expand(len(log_prob)).numpy()
        }  # fmt: skip
        if state is not None and next_state is not None:
            extras |= {"state": state, "next_state": next_state.numpy()}
        return action.numpy(), extras


class IMPALA:
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
        self._flat = FlatParameters(self.policy.parameters())
        lr = value_at(config.lr, 0)
        self.optimizer = make_optimizer(config.optimizer, [self._flat.whole], lr, **config.optimizer_settings)
        self.natural: Natural | None = None  # in the optimizer's place
        self._value_weight = config.value_weight
        if config.natural is not None:
            self.natural = Natural(config.natural, networks(self.policy), self.generator)
            self._value_weight = self.natural.value_weight(config.value_weight)
        self.replay: SequenceReplay | None = None
        if config.replay_ratio > 0:
            self.replay = SequenceReplay(config.memory, config.rollout_steps, first_only=("state",))
        self.env_steps = 0  # valid rows seen, fresh ones
        self.updates = 0  # optimizer steps taken

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from one rollout [T, B, ...], and then from the memory, where there is one.

        Raises ValueError when no row is valid, or extras lack what `act` gave.
        """
        for name in ("log_prob", "version"):
            if name not in batch.extras:
                raise ValueError(f"extras: IMPALA needs the {name} that `act` gave")
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        lr, entropy_weight = (value_at(s, self.env_steps) for s in (self.config.lr, self.config.entropy_weight))
        set_lr(self.optimizer, lr)
        if self.natural is not None:
            self.natural.schedule(self.env_steps)
            lr = self.natural.lr
        fresh = without_invalid(batch)
        measured = [self._step(Fragments(fresh), entropy_weight) for _ in range(self.config.epochs)]
        replayed = []
        if self.replay is not None:
            self.replay.add(fresh, self.generator)
            for fragments in replays(
                self.replay, fresh, ratio=self.config.replay_ratio, fresh_fraction=self.config.fresh_fraction,
                generator=self.generator,
            ):  # fmt: skip
                replayed.append(self._step(fragments, entropy_weight))
        self.env_steps += int(batch.valid.sum())
        self.policy.version += 1
        numbers = losses.mean_measured(MEASURED, measured)
        again = losses.mean_measured(MEASURED, replayed)
        numbers |= {f"replay_{name}": again[name] for name in ("value_loss", "rho", "rho_clipped", "lag")}
        if self.natural is not None:
            numbers |= self.natural.measured()
        return numbers | {"replays": float(len(replayed)), "lr": lr, "entropy_weight": entropy_weight}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "natural": None if self.natural is None else self.natural.state_dict(),
            "generator": self.generator.get_state(),
            "replay": None if self.replay is None else self.replay.state_dict(),
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
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])
        self.env_steps = state["env_steps"]
        self.updates = state["updates"]

    def _step(self, fragments: Fragments, entropy_weight: float) -> Tensor:
        """One optimizer step; what was measured before it."""
        batch, config, valid = fragments.batch, self.config, fragments.batch.valid
        share = fragments.share[valid]
        if self.natural is not None:
            # With actions of its own: those of the rows are draws of an older policy.
            with self.natural.recording():
                self.natural.observe(*self.policy.evaluate(batch.observation[valid]))
        distribution, value, now, later = self.policy.rollout(batch)
        log_prob = distribution.log_prob(batch.action[valid])  # [N] of the valid rows, as is all that has a gradient
        with torch.no_grad():
            log_ratio = torch.zeros_like(batch.reward)
            log_ratio[valid] = log_prob - batch.extras["log_prob"][valid]
            target, action_value = vtrace(
                scaled(batch.reward, config.reward_scale, config.reward_clip),
                batch.terminated,
                batch.truncated,
                valid,
                now,
                later,
                log_ratio,
                gamma=config.gamma,
                lambda_=config.lambda_,
                rho_clip=config.rho_clip,
                c_clip=config.c_clip,
            )
            advantage = log_ratio.exp().clamp(max=config.policy_clip) * (action_value - now)
        policy_loss = -(share * advantage[valid] * log_prob).sum()
        value_loss = 0.5 * (share * (value - target[valid]).square()).sum()
        entropy = (share * distribution.entropy()).sum()
        loss = policy_loss + self._value_weight * value_loss - entropy_weight * entropy
        if self.natural is not None:
            norm = self.natural.step(loss)
        else:
            self._flat.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
            norm = self._flat.clip_(config.max_grad_norm)
            self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            if self.replay is not None:
                error = (now - target).abs()
                steep = advantage.abs() + config.value_weight * error
                fragments.remember(self.replay, error if config.priority == "error" else steep)
            log_rho = log_ratio[valid]
            rho = log_rho.exp()
            lag = (self.policy.version - batch.extras["version"][valid]).float()
            # A margin, or rounding would make half of an on-policy batch exceed a clip of 1.
            columns = (rho, (rho > config.rho_clip + 1e-3).float(), torch.expm1(log_rho) - log_rho, value, lag)
            means = [column.mean() for column in columns]
        return torch.stack([policy_loss.detach(), value_loss.detach(), entropy.detach(), norm, *means])


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> IMPALA:
    """An IMPALA for one environment's spaces; `seed` decides its weights and its draws from the memory."""
    return IMPALA(config, observation_space, action_space, seed)
