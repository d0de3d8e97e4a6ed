"""Self-imitation: losses by hand, what is remembered and how it is drawn, and what it is for: rare rewards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gymnasium.spaces import Discrete
from learn import probes
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.algorithms.a2c import A2C, Config
from longrein.learn.batch import Batch
from longrein.learn.imitation import METRICS, Imitator, SelfImitation
from longrein.learn.torsos import Net

SMALL = SelfImitation(capacity=8, batch_size=64, min_size=1, updates_per_step=1.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def episode(rewards: list[float], *, end: str | None = "terminated", start: int = 0) -> Batch:
    """One environment's rows; each observation is the number of its row, and each action too."""
    steps = len(rewards)
    seen = torch.arange(start, start + steps, dtype=torch.float32).view(steps, 1, 1)
    flags = {name: torch.zeros(steps, 1, dtype=torch.bool) for name in ("terminated", "truncated")}
    if end is not None:
        flags[end][-1] = True
    reward = torch.tensor(rewards).view(steps, 1)
    return Batch(seen, seen[..., 0].long(), reward, seen + 1, **flags, valid=torch.ones(steps, 1, dtype=torch.bool))


def zero(observation: Tensor) -> Tensor:
    return torch.zeros(len(observation))


class Watch:
    """Stands in for an algorithm: values 0, and what it is asked and given is written down."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = torch.tensor(value, requires_grad=True)
        self.asked: list[tuple[Tensor, Tensor]] = []
        self.losses: list[float] = []

    def evaluate(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append((observation, action))
        return torch.full((len(action),), -1.0), self.value.expand(len(action))

    def step(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.item())
        return torch.zeros(())


def seen_by(imitator: Imitator, watch: Watch, seed: int = 0) -> dict[str, float]:
    return imitator.learn(watch.evaluate, watch.step, torch.Generator().manual_seed(seed))


def test_losses_by_hand() -> None:
    # R - V = 2 and -1: only the first counts. Policy: -(0.5 * -3 * 2) / 2 = 1.5; value: 0.5 * (0.5 * 4) / 2 = 0.5.
    log_prob = torch.tensor([-3.0, -1.0], requires_grad=True)
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    policy, critic = losses.self_imitation(log_prob, value, torch.tensor([3.0, 1.0]), torch.tensor([0.5, 1.0]))
    assert (policy.item(), critic.item()) == pytest.approx((1.5, 0.5))
    (policy + critic).backward()
    assert log_prob.grad is not None
    assert value.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([-0.5, 0.0])
    assert value.grad.tolist() == pytest.approx([-0.5, 0.0])  # from the value loss alone: 0.5 * -2 / 2


def test_the_loss_of_a_step_is_weighted() -> None:
    # One row of R = 3 and V = 1, log pi = -1: 2 * 1.0 + 0.1 * 0.5 * 4 = 2.2.
    imitator = Imitator(
        SelfImitation(capacity=4, batch_size=3, min_size=1, updates_per_step=1.0, value_weight=0.1), gamma=1
    )
    imitator.add(episode([3.0]), zero)
    imitator.add(episode([0.0], end=None), zero)
    watch = Watch(1.0)
    told = seen_by(imitator, watch)
    assert watch.losses == pytest.approx([2.2])
    assert told == pytest.approx(dict(zip(METRICS, (2.0, 2.0, 1.0, 3.0), strict=True)))


def test_returns_are_those_of_whole_episodes() -> None:
    imitator = Imitator(SMALL, gamma=0.5)
    imitator.add(episode([1.0, 1.0], end=None), zero)
    assert len(imitator) == 0
    imitator.add(episode([4.0], start=2), zero)
    assert len(imitator) == 3
    # 1 + 0.5 + 0.25 * 4 = 2.5; 1 + 0.5 * 4 = 3; 4
    assert imitator.state_dict()["columns"]["return_"].tolist() == [2.5, 3.0, 4.0]


def test_truncation_is_bootstrapped() -> None:
    imitator = Imitator(SMALL, gamma=0.5)
    imitator.add(episode([1.0], end="truncated"), lambda observation: observation[:, 0] * 10)
    assert imitator.state_dict()["columns"]["return_"].tolist() == [1.0 + 0.5 * 10.0]  # s' = 1


def test_the_oldest_rows_are_forgotten() -> None:
    imitator = Imitator(SMALL, gamma=0.0)
    imitator.add(episode([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), zero)
    imitator.add(episode([6.0, 7.0, 8.0, 9.0]), zero)
    assert sorted(imitator.state_dict()["columns"]["return_"].tolist()) == [2, 3, 4, 5, 6, 7, 8, 9]
    imitator.add(episode([float(number) for number in range(20)]), zero)
    assert sorted(imitator.state_dict()["columns"]["return_"].tolist()) == list(range(12, 20))


def test_optimizer_steps_follow_env_steps() -> None:
    imitator, watch = Imitator(SelfImitation(min_size=4, batch_size=4, updates_per_step=0.4), gamma=1.0), Watch()
    counts = []
    for _ in range(5):
        imitator.add(episode([1.0, 1.0, 1.0, 1.0]), zero)
        told = seen_by(imitator, watch)
        counts.append(len(watch.losses))
        assert math.isnan(told["imitation_return"]) == (counts[-1] == 0)
    # Nothing is remembered in the first 4; then 1.6, 3.2, 4.8, 6.4.
    assert counts == [0, 1, 3, 4, 6]


def test_rows_are_drawn_by_how_much_better_they_were() -> None:
    settings = SelfImitation(capacity=4, batch_size=4000, min_size=1, updates_per_step=1.0, alpha=1.0, beta=1.0)
    imitator, watch = Imitator(settings, gamma=0.0), Watch(0.0)
    imitator.add(episode([1.0, 3.0, -5.0]), zero)
    imitator.add(episode([9.0, 9.0], end=None), zero)  # not whole, but two steps are due
    seen_by(imitator, watch)
    first, second = (action.bincount(minlength=3).tolist() for _, action in watch.asked)
    # At first all alike; then by (R - V)_+ = 1, 3, 0, each the nearest whole number since the draw is stratified.
    assert first == pytest.approx([4000 / 3] * 3, abs=2)
    assert second == pytest.approx([1000, 3000, 0], abs=2)
    # beta 1 takes the preference back: weights 1 and 1/3 on losses 1 and 3, so 1 * 1/4 + 3 / 3 * 3/4 = 1.
    assert watch.losses[1] == pytest.approx(1.0 + 0.01 * 0.5 * (1 / 4 + 9 / 3 * 3 / 4), rel=1e-2)


def test_it_goes_on_from_a_save(tmp_path: Any) -> None:
    one, two = Imitator(SMALL, gamma=0.9), Imitator(SMALL, gamma=0.9)
    one.add(episode([1.0, 2.0, 3.0]), zero)
    one.add(episode([1.0, 5.0], end=None), zero)
    seen_by(one, Watch())
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    watches = Watch(), Watch()
    for imitator, watch in zip((one, two), watches, strict=True):
        imitator.add(episode([7.0], start=2), zero)
        seen_by(imitator, watch, 5)
        imitator.add(episode([8.0] * 5), zero)
        seen_by(imitator, watch, 6)
    assert watches[0].losses == watches[1].losses != []
    with pytest.raises(ValueError, match="capacity"):
        Imitator(SelfImitation(capacity=9, min_size=1), gamma=0.9).load_state_dict(one.state_dict())


def test_wrong_settings_are_named() -> None:
    for settings, name in (({"capacity": 0}, "capacity"), ({"beta": -1.0}, "beta"), ({"min_size": 10**6}, "min_size")):
        with pytest.raises(SpecError, match=rf"imitation\.{name}"):
            SelfImitation(**settings)


class Corridor(probes.Probe):
    """Eight steps; reward 1 only for action 1 in all of them: one random episode in 256 has it."""

    action_space = Discrete(2)
    straight = True

    def first(self) -> float:
        self.straight = True
        return 0.0

    def step(self, action: Any) -> probes.Step:
        self.time += 1
        self.straight = self.straight and action == 1
        self.seen = self.time / 8
        return self.observation(), float(self.straight and self.time == 8), self.time == 8, False, {}


def test_a_reward_met_rarely_is_met_again() -> None:
    def share(imitation: SelfImitation | None) -> float:
        config = Config(
            lr=2e-3, optimizer="adam", entropy_weight=0.01, imitation=imitation, net=Net(hidden=(16,)), rollout_steps=8
        )
        algorithm = A2C(config, Corridor.observation_space, Corridor.action_space, 0)
        made = probes.batches(probes.vector(Corridor, 4), algorithm, 250)
        return sum(float(batch.reward.sum()) for batch in made[-50:]) / (50 * 4)

    settings = SelfImitation(batch_size=64, min_size=200, updates_per_step=0.1)
    assert share(settings) > 0.8
    assert share(None) < 0.1
