"""ACER's two policies, for choices and for continuous actions, each with its critic and its policy gradient.

Both give the same `Terms` for a piece of the past, row by row; how they are summed up and stepped along is the
business of longrein.learn.algorithms.acer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.actor_critic import successor_values
from longrein.learn.batch import Batch
from longrein.learn.distributions import Categorical, DiagonalGaussian, action_form
from longrein.learn.networks import mlp, orthogonal
from longrein.learn.returns import retrace
from longrein.learn.torsos import Net, encode, make_torso


@dataclass(frozen=True, slots=True)
class Correction:
    """How far the past is believed."""

    gamma: float
    lambda_: float
    truncation: float  # c
    delta: float  # nats of KL growth that the trust region allows
    kl_weight: float
    entropy_weight: float


@dataclass(frozen=True, slots=True)
class Terms:
    """What a batch [T, K] gives, row by row; invalid rows hold numbers without a meaning, but no NaN."""

    policy: Tensor  # [T, K], its gradient is the policy's descent
    critic: Tensor  # [T, K], its gradient is the critic's descent
    error: Tensor  # [T, K], |Qret - Q|
    steepness: Tensor  # [T, K], L1 norm of the policy's direction
    log_ratio: Tensor  # [T, K], log pi - log mu of what was done, 0 in invalid rows
    bent: Tensor  # bool [T, K], where the trust region was active
    kl: Tensor  # [T, K], KL(average || pi), in nats
    entropy: Tensor  # [T, K], in nats
    value: Tensor  # [T, K]


class _Policy(nn.Module):
    """Torsos, and what both policies do alike."""

    version: Tensor

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        net: Net,
        *,
        shared: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        if net.recurrent != "none":
            raise SpecError("net.recurrent", f"ACER has no recurrent policy, got {net.recurrent!r}",
                            hint="recurrent: none")  # fmt: skip
        self.observation_space = observation_space
        self.form = action_form(action_space)
        self.torso = make_torso(observation_space, net, generator)
        # Gain 0.01: every action starts about equally likely.
        self.actor = orthogonal(self.torso.size, self.form.num_parameters, 0.01, generator)
        self.critic_torso = None if shared else make_torso(observation_space, net, generator)
        # A buffer: it travels with the weights, so that a copy far away says how old they are.
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations of B environments, as the vector environment batches them -> [B, ...]."""
        return encode(self.observation_space, observation)

    def statistics(self, observation: Tensor) -> Tensor:
        """Encoded observations [N, ...] -> logits or means [N, num_parameters]."""
        statistics: Tensor = self.actor(self.torso(observation))
        return statistics

    def both(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded observations [N, ...] -> statistics [N, num_parameters], and the critic's features [N, F]."""
        features = self.torso(observation)
        return self.actor(features), features if self.critic_torso is None else self.critic_torso(observation)

    def networks(self) -> list[list[nn.Module | nn.Parameter | None]]:
        """The parts of policy and critic, or of the one network of both: what K-FAC has a trust region for each of."""
        own = [getattr(self, name, None) for name in ("torso", "actor", "log_std")]
        own = [part for part in own if isinstance(part, nn.Module | nn.Parameter)]  # a fixed log_std is a buffer
        critic = [part for name in ("critic_torso", "critic", "advantage") if (part := getattr(self, name, None))]
        return [own + critic] if self.critic_torso is None else [own, critic]

    def _versions(self, rows: int) -> NDArray[np.int64]:
        version: NDArray[np.int64] = self.version.expand(rows).numpy()
        return version


class Choices(_Policy):
    """pi(a|s) and Q(s, a) for every one of A choices; V = sum_a pi Q."""

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: Discrete[Any],
        net: Net,
        *,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, net, shared=shared, generator=generator)
        self.critic = orthogonal(self.torso.size, self.form.num_parameters, 1.0, generator)

    @torch.no_grad()
    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...] -> actions int64 [B], {"log_probs": [B, A] of every choice, "version": [B]}."""
        distribution = Categorical(self.statistics(torch.from_numpy(observation)))
        action = distribution.mode() if deterministic else distribution.sample(generator)
        # Logs, all of them: the bias correction divides by the probability of choices that were not made.
        return action.numpy(), {"log_probs": distribution.log_probs.numpy(), "version": self._versions(len(action))}

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> what the vector environment takes."""
        sent: NDArray[np.generic] = self.form.for_env(action)
        return sent

    def value(self, observation: Tensor) -> Tensor:
        """Encoded observations [N, ...] -> V [N], in reward units."""
        logits, features = self.both(observation)
        value: Tensor = (logits.softmax(-1) * self.critic(features)).sum(-1)
        return value

    def model(self, observation: Tensor, action: Tensor, generator: torch.Generator) -> tuple[Categorical, Tensor]:
        """Encoded observations [N, ...], actions [N] -> pi(.|s) of N rows, and Q(s, a) [N], both with gradients.

        generator: not needed here.
        """
        logits, features = self.both(observation)
        return Categorical(logits), self.critic(features).gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def terms(
        self, batch: Batch, reward: Tensor, average: Choices, correction: Correction, generator: torch.Generator
    ) -> Terms:
        """Section 3 and algorithm 2 of Wang et al. 2017. batch [T, K, ...]; reward [T, K] as it is to be learnt from.

        generator: not needed here.
        """
        shape, observation = reward.shape, batch.observation.flatten(0, 1)
        flat_logits, features = self.both(observation)
        logits, q = flat_logits.view(*shape, -1), self.critic(features).view(*shape, -1)  # [T, K, A]
        action = batch.action.unsqueeze(-1)
        q_taken = q.gather(-1, action).squeeze(-1)
        with torch.no_grad():
            log_pi, log_mu = logits.log_softmax(-1), batch.extras["log_probs"]
            pi = log_pi.exp()
            value = (pi * q).sum(-1)
            log_ratio = (log_pi - log_mu).gather(-1, action).squeeze(-1).masked_fill(~batch.valid, 0.0)
            target = retrace(
                reward, batch.terminated, batch.truncated, batch.valid, q_taken,
                successor_values(self.value, batch, value), correction.lambda_ * log_ratio.exp().clamp(max=1.0),
                gamma=correction.gamma,
            )  # fmt: skip
            ascent = losses.categorical_ascent(
                log_pi, log_mu, batch.action, q, target, value, truncation=correction.truncation
            )
            # Before the projection, as the authors' code has it: the bonus must not leave the region either.
            ascent += correction.entropy_weight * losses.categorical_entropy_ascent(log_pi)
            log_average = average.statistics(observation).log_softmax(-1).view_as(log_pi)
            kl_gradient = pi - log_average.exp()
            direction, bent = losses.trust_region(ascent, kl_gradient, correction.delta)
            direction -= correction.kl_weight * kl_gradient
            kl = (log_average.exp() * (log_average - log_pi)).sum(-1)
            error = target - q_taken
        return Terms(
            policy=-(direction * logits).sum(-1),
            critic=0.5 * (target - q_taken).square(),
            error=error.abs(),
            steepness=direction.abs().sum(-1),
            log_ratio=log_ratio,
            bent=bent,
            kl=kl,
            entropy=-(pi * log_pi).sum(-1),
            value=value,
        )


