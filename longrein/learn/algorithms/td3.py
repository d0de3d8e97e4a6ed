"""TD3: twin delayed deep deterministic policy gradient (Fujimoto et al. 2018, arXiv:1802.09477).

docs/algorithms/td3.md says where we differ.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.batch import Batch
from longrein.learn.bounded import bounded_form
from longrein.learn.chain import Chain, Pass
from longrein.learn.critics import set_gradients
from longrein.learn.distributions import action_form
from longrein.learn.eager import Adam
from longrein.learn.ensemble import Ensemble
from longrein.learn.inputs import Inputs
from longrein.learn.networks import orthogonal
from longrein.learn.off_policy import OffPolicy
from longrein.learn.replay import Memory, Replay, Sample
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.torsos import Net, make_torso

ACTION_SPACES: tuple[type, ...] = (Box,)
METRICS = ("critic_loss", "policy_loss", "q")
TOLERATES_LAG = True  # it replays anyway


@dataclass(frozen=True)
class Config:
    """TD3's settings. A schedule is a function of env steps over all environments together."""

    net: Net = Net(hidden=(256, 256), activation="relu")
    """The networks of the policy and of each critic."""
    memory: Memory = Memory(capacity=1_000_000, batch_size=256, min_size=1_000)
    """What is remembered; learning begins when it holds `min_size` env steps."""
    rollout_steps: int = 1
    """Vector steps between updates; how many gradient steps are made does not depend on it."""
    updates_per_step: float = 1.0
    """Gradient steps for each env step."""
    warmup_steps: int = 1_000
    """Env steps at the beginning in which actions are drawn uniformly."""
    gamma: float = 0.99
    """Discount per env step."""
    lr: Schedule = 3e-4
    """Adam's learning rate for the policy, and for the critics unless they have their own."""
    critic_lr: Schedule | None = None
    """Adam's learning rate for the critics; None takes `lr`."""
    tau: float = 0.005
    """Share of the way that the targets go at each of the policy's gradient steps."""
    policy_delay: int = 2
    """The critics' gradient steps for each of the policy's and of the targets'."""
    exploration_noise: Schedule = 0.1
    """Deviation of the normal noise on actions when acting, in halves of the action's range."""
    target_noise: float = 0.2
    """Deviation of the normal noise on the target policy's actions, in halves of the action's range."""
    target_noise_clip: float = 0.5
    """Where that noise is cut off, in halves of the action's range."""

    def __post_init__(self) -> None:
        refuse_negative("td3", self)
        for name in ("rollout_steps", "policy_delay"):
            if getattr(self, name) < 1:
                raise SpecError(f"td3.{name}", f"must be at least 1, got {getattr(self, name)}")
        if self.updates_per_step <= 0:
            raise SpecError("td3.updates_per_step", f"must be positive, got {self.updates_per_step}")
        for name in ("gamma", "tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise SpecError(f"td3.{name}", f"must lie between 0 and 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "target_noise", "target_noise_clip"):
            if getattr(self, name) < 0:
                raise SpecError(f"td3.{name}", f"must not be negative, got {getattr(self, name)}")
        if self.net.recurrent != "none":
            raise SpecError("net.recurrent", "td3 has no recurrent policy", hint="recurrent: none, or take ppo")


