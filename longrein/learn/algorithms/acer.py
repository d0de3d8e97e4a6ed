"""ACER: an actor-critic with experience replay (Wang et al. 2017, arXiv:1611.01224), for choices and for Boxes.

Retrace for the critic, truncated importance weights with bias correction for the policy, and a trust region around an
average of past policies. The two policies are in acer_policies; here is the rest of the update rule.
Workers share the weights, the average policy and the optimizer's statistics; each has a memory of its own. A step, of
fresh rows or of replayed ones, goes to the shared weights without a lock, and the next begins with a new copy of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.algorithms.acer_policies import Choices, Continuous, Correction
from longrein.learn.batch import Batch
from longrein.learn.fragments import Fragments, replays, scaled, without_invalid
from longrein.learn.natural import Natural, NaturalGradient, section
from longrein.learn.optimizers import FlatParameters, look_at, set_lr
from longrein.learn.replay import Memory
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.sequence_replay import SequenceReplay
from longrein.learn.shared_weights import (
    OPTIMIZERS,
    Shared,
    SharingWorker,
    begin,
    check_statistics,
    optimizer_of,
    statistics_of,
    use_statistics,
)
from longrein.learn.torsos import Net

ACTION_SPACES: tuple[type[gymnasium.Space[Any]], ...] = (Discrete, Box)

MEASURED = ("q_loss", "entropy", "grad_norm", "rho", "truncated", "bent", "kl", "value", "lag")
TOLERATES_LAG = True  # corrected by Retrace
SHARES_WEIGHTS = True


@dataclass(frozen=True)
class Config:
    """ACER's settings. A schedule is a function of env steps over all environments together."""

    rollout_steps: int = 20
    """Vector steps between updates, and the length of a fragment; the paper has 50 for continuous actions."""
    gamma: float = 0.99
    """Discount per env step."""
    lambda_: float = 1.0
    """Retrace's weight of longer sums, from 0 (one-step targets) to 1 (whole returns, as in the paper)."""
    truncation: float | None = None
    """c, the most that a ratio may weigh the policy's gradient with; None is the paper's 10, or 5 for a Box."""
    epochs: int = 1
    """Updates from each fresh rollout: 1 is the paper's; 0 learns from the memory alone."""
    trust_region: float | None = 1.0
    """delta, nats by which a step along the direction may raise KL(average || pi) in a state; None for no region."""
    average_decay: float = 0.99
    """Share of the average policy that stays at each update."""
    kl_weight: float = 0.0
    """Weight of KL(average || pi) as a penalty, in loss per nat; drlbox has it in place of the region."""
    lr: Schedule = 7e-4
    """Learning rate."""
    optimizer: str = "rmsprop_tf"
    """rmsprop_tf (epsilon within the root), adam, or another of torch.optim."""
    optimizer_settings: Mapping[str, Any] = field(default_factory=dict)
    """The optimizer's own keywords; those left out are as it has them."""
    entropy_weight: Schedule = 0.01
    """Weight of the entropy bonus, in loss per nat."""
    q_weight: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 10.0
    """Global norm to which gradients are clipped."""
    reward_scale: float = 1.0
    """What rewards are multiplied with before they are learnt from."""
    reward_clip: float | None = None
    """Most that a scaled reward may count, either way; None leaves them as they are."""
    shared: bool = False
    """Whether policy and critic share one torso, as in the paper, rather than having one each."""
    replay_ratio: float = 4.0
    """Replayed env steps for each fresh one, on average; 0 keeps no memory."""
    fresh_fraction: float = 0.0
    """Share of a replayed batch's columns that are out of the fresh rollout."""
    priority: str = "error"
    """What a prioritized memory goes by: error (of Q) or differential (error and the policy's direction)."""
    sigma: float = 0.3
    """Deviation of a Box's actions at the start, in halves of the Box's width."""
    learn_sigma: bool = False
    """Whether the deviation is learnt, rather than fixed as in the paper."""
    samples: int = 5
    """Actions that the critic of a Box averages advantages over."""
    natural: NaturalGradient | None = None
    """K-FAC in place of `lr`, `optimizer`, `optimizer_settings` and `max_grad_norm`, with its settings; None: not."""
    net: Net = Net()
    """From observations to features."""
    memory: Memory = Memory(capacity=50_000, batch_size=8, min_size=10_000)
    """Of fragments; batch_size counts fragments."""

    def __post_init__(self) -> None:
        refuse_negative("acer", self)
        for name in ("rollout_steps", "samples"):
            if getattr(self, name) < 1:
                raise SpecError(f"acer.{name}", f"must be at least 1, got {getattr(self, name)}")
        if self.epochs < 0 or (self.epochs == 0 and self.replay_ratio == 0):
            raise SpecError("acer.epochs", f"must be at least 1, got {self.epochs}",
                            hint="0 goes with a replay_ratio above 0")  # fmt: skip
        for name in ("gamma", "lambda_", "average_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"acer.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("replay_ratio", "kl_weight", "q_weight", "trust_region"):
            if (getattr(self, name) or 0) < 0:
                raise SpecError(f"acer.{name}", f"must not be negative, got {getattr(self, name)}")
        for name in ("truncation", "sigma", "max_grad_norm", "reward_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise SpecError(f"acer.{name}", f"must be positive, got {value}")
        if not 0 <= self.fresh_fraction < 1:
            raise SpecError("acer.fresh_fraction", f"must lie in [0, 1), got {self.fresh_fraction}")
        if self.priority not in ("error", "differential"):
            raise SpecError("acer.priority", f"{self.priority!r} is none", hint="error or differential")
        object.__setattr__(self, "natural", section(self.natural, self.net, "acer"))


class ACER(SharingWorker):
    """The update rule, around a policy that others may act with in between."""

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        seed: int,
        shared: Shared | None = None,
        index: int = 0,
    ) -> None:
        """shared: of the workers that are there already; None begins anew, with weights drawn from `seed`.

        index: this worker's place among them.
        """
        self.config: Config = config
        self.generator = torch.Generator().manual_seed(seed)
        self.policy: Any = _policy(config, observation_space, action_space, self.generator)
        self.average = copy.deepcopy(self.policy).requires_grad_(False)
        self.truncation = config.truncation or (10.0 if isinstance(action_space, Discrete) else 5.0)
        local = FlatParameters(self.policy.parameters())
        self._averaged: list[Tensor] = list(self.average.parameters())
        self._parameters: list[Tensor] = list(self.policy.parameters())
        if shared is None:
            # Others of torch.optim are for one worker: their statistics stay with it.
            able = config.optimizer in OPTIMIZERS
            statistics = statistics_of(partial(optimizer_of, config), local.whole) if able else {}
            shared = begin(local.whole, statistics, {"average": local.whole.detach()})
        weights = self._share((observation_space, action_space), local, shared, index)
        look_at(self._averaged, shared.more["average"])
        self.optimizer = optimizer_of(config, weights)
        if shared.statistics:
            use_statistics(self.optimizer, weights, shared.statistics)
        self.natural: Natural | None = None  # in the optimizer's place
        self._q_weight = config.q_weight
        if config.natural is not None:
            self.natural = Natural(config.natural, self.policy.networks(), self.generator)
            self._q_weight = self.natural.value_weight(config.q_weight)
        self.replay = SequenceReplay(config.memory, config.rollout_steps) if config.replay_ratio > 0 else None
        self.refresh()

    def worker(self, seed: int | None = None, place: int | None = None) -> ACER:
        """As SharingWorker.worker. Raises SpecError for an optimizer whose statistics cannot be shared."""
        check_statistics("acer", self.config.optimizer, "shared")
        return super().worker(seed, place)

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn once from one rollout [T, B, ...], and then from the memory.

        Raises ValueError when no row is valid, or extras lack what `act` gave.
        """
        if not batch.extras.keys() >= ({"log_probs"} if isinstance(self.policy, Choices) else {"mean", "log_std"}):
            raise ValueError("extras: ACER needs the whole distribution that `act` gave")
        if not batch.valid.any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        config = self.config
        lr, entropy_weight = (value_at(s, self.env_steps) for s in (config.lr, config.entropy_weight))
        set_lr(self.optimizer, lr)
        if self.natural is not None:
            self.natural.schedule(self.env_steps)
            lr = self.natural.lr
        delta = math.inf if config.trust_region is None else config.trust_region
        correction = Correction(config.gamma, config.lambda_, self.truncation, delta, config.kl_weight, entropy_weight)
        self._count(int(batch.valid.sum()))
        fresh = without_invalid(batch)
        measured = [self._step(Fragments(fresh), correction) for _ in range(config.epochs)]
        replayed = []
        if self.replay is not None:
            self.replay.add(fresh, self.generator)
            for fragments in replays(
                self.replay, fresh, ratio=config.replay_ratio, fresh_fraction=config.fresh_fraction,
                generator=self.generator,
            ):  # fmt: skip
                replayed.append(self._step(fragments, correction))
        self.policy.version += 1
        numbers = losses.mean_measured(MEASURED, measured)
        again = losses.mean_measured(MEASURED, replayed)
        numbers |= {f"replay_{name}": again[name] for name in ("q_loss", "rho", "truncated", "bent", "kl", "lag")}
        if self.natural is not None:
            numbers |= self.natural.measured()
        return numbers | {"replays": float(len(replayed)), "lr": lr, "entropy_weight": entropy_weight}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self._named(self.policy, self.shared.weights),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self._alone(),
            "env_steps": self.env_steps,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.average.load_state_dict(state["average"])
        self._take_optimizer(state["optimizer"])
        self._begin_from(state["env_steps"], state["updates"])
        self._take_alone(state)

    def own_state(self) -> dict[str, Any]:
        """What this worker replays and draws, and how many updates of its own its policy has seen."""
        return self._alone() | {"version": self.policy.version.clone()}

    def load_own_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what a worker alone had."""
        self.policy.version.copy_(state["version"])
        self._take_alone(state)

    def _alone(self) -> dict[str, Any]:
        return {
            "natural": None if self.natural is None else self.natural.state_dict(),
            "generator": self.generator.get_state(),
            "replay": None if self.replay is None else self.replay.state_dict(),
        }

    def _take_alone(self, state: Mapping[str, Any]) -> None:
        if self.natural is not None:
            self.natural.load_state_dict(state["natural"])
        self.generator.set_state(state["generator"])
        if self.replay is not None:
            self.replay.load_state_dict(state["replay"])

    def _take_optimizer(self, state: dict[str, Any]) -> None:
        """Go on with an optimizer's state, in the tensors that others hold too."""
        (weights,) = self.optimizer.param_groups[0]["params"]
        self.optimizer.load_state_dict(state)
        for name, tensor in self.shared.statistics.items():
            if name in self.optimizer.state[weights]:  # saved before its first step, an optimizer may have none
                tensor.copy_(self.optimizer.state[weights][name])
        if self.shared.statistics:
            use_statistics(self.optimizer, weights, self.shared.statistics)

    def _step(self, fragments: Fragments, correction: Correction) -> Tensor:
        """One optimizer step, and one of the average policy; what was measured before it."""
        batch, share, config = fragments.batch, fragments.share, self.config
        reward = scaled(batch.reward, config.reward_scale, config.reward_clip)
        if self.natural is not None:
            with self.natural.recording():
                rows = batch.observation[batch.valid], batch.action[batch.valid]
                self.natural.observe(*self.policy.model(*rows, self.generator))
        terms = self.policy.terms(batch, reward, self.average, correction, self.generator)
        loss = (share * (terms.policy + self._q_weight * terms.critic)).sum()
        if self.natural is not None:
            norm = self._natural_step(loss)
        else:
            self._local.zero_grad()
            loss.backward()
            norm = self._local.clip_(config.max_grad_norm)
            self.optimizer.step()
        self._wrote()
        self.refresh()
        with torch.no_grad():
            torch._foreach_lerp_(self._averaged, self._parameters, 1 - config.average_decay)
            if self.replay is not None:
                steep = terms.steepness + config.q_weight * terms.error
                fragments.remember(self.replay, terms.error if config.priority == "error" else steep)
            rho = terms.log_ratio.exp()
            lag = self.policy.version - batch.extras["version"]
            plain = batch.valid / batch.valid.sum()
            columns = torch.stack([
                0.5 * terms.error.square(), terms.entropy, norm.expand_as(rho), rho, rho > correction.truncation,
                terms.bent, terms.kl, terms.value, lag,
            ])  # fmt: skip
            return (plain * columns).sum((1, 2))

    def _natural_step(self, loss: Tensor) -> Tensor:
        """The local weights take the step; the shared ones move as far."""
        assert self.natural is not None
        before = self._local.whole.detach().clone()
        norm = self.natural.step(loss)
        if int(self.shared.workers) == 1:
            self.shared.weights.copy_(self._local.whole.detach())  # before + (after - before) is not after, to the bit
        else:
            self.shared.weights.add_(self._local.whole.detach() - before)
        return norm


def _policy(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    generator: torch.Generator,
) -> Choices | Continuous:
    if isinstance(action_space, Discrete):
        return Choices(observation_space, action_space, config.net, shared=config.shared, generator=generator)
    if isinstance(action_space, Box):
        return Continuous(
            observation_space, action_space, config.net, sigma=config.sigma, learn_sigma=config.learn_sigma,
            samples=config.samples, shared=config.shared, generator=generator,
        )  # fmt: skip
    raise SpecError(
        "env.action_space", f"ACER cannot act in {action_space}",
        hint="Discrete or a float Box; impala, ppo and a2c act in MultiDiscrete and MultiBinary too",
    )  # fmt: skip


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> ACER:
    """An ACER for one environment's spaces; `seed` decides its weights and its draws."""
    return ACER(config, observation_space, action_space, seed)
