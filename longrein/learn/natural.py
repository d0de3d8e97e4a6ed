"""K-FAC in the optimizer's place: settings, one K-FAC for each network, statistics, schedules and steps.

Knows policies with a value beside them, and no update rule: the loss is whatever the caller makes.

    with natural.recording():
        natural.observe(*policy.evaluate(rows))   # rows: those of the loss; samples are the model's own
    norm = natural.step(loss)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.learn.actor_critic import ActorCriticPolicy
from longrein.learn.algorithms import config_from
from longrein.learn.distributions import Distribution
from longrein.learn.kfac import KFAC, kfac_for, model_log_prob
from longrein.learn.policy_value import OwnModel
from longrein.learn.schedules import Schedule, refuse_negative, value_at
from longrein.learn.torsos import Net

Network = Sequence[nn.Module | nn.Parameter | None]
"""The parts of one network: what learns together, within one trust region."""


@dataclass(frozen=True)
class NaturalGradient:
    """K-FAC's settings, in place of the algorithm's own rate, optimizer and clipping."""

    lr: Schedule = 0.25
    """eta, the share of a natural gradient that is gone where the trust region allows."""
    momentum: float = 0.9
    """Of the steps."""
    damping: float = 0.1
    """Added to the Fisher matrix's eigenvalues."""
    kl_clip: Schedule = 0.002
    """kappa, twice the quadratic KL in nats that one step of the policy may have; of both networks if shared."""
    value_kl_clip: Schedule = 0.1
    """The same for a critic of its own: the mean squared change of a value, in units of value_noise squared."""
    value_noise: float = 1.0
    """Standard deviation of the Gaussian for which the critic's value is taken, in (scaled) reward units."""
    statistics_decay: float = 0.99
    """How much of the running averages of statistics is left after a step."""
    inverse_every: int = 10
    """Steps between decompositions of the statistics."""
    cold_updates: int = 10
    """First steps, by plain gradients while statistics gather."""
    max_grad_norm: float = 0.5
    """Norm to which gradients of the cold steps are clipped, for each network."""
    fallback_lr: float = 3e-3
    """Adam's learning rate, for parameters of no Linear or Conv2d, as log_std; it falls in proportion with `lr`."""

    def __post_init__(self) -> None:
        check(self, "natural")


def check(settings: Any, name: str) -> None:
    """Raises SpecError, with the name of the section, for a value of NaturalGradient's fields that makes no sense."""
    if settings.inverse_every < 1:
        raise SpecError(f"{name}.inverse_every", f"must be at least 1, got {settings.inverse_every}")
    for key in ("statistics_decay", "momentum"):
        if not 0 <= getattr(settings, key) < 1:
            raise SpecError(f"{name}.{key}", f"must be 0 or more and below 1, got {getattr(settings, key)}")
    for key in ("lr", "kl_clip", "value_kl_clip", "value_noise", "damping", "max_grad_norm"):
        if value_at(getattr(settings, key), 0) <= 0:
            raise SpecError(f"{name}.{key}", f"must be over 0, at least to begin with, got {getattr(settings, key)}")
    for key in ("cold_updates", "fallback_lr"):
        if getattr(settings, key) < 0:
            raise SpecError(f"{name}.{key}", f"must not be negative, got {getattr(settings, key)}")
    refuse_negative(name, settings)


def section(given: NaturalGradient | Mapping[str, Any] | None, net: Net, name: str) -> NaturalGradient | None:
    """The section `natural` of an algorithm's Config, read where it is a mapping, as a checkpoint has it.

    Raises SpecError where the net is recurrent: weights used at each step of a sequence have no such factors.
    """
    settings = config_from(NaturalGradient, given) if isinstance(given, Mapping) else given
    if settings is not None and net.recurrent != "none":
        raise SpecError(f"{name}.natural", f"K-FAC has no statistics of a recurrent layer, and the net has a "
                        f"{net.recurrent}", hint="net.recurrent: none, or leave natural out")  # fmt: skip
    return settings