class Continuous(_Policy):
    """A Gaussian over d numbers, V(s) and A(s, a): the stochastic dueling network of Wang et al. 2017, section 5.1.

    Actions are stored in units of the Box: -1 is its lower bound, 1 its upper one; raw where it has none.
    """

    middle: Tensor
    width: Tensor

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: Box,
        net: Net,
        *,
        sigma: float,
        learn_sigma: bool,
        samples: int,
        shared: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(observation_space, action_space, net, shared=shared, generator=generator)
        size = self.form.num_parameters
        self.samples = samples
        self.critic = orthogonal(self.torso.size, 1, 1.0, generator)
        self.advantage = mlp(self.torso.size + size, net.hidden[-1:], 1, activation=net.activation, generator=generator)
        log_std = torch.full((size,), sigma).log()
        self.learn_sigma = learn_sigma
        if learn_sigma:
            self.log_std = nn.Parameter(log_std)
        else:
            self.register_buffer("log_std", log_std)
        low, high = (torch.from_numpy(bound.reshape(-1)).float() for bound in (action_space.low, action_space.high))
        bounded = low.isfinite() & high.isfinite()
        self.register_buffer("middle", torch.where(bounded, (low + high) / 2, 0.0), persistent=False)
        self.register_buffer("width", torch.where(bounded, (high - low) / 2, 1.0), persistent=False)

    @torch.no_grad()
    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...] -> actions [B, d], {"mean": [B, d], "log_std": [B, d], "version": [B]}."""
        distribution = self.distribution(self.statistics(torch.from_numpy(observation)))
        action = distribution.mode() if deterministic else distribution.sample(generator)
        extras = {"mean": distribution.mean.numpy(), "log_std": distribution.log_std.numpy()}
        return action.numpy(), extras | {"version": self._versions(len(action))}

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Actions of `act` -> what the vector environment takes: in its units, shaped, clipped to its bounds."""
        sent: NDArray[np.generic] = self.form.for_env(self.middle.numpy() + self.width.numpy() * action)
        return sent

    def distribution(self, mean: Tensor) -> DiagonalGaussian:
        """Means [..., d] -> distributions over actions [..., d]."""
        return DiagonalGaussian(mean, self.log_std)

    def value(self, observation: Tensor) -> Tensor:
        """Encoded observations [N, ...] -> V [N], in reward units."""
        torso = self.torso if self.critic_torso is None else self.critic_torso
        value: Tensor = self.critic(torso(observation)).squeeze(-1)
        return value

    def action_values(self, features: Tensor, value: Tensor, actions: Tensor, drawn: Tensor) -> Tensor:
        """Q~(s, a) = V(s) + A(s, a) - mean_i A(s, u_i), eq. 13: features [N, F], value [N] and actions [M, N, d].

        drawn: u [n, N, d], out of pi(.|s). Returns [M, N], in reward units.
        """
        both = torch.cat([actions, drawn])
        inputs = torch.cat([features.expand(len(both), *features.shape), both], -1)
        advantage: Tensor = self.advantage(inputs).squeeze(-1)
        return value + advantage[: len(actions)] - advantage[len(actions) :].mean(0)

    def model(self, observation: Tensor, action: Tensor, generator: torch.Generator) -> tuple[DiagonalGaussian, Tensor]:
        """Encoded observations [N, ...], actions [N, d] -> pi(.|s) of N rows, and Q~(s, a) [N], both with gradients.

        generator: of the actions that the critic averages over.
        """
        mean, features = self.both(observation)
        pi = self.distribution(mean)
        with torch.no_grad():
            noise = torch.empty(self.samples, *mean.shape).normal_(generator=generator)
            drawn = mean + pi.log_std.exp() * noise
        value = self.critic(features).squeeze(-1)
        return pi, self.action_values(features, value, action.unsqueeze(0), drawn)[0]

    def terms(
        self, batch: Batch, reward: Tensor, average: Continuous, correction: Correction, generator: torch.Generator
    ) -> Terms:
        """Section 5 and algorithm 3 of Wang et al. 2017. batch [T, K, ...]; reward [T, K] as it is to be learnt from.

        generator: of the actions that the critic and the bias correction are averaged over.
        """
        shape, observation = reward.shape, batch.observation.flatten(0, 1)
        mean, features = self.both(observation)  # [N, d], [N, F] with N = T * K
        pi = self.distribution(mean)
        action = batch.action.flatten(0, 1)
        mu = DiagonalGaussian(batch.extras["mean"].flatten(0, 1), batch.extras["log_std"].flatten(0, 1))
        with torch.no_grad():
            noise = torch.empty(self.samples + 1, *mean.shape).normal_(generator=generator)
            drawn = mean + pi.log_std.exp() * noise  # [n + 1, N, d]; the last is a', of the bias correction
        value = self.critic(features).squeeze(-1)
        q_both = self.action_values(features, value, torch.stack([action, drawn[-1]]), drawn[:-1])
        q_taken, value = q_both[0].view(shape), value.view(shape)
        with torch.no_grad():
            log_ratio = (pi.log_prob(action) - mu.log_prob(action)).view(shape).masked_fill(~batch.valid, 0.0)
            past = (reward, batch.terminated, batch.truncated, batch.valid, q_taken)
            following = successor_values(self.value, batch, value)
            # The d-th root keeps traces from vanishing where actions have many dimensions.
            trace = correction.lambda_ * (log_ratio / mean.shape[-1]).exp().clamp(max=1.0)
            target = retrace(*past, following, trace, gamma=correction.gamma)
            uncorrected = retrace(*past, following, torch.full_like(trace, correction.lambda_), gamma=correction.gamma)
            ascent = losses.gaussian_ascent(
                mean,
                pi.log_std,
                action,
                log_ratio.flatten(),
                (uncorrected - value).flatten(),
                drawn[-1],
                pi.log_prob(drawn[-1]) - mu.log_prob(drawn[-1]),
                q_both[1] - value.flatten(),
                truncation=correction.truncation,
            )
            old = average.distribution(average.statistics(observation))
            kl_gradient = losses.gaussian_kl_ascent(mean, pi.log_std, old.mean, old.log_std)
            ascent[:, mean.shape[-1] :] += correction.entropy_weight  # d entropy / d log_std = 1
            if not self.learn_sigma:
                ascent, kl_gradient = ascent[:, : mean.shape[-1]], kl_gradient[:, : mean.shape[-1]]
            direction, bent = losses.trust_region(ascent, kl_gradient, correction.delta)
            direction -= correction.kl_weight * kl_gradient
            error = target - q_taken
        statistics = torch.cat([mean, pi.log_std], -1) if self.learn_sigma else mean
        return Terms(
            policy=-(direction * statistics).sum(-1).view(shape),
            # The second part moves V towards min(1, rho) (Qret - Q~) + V, as algorithm 3 has it.
            critic=0.5 * (target - q_taken).square() - log_ratio.exp().clamp(max=1.0) * error * value,
            error=error.abs(),
            steepness=direction.abs().sum(-1).view(shape),
            log_ratio=log_ratio,
            bent=bent.view(shape),
            kl=losses.gaussian_kl(old.mean, old.log_std, mean.detach(), pi.log_std.detach()).view(shape),
            entropy=pi.entropy().detach().view(shape),
            value=value.detach(),
        )