class Policy(nn.Module):
    """One action for each observation, and normal noise on it to explore; uniform as long as `warming` says so."""

    warming: Tensor
    noise: Tensor

    def __init__(
        self,
        config: Config,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.inputs = Inputs(observation_space, config.net, action_form(action_space))
        self.form = bounded_form(action_space)
        self.torso = make_torso(self.inputs.space, config.net.behind_inputs, generator)
        self.head = orthogonal(self.torso.size, self.form.size, 0.01, generator)
        self.chain = Chain.of(self.torso, self.head)
        self.register_buffer("warming", torch.tensor(config.warmup_steps > 0))
        self.register_buffer("noise", torch.tensor(float(value_at(config.exploration_noise, 0))))

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...]."""
        return self.inputs.encode(observation)

    @torch.no_grad()
    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...] -> actions float32 [B, K] in [-1, 1], and no extras."""
        if self.warming and not deterministic:
            return (2.0 * torch.rand(len(observation), self.form.size, generator=generator) - 1.0).numpy(), {}
        action = self(torch.from_numpy(observation))
        if not deterministic:
            action = (action + self.noise * torch.empty_like(action).normal_(generator=generator)).clamp(-1.0, 1.0)
        return action.numpy(), {}

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> what the vector environment takes: scaled to its bounds."""
        return self.form.for_env(action)

    def forward(self, observation: Tensor) -> Tensor:
        """Encoded observations [N, ...] -> actions [N, K] in [-1, 1]."""
        if self.chain is not None and not torch.is_grad_enabled():
            return self.chain(observation).tanh()
        action: Tensor = self.head(self.torso(observation)).tanh()
        return action


class TD3(OffPolicy):
    """The update rule, around a policy that others may act with in between."""

    measures = METRICS
    config: Config
    policy: Policy

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
        self.critics = Ensemble(
            self.policy.inputs.space,
            config.net.behind_inputs,
            inputs=self.policy.form.size,
            generator=self.generator,
        )
        self.target_policy = copy.deepcopy(self.policy).requires_grad_(False)
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.replay = Replay(config.memory, gamma=config.gamma)
        self.updates = 0  # gradient steps of the critics made
        self._policy_parameters: list[Tensor] = list(self.policy.parameters())
        self._critic_parameters: list[Tensor] = list(self.critics.parameters())
        self._target_parameters: list[Tensor] = [*self.target_policy.parameters(), *self.target_critics.parameters()]
        lr, critic_lr = self._rates()
        self.policy_optimizer = Adam(self._policy_parameters, lr=lr, fused=True)
        self.critic_optimizer = Adam(self._critic_parameters, lr=critic_lr, fused=True)

    def update(self, batch: Batch) -> dict[str, float]:
        """As its parent's; the noise of acting follows the env steps besides."""
        metrics = super().update(batch)
        noise = value_at(self.config.exploration_noise, self.replay.env_steps)
        self.policy.noise.fill_(noise)
        return metrics | {"exploration_noise": noise}

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future."""
        return {
            "policy": self.policy.state_dict(),
            "critics": self.critics.state_dict(),
            "target_policy": self.target_policy.state_dict(),
            "target_critics": self.target_critics.state_dict(),
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "replay": self.replay.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises RuntimeError, from torch, when the networks differ."""
        self.policy.load_state_dict(state["policy"])
        self.critics.load_state_dict(state["critics"])
        self.target_policy.load_state_dict(state["target_policy"])
        self.target_critics.load_state_dict(state["target_critics"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.generator.set_state(state["generator"])
        self.replay.load_state_dict(state["replay"])
        self.updates = state["updates"]

    def _step(self) -> Tensor:
        """One gradient step of the critics, and every so often of the rest; what was measured, as METRICS names it."""
        sample = self.replay.sample(self.config.memory.batch_size, self.generator)
        critic_loss, q = self._learn_critics(sample)
        self.updates += 1
        policy_loss = torch.tensor(torch.nan)
        if self.updates % self.config.policy_delay == 0:
            policy_loss = self._learn_policy(sample.observation)
            with torch.no_grad():
                online = self._policy_parameters + self._critic_parameters
                torch._foreach_lerp_(self._target_parameters, online, self.config.tau)
        return torch.stack([critic_loss, policy_loss, q.mean()])

    @torch.no_grad()
    def _target(self, sample: Sample) -> Tensor:
        """r + discount min Q(s', a' + cut noise), by the target networks: [N]."""
        config = self.config
        action = self.target_policy(sample.next_observation)
        noise = config.target_noise * torch.empty_like(action).normal_(generator=self.generator)
        action = (action + noise.clamp(-config.target_noise_clip, config.target_noise_clip)).clamp(-1.0, 1.0)
        next_q: Tensor = self.target_critics(sample.next_observation, action).squeeze(-1).amin(0)
        return sample.reward + sample.discount * next_q

    def _learn_critics(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """One step towards the target; the loss, and the critics' values [2, N] before it."""
        target = self._target(sample)
        loss, q = set_gradients(self.critics, sample.observation, target, sample.weight, action=sample.action)
        self.critic_optimizer.step()
        if self.config.memory.prioritized:
            self.replay.update_priorities(sample.index, (q - target).abs().mean(0))
        return loss, q

    def _learn_policy(self, observation: Tensor) -> Tensor:
        """One step up the first critic; the loss."""
        if self.policy.chain is not None and self.critics.chains:
            loss = self._back_by_hand(self.policy.chain.there(observation), observation)
        else:
            loss = -self.critics(observation, self.policy(observation), first=1).mean()
            self.policy_optimizer.zero_grad()
            # Of the policy's weights alone: the critics get no gradient from here, and it costs none.
            loss.backward(inputs=self._policy_parameters)
        self.policy_optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _back_by_hand(self, there: Pass, observation: Tensor) -> Tensor:
        """The policy's gradients of minus the first critic, from its pass; that loss."""
        action = there.output.tanh()
        values = self.critics.there(observation, action, first=1)
        first = torch.zeros(len(action), dtype=torch.int64)
        by_action = values.slope(first, action.shape[1]) / -len(action)
        there.back(by_action * (1.0 - action.square()))
        return -values.output.mean()


def build(
    config: Config,
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    seed: int,
) -> TD3:
    """A TD3 for one environment's spaces; `seed` decides its weights, its draws and its noise.

    Raises SpecError for an action space that is not a bounded float Box.
    """
    return TD3(config, observation_space, action_space, seed)
