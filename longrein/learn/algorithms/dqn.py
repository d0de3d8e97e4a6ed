"""DQN and what was added to it, each behind a switch of its own (Mnih et al. 2015, Nature 518).

Double, dueling, n-step and prioritized replay (in `memory`), noisy layers, C51 and QR; all but QR together are
Rainbow (Hessel et al. 2018, arXiv:1710.02298). docs/algorithms/dqn.md has the equations and where we differ.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Discrete
from numpy.typing import NDArray
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.action_values import ActionValues, Head, ValuePolicy
from longrein.learn.arrays import Views, as_arrays
from longrein.learn.batch import Batch
from longrein.learn.chain import Chain, backward
from longrein.learn.eager import Adam, quick_adam
from longrein.learn.exploration import allowed
from longrein.learn.noisy import KINDS, resample
from longrein.learn.optimizers import FlatParameters
from longrein.learn.replay import Drawn, Memory, Replay, Sample
from longrein.learn.schedules import Linear, Schedule, gradient_steps_due, least, refuse_negative, value_at
from longrein.learn.torsos import Net

ACTION_SPACES: tuple[type, ...] = (Discrete,)
EPSILON = Linear(1.0, 0.05, 10_000)
METRICS = ("loss", "td_error", "q", "grad_norm")
TOLERATES_LAG = True  # it replays anyway


@dataclass(frozen=True)
class Config:
    """DQN's settings. A schedule is a function of env steps over all environments together."""

    net: Net = Net(hidden=(256, 256), activation="relu")
    """The network between observations and the head."""
    memory: Memory = Memory(capacity=100_000, batch_size=64, min_size=1_000)
    """What is remembered; learning begins when it holds `min_size` env steps."""
    rollout_steps: int = 4
    """Vector steps between updates; how many gradient steps are made does not depend on it."""
    updates_per_step: float = 0.25
    """Gradient steps for each env step."""
    gamma: float = 0.99
    """Discount per env step."""
    lr: Schedule = 5e-4
    """Adam's learning rate."""
    double: bool = True
    """Whether the online network chooses the action that the target network values."""
    dueling: bool = False
    """Whether a state's value and its actions' advantages have streams of their own."""
    head_hidden: int = 0
    """Units of a hidden layer of the head's own, one for each dueling stream, noisy where the head is; 0: none."""
    noisy: str = "none"
    """Noise in the head's weights: none, independent or factorised; then `epsilon` is best 0."""
    noisy_sigma: float | None = None
    """The noise's deviation at the start (factorised: times 1 / sqrt(inputs)); None takes the paper's, 0.017 or 0.5."""
    distribution: str = "none"
    """What is learnt of each return: its mean (none), probabilities of atoms (c51) or quantiles (qr)."""
    num_atoms: int = 51
    """Atoms of c51."""
    v_min: float = -10.0
    """The lowest atom: no return that matters should be lower, in reward units."""
    v_max: float = 10.0
    """The highest atom, in reward units."""
    num_quantiles: int = 50
    """Quantiles of qr."""
    loss: str = "huber"
    """Of the TD error: huber (linear beyond 1, in reward units) or mse; c51 and qr have losses of their own."""
    target_update: str = "periodic"
    """How the target network follows: periodic (copied) or polyak (a share of the way in each gradient step)."""
    target_every: int = 500
    """Env steps between copies, if periodic."""
    tau: float = 0.005
    """Share of the way, if polyak."""
    exploration: str = "epsilon"
    """How it explores: epsilon (epsilon-greedy) or boltzmann."""
    epsilon: Schedule = EPSILON
    """Probability of any action, if epsilon."""
    temperature: Schedule = 1.0
    """Temperature, in reward units, if boltzmann."""
    max_grad_norm: float | None = 10.0
    """Global norm to which gradients are clipped; None leaves them."""
    max_grad_value: float | None = None
    """Size to which each number of the gradient is clipped, before the norm; None leaves them."""

    def __post_init__(self) -> None:
        refuse_negative("dqn", self)
        if self.exploration == "boltzmann" and least(self.temperature) <= 0:
            raise SpecError("dqn.temperature", f"must stay over 0, got {self.temperature}")
        for name in ("rollout_steps", "target_every", "num_quantiles"):
            if getattr(self, name) < 1:
                raise SpecError(f"dqn.{name}", f"must be at least 1, got {getattr(self, name)}")
        for name in ("gamma", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"dqn.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        if self.updates_per_step <= 0:
            raise SpecError("dqn.updates_per_step", f"must be positive, got {self.updates_per_step}")
        if self.head_hidden < 0:
            raise SpecError("dqn.head_hidden", f"must not be negative, got {self.head_hidden}")
        if self.num_atoms < 2:
            raise SpecError("dqn.num_atoms", f"must be at least 2, got {self.num_atoms}")
        if self.v_min >= self.v_max:
            raise SpecError("dqn.v_min", f"must be below v_max, got {self.v_min} and {self.v_max}")
        for name, known in (
            ("noisy", KINDS),
            ("distribution", ("none", "c51", "qr")),
            ("loss", ("huber", "mse")),
            ("target_update", ("periodic", "polyak")),
            ("exploration", ("epsilon", "boltzmann")),
        ):
            if getattr(self, name) not in known:
                raise SpecError(f"dqn.{name}", f"{getattr(self, name)!r} is none", hint="one of " + ", ".join(known))


def head(config: Config) -> Head:
    """The head that the switches ask for."""
    outputs = {"none": 1, "c51": config.num_atoms, "qr": config.num_quantiles}[config.distribution]
    return Head(
        hidden=config.head_hidden,
        dueling=config.dueling,
        noisy=config.noisy,
        sigma=config.noisy_sigma,
        distribution=config.distribution,
        outputs=outputs,
        low=config.v_min,
        high=config.v_max,
    )


class DQN:
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
        self.policy = ValuePolicy(
            observation_space,
            action_space,
            config.net,
            head(config),
            exploration=self._exploration(0),
            softmax=config.exploration == "boltzmann",
            generator=self.generator,
        )
        self.target = copy.deepcopy(self.policy.net)
        self.replay = Replay(config.memory, gamma=config.gamma)
        self.updates = 0  # gradient steps made
        self._online, self._followed = (FlatParameters(net.parameters()) for net in (self.policy.net, self.target))
        self.target.requires_grad_(False)
        # 1.5e-4, as Rainbow has it: with 1e-8 a weight whose gradient is nearly 0 would still take whole steps.
        self.optimizer = Adam([self._online.whole], lr=value_at(config.lr, 0), eps=1.5e-4, fused=True)
        self._stepped = Views(as_arrays)  # what the optimizer has

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""
        return self.config.rollout_steps

    def update(self, batch: Batch) -> dict[str, float]:
        """Remember new transitions [T, B, ...], then make the gradient steps that they pay for.

        Raises ValueError when no row is valid.
        """
        if not batch.valid.numpy().any():
            raise ValueError("valid: no row of the batch is; there is nothing to learn from")
        config = self.config
        self.replay.add(batch, self.generator)
        env_steps = self.replay.env_steps
        lr = value_at(config.lr, env_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        due = gradient_steps_due(env_steps, config.memory.min_size, config.updates_per_step, self.updates)
        measured = [self._step() for _ in range(due if self.replay.ready else 0)]
        exploration = self._exploration(env_steps)
        self.policy.explore(exploration)
        return losses.mean_of_numbers(METRICS, measured) | {
            "exploration": exploration,
            "lr": lr,
            "gradient_steps": float(len(measured)),
            "memory_size": float(len(self.replay)),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "replay": self.replay.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.replay.load_state_dict(state["replay"])
        self.updates = state["updates"]

    def _exploration(self, env_steps: int) -> float:
        config = self.config
        return value_at(config.temperature if config.exploration == "boltzmann" else config.epsilon, env_steps)

    def _step(self) -> list[float]:
        """One gradient step; what was measured before it, as METRICS names it."""
        config = self.config
        drawn = self.replay.draw(config.memory.batch_size, self.generator)
        online, followed = self.policy.net.chain, self.target.chain
        plain = config.distribution == "none" and not self.policy.inputs.choices  # no mask
        if plain and online is not None and followed is not None and online.few(len(drawn.index)):
            measured = self._by_numpy(drawn, online, followed)
        else:
            measured = self._by_torch(drawn.tensors())
        self.updates += 1
        self._follow()
        return measured

    def _by_torch(self, sample: Sample) -> list[float]:
        """The gradient step, for any network."""
        config = self.config
        target = self._target(sample)
        self._renew(self.policy.net)
        seen, _ = self.policy.inputs.split(sample.observation)
        output, passes = self.policy.net.apart(seen)
        by_hand = len(passes) == 1 and config.distribution == "none"
        with torch.set_grad_enabled(not by_hand):
            said = _of_action(output, sample.action)
            error, td_error = self._error(said, target)
            loss = (sample.weight * error).mean()
        self._online.zero_grad()
        if by_hand:
            passes[0].output.grad = self._slope(passes[0].output, sample, td_error)
            passes[0].back()
        else:
            backward(loss, passes)
        if config.max_grad_value is not None:
            self._online.gradient.clamp_(-config.max_grad_value, config.max_grad_value)
        norm = self._online.clip_(float("inf") if config.max_grad_norm is None else config.max_grad_norm)
        self.optimizer.step()
        # The distance of distributions where it is learnt by that; never the weighted loss.
        self.replay.update_priorities(sample.index, error if config.distribution == "c51" else td_error)
        q = self.policy.net.mean(said.detach())
        measured: list[float] = torch.stack([loss.detach(), td_error.abs().mean(), q.mean(), norm]).tolist()
        return measured

    def _by_numpy(self, drawn: Drawn, online: Chain, followed: Chain) -> list[float]:
        """The gradient step of few rows and small layers: what `_by_torch` computes, in a fifth of its time."""
        config, count = self.config, len(drawn.index)
        following = drawn.next_observation
        said = followed.of_few(following)
        first = np.arange(0, said.size, said.shape[1])  # [N], where each row's values begin
        chooser = online.of_few(following) if config.double else said
        best = said.take(first + chooser.argmax(1))
        there = online.there_of_few(drawn.observation)
        taken = first + drawn.action
        q = there.output.take(taken)
        td_error = drawn.reward + drawn.discount * best - q
        slope = td_error.clip(-1.0, 1.0) if config.loss == "huber" else td_error
        weighted = drawn.weight * slope
        # 0.5 delta^2 within the slope's bounds, |delta| - 0.5 beyond them.
        loss = weighted.dot(td_error - 0.5 * slope) / count
        gradient: NDArray[np.float32] = np.zeros_like(there.output)
        gradient.put(taken, weighted / -count)
        there.back(gradient)
        if config.max_grad_value is not None:
            self._online.gradient.clamp_(-config.max_grad_value, config.max_grad_value)
        norm = self._online.quick_clip_(float("inf") if config.max_grad_norm is None else config.max_grad_norm)
        quick_adam(self.optimizer, self._stepped)
        if config.memory.prioritized:
            self.replay.update_priorities(torch.from_numpy(drawn.index), torch.from_numpy(td_error))
        return [float(loss), float(np.abs(td_error).sum()) / count, float(q.sum()) / count, norm]

    @torch.no_grad()
    def _target(self, sample: Sample) -> Tensor:
        """What the network is to say of each row's action: [N, Z], for c51 the atoms' probabilities."""
        config = self.config
        seen, mask = self.policy.inputs.split(sample.next_observation)
        self._renew(self.target)
        said = self.target(seen)
        chooser, choosing = said, self.target
        if config.double:
            choosing = self.policy.net
            self._renew(choosing)  # a sample of its own: the noise that chooses is not the noise that values
            chooser = choosing(seen)
        best = _of_action(said, allowed(choosing.mean(chooser), mask).argmax(-1))
        if config.distribution == "c51":
            return losses.c51_projection(best.softmax(-1), sample.reward, sample.discount, self.target.support)
        return torch.addcmul(sample.reward.unsqueeze(1), sample.discount.unsqueeze(1), best)

    def _error(self, said: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The error of each row [N] that is minimised, and its TD error [N], in reward units and without gradient."""
        kind = self.config.distribution
        if kind == "c51":
            support = self.target.support
            return losses.c51_loss(said, target), target @ support - said.detach().softmax(-1) @ support
        td_error = (target - said).mean(1)
        if kind == "qr":
            return losses.quantile_loss(said, target), td_error.detach()
        if self.config.loss == "huber":
            return losses.huber(td_error), td_error.detach()
        return 0.5 * td_error.square(), td_error.detach()

    def _slope(self, q: Tensor, sample: Sample, td_error: Tensor) -> Tensor:
        """The gradient [N, A] of the loss by the action values [N, A]: autograd would take as long as a pass back."""
        slope = td_error.clamp(-1.0, 1.0) if self.config.loss == "huber" else td_error
        slope = slope * sample.weight / -len(slope)
        return torch.zeros_like(q).scatter_(1, sample.action.unsqueeze(1), slope.unsqueeze(1))

    def _renew(self, net: ActionValues) -> None:
        """Other noise for the next pass."""
        if self.config.noisy != "none":
            resample(net, self.generator)

    def _follow(self) -> None:
        """Let the target network follow the online one, as far as this gradient step asks for it."""
        config = self.config
        if config.target_update == "polyak":
            self._followed.whole.data.lerp_(self._online.whole.data, config.tau)
            return
        # Gradient step k belongs to env step k / updates_per_step: so many gradient steps make a copy due, however
        # many of them one update makes.
        per_env_step = config.updates_per_step
        before, now = ((self.updates - back) / per_env_step // config.target_every for back in (1, 0))
        if now > before:
            self._followed.whole.data.copy_(self._online.whole.data)


def _of_action(said: Tensor, action: Tensor) -> Tensor:
    """What is said of one action of each row: [N, A, Z] and int64 [N] -> [N, Z]."""
    # Not said[rows, action]: the gradient of that costs as much as half of all other gradients here.
    return said.gather(1, action.view(-1, 1, 1).expand(-1, 1, said.shape[2])).squeeze(1)


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> DQN:
    """A DQN for one environment's spaces; `seed` decides its weights, its draws and its noise.

    Raises SpecError for an action space that is not Discrete.
    """
    return DQN(config, observation_space, action_space, seed)