def settings_of(config: Any) -> NaturalGradient:
    """The settings of a Config that has the same names itself."""
    return NaturalGradient(**{field.name: getattr(config, field.name) for field in fields(NaturalGradient)})


def networks(policy: ActorCriticPolicy) -> list[Network]:
    """Policy and critic where each has its own torso; one where they share it, or are a user's model."""
    if isinstance(policy.net, OwnModel):
        return [[policy.net]]
    if policy.critic_torso is None:
        return [[policy.torso, policy.actor, policy.critic, policy.log_std]]
    return [[policy.torso, policy.actor, policy.log_std], [policy.critic_torso, policy.critic]]


class Natural:
    """A K-FAC for each network, the policy's first. They share nothing, so each has a trust region of its own."""

    def __init__(self, settings: NaturalGradient, networks: Sequence[Network], generator: torch.Generator) -> None:
        """generator: of the model's samples; its state is the caller's to save."""
        self.settings = settings
        self._generator = generator
        self.lr = value_at(settings.lr, 0)
        self.kfacs = [
            kfac_for(
                *parts,
                lr=self.lr,
                momentum=settings.momentum,
                damping=settings.damping,
                decay=settings.statistics_decay,
                inverse_every=settings.inverse_every,
                cold_updates=settings.cold_updates,
                max_grad_norm=settings.max_grad_norm,
                fallback_lr=settings.fallback_lr,
            )
            for parts in networks
        ]
        self.schedule(0)

    def schedule(self, env_steps: int) -> None:
        """Set rate and trust regions as their schedules have them now."""
        self.lr = value_at(self.settings.lr, env_steps)
        for kfac, clip in zip(self.kfacs, (self.settings.kl_clip, self.settings.value_kl_clip), strict=False):
            kfac.param_groups[0].update(lr=self.lr, kl_clip=value_at(clip, env_steps))

    def value_weight(self, weight: float) -> float:
        """A value loss's weight, over value_noise^2: so its gradient and the Fisher matrix are of one likelihood."""
        return weight / self.settings.value_noise**2

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch what the layers are given while this is held; evaluate the rows and then `observe` in it."""
        with ExitStack() as stack:
            for kfac in self.kfacs:
                stack.enter_context(kfac.recording())
            yield

    def observe(self, distribution: Distribution, value: Tensor, action: Tensor | None = None) -> None:
        """Take in statistics of N rows: their distributions and values [N], both with gradients.

        action [N, ...]: the policy's own fresh draws, where there are any; None draws.
        """
        log_prob = model_log_prob(
            distribution, value, action=action, value_noise=self.settings.value_noise, generator=self._generator
        )
        for kfac in self.kfacs:
            kfac.observe(log_prob)

    def step(self, loss: Tensor, kfacs: Sequence[KFAC] | None = None) -> Tensor:
        """One step of each network along the natural gradient of a loss, a mean over rows that were observed.

        kfacs: of the networks that take it, all if left out; the loss knows no other. Returns the norm of its plain
        gradient.
        """
        kfacs = self.kfacs if kfacs is None else kfacs
        for kfac in kfacs:
            kfac.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not annotate it
        norm = nn.utils.get_total_norm(
            p.grad for kfac in kfacs for p in kfac.param_groups[0]["params"] if p.grad is not None
        )
        for kfac in kfacs:
            kfac.step()
        return norm

    def measured(self) -> dict[str, float]:
        """Of the last step: its KL by the factors, in nats, and the scales nu; factors that were skipped so far."""
        first, last = self.kfacs[0], self.kfacs[-1]
        numbers = torch.stack([first.predicted_kl, first.nu, last.nu]).tolist()
        return dict(zip(("predicted_kl", "nu", "value_nu"), numbers, strict=True)) | {
            "skipped_factors": float(sum(kfac.skipped for kfac in self.kfacs))
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides later steps, but for the generator."""
        return {"kfacs": [kfac.state_dict() for kfac in self.kfacs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises KeyError when the layers differ."""
        for kfac, saved in zip(self.kfacs, state["kfacs"], strict=True):
            kfac.load_state_dict(saved)
