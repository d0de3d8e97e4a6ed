"""Asynchronous n-step Q-learning: a turn by hand, the shared target network, and how workers explore."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from learn import probes

from longrein.errors import SpecError
from longrein.learn.algorithms.async_q import AsyncQ, Config, build
from longrein.learn.batch import Batch
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

FAST: dict[str, Any] = {
    "rollout_steps": 5, "gamma": 0.8, "lr": 5e-3, "optimizer": "adam", "target_every": 40, "epsilon": 0.3,
    "net": Net(hidden=(16,)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(probe: type[probes.Probe] = probes.Imitate, seed: int = 0, **settings: Any) -> AsyncQ:
    return build(Config(**FAST | settings), probe.observation_space, probe.action_space, seed)


def trained(probe: type[probes.Probe], updates: int = 250, **settings: Any) -> AsyncQ:
    algorithm = make(probe, **settings)
    probes.batches(probes.vector(probe, 4), algorithm, updates)
    return algorithm


def best(algorithm: AsyncQ, *observations: float) -> list[float]:
    with torch.no_grad():
        values = algorithm.policy.values(torch.tensor(observations).unsqueeze(1))
    return values.max(1).values.tolist()  # type: ignore[no-any-return]


def choices(algorithm: AsyncQ, *observations: float) -> list[int]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].tolist()  # type: ignore[no-any-return]


def weights(algorithm: AsyncQ) -> list[torch.Tensor]:
    return [p.detach().clone() for p in algorithm.policy.net.parameters()]


def batch_of(rewards: list[float], terminated: bool = False) -> Batch:
    """One environment at s = 1, action 1, in one episode; its last row terminates it or the rollout ends there."""
    steps = len(rewards)
    seen, yes = torch.ones(steps, 1, 1), torch.ones(steps, 1, dtype=torch.bool)
    ends = ~yes.clone()
    ends[-1] = terminated
    return Batch(seen, yes.long(), torch.tensor(rewards).view(steps, 1), seen, ends, ~yes, yes)


def set_biases(algorithm: AsyncQ, own: tuple[float, float], target: tuple[float, float]) -> None:
    """No hidden layer, weights 0: values are the biases, which are the last two numbers."""
    with torch.no_grad():
        for flat, biases in ((algorithm.shared.weights, own), (algorithm.shared.more["target"], target)):
            flat.zero_()
            flat[-2:] = torch.tensor(biases)
    algorithm.refresh()


@pytest.mark.parametrize("terminated", [False, True])
def test_a_turn_by_hand(terminated: bool) -> None:
    # gamma 0.5, rewards 1, 2. R_2 = 2 + 0.5 * max(3, 4) = 4, or 2 behind a termination; R_1 = 1 + 0.5 R_2 = 3, or 2.
    # Q(s, 1) = 1, so the errors are 3 and 2, or 1 and 1: the bias of action 1 has the gradient -5, or -2; lr 0.1.
    algorithm = make(net=Net(hidden=()), gamma=0.5, lr=0.1, optimizer="sgd", target_every=1000)
    set_biases(algorithm, (7.0, 1.0), (3.0, 4.0))
    told = algorithm.update(batch_of([1.0, 2.0], terminated))
    step = 0.2 if terminated else 0.5
    assert algorithm.policy.net.advantage[0].bias.tolist() == pytest.approx([7.0, 1.0 + step])
    assert told["td_error"] == pytest.approx(1.0 if terminated else 2.5)
    # s = 1, so the weight has the same gradient.
    assert told["grad_norm"] == pytest.approx(10 * step * 2**0.5)
    assert algorithm.shared.more["target"][-2:].tolist() == [3.0, 4.0], "not yet"


def test_the_target_follows_the_steps_of_all_workers() -> None:
    one = make(target_every=5)
    two = one.worker()
    assert torch.equal(one.shared.more["target"], one.shared.weights)
    same = []
    for worker in (one, two, one, two, one):  # 2, 4, 6, 8, 10 env steps
        told = worker.update(batch_of([1.0, 2.0]))
        same.append(torch.equal(one.shared.more["target"], one.shared.weights))
    assert same == [False, False, True, False, True]
    assert told["target_copies"] == 2
    assert one.env_steps == two.env_steps == 10
    assert one.updates == 5
    # The targets of a new worker are those of the others.
    assert best_of_target(one.worker()) == best_of_target(two)


def best_of_target(algorithm: AsyncQ) -> list[float]:
    return algorithm._best(torch.tensor([[-1.0], [1.0]])).tolist()  # type: ignore[no-any-return]


def test_workers_draw_the_epsilon_that_they_end_with() -> None:
    first = make(epsilon=None, epsilon_steps=4)
    drawn = Counter(first.worker(seed, 1).epsilon_end for seed in range(300))
    assert {end: drawn[end] / 300 for end in (0.1, 0.01, 0.5)} == pytest.approx(
        {0.1: 0.4, 0.01: 0.3, 0.5: 0.3}, abs=0.1
    )
    worker = first.worker(0)
    assert float(worker.policy.exploration) == 1.0
    told = [worker.update(batch_of([1.0, 1.0]))["exploration"] for _ in range(3)]
    half = (1.0 + worker.epsilon_end) / 2
    assert told == pytest.approx([half, worker.epsilon_end, worker.epsilon_end])


def test_one_epsilon_for_all_where_it_is_set() -> None:
    one = make(epsilon=Linear(1.0, 0.2, 4), lr=Linear(1e-3, 0.0, 4))
    two = one.worker()
    told = [worker.update(batch_of([1.0, 1.0])) for worker in (one, two, one)]
    assert [one["exploration"] for one in told] == pytest.approx([0.6, 0.2, 0.2])
    assert [one["lr"] for one in told] == pytest.approx([1e-3, 5e-4, 0.0])


@pytest.mark.parametrize("statistics", ["shared", "own"])
def test_statistics_are_shared_or_own(statistics: str) -> None:
    one, alone = (make(statistics=statistics, target_every=1000) for _ in range(2))
    two = one.worker()
    one.update(batch_of([1.0]))
    two.refresh()
    two.update(batch_of([2.0]))
    for reward in (1.0, 2.0):
        alone.update(batch_of([reward]))
    same = all(torch.equal(a, b) for a, b in zip(weights(two), weights(alone), strict=True))
    assert same == (statistics == "shared")
    again = make(seed=9, statistics=statistics, target_every=1000)
    again.load_state_dict(alone.state_dict())
    for algorithm in (again, alone):
        algorithm.update(batch_of([0.5]))
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(alone), strict=True))


def test_workers_in_threads_learn_together() -> None:
    first = make()
    workers = [first, first.worker()]
    probes.train_in_threads(workers, 150)
    first.refresh()
    assert choices(first, -1.0, 1.0) == [0, 1]
    assert first.env_steps == 2 * 150 * 5 * 4
    assert first.updates == 2 * 150


def test_probes() -> None:
    assert best(trained(probes.OneReward), 0.0) == pytest.approx([1.0], abs=0.05)
    assert best(trained(probes.RewardOfObservation), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)
    assert best(trained(probes.LaterReward), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)
    assert choices(trained(probes.RewardOfAction), 0.0) == [1]
    assert choices(trained(probes.Imitate), -1.0, 1.0) == [0, 1]
    # 1 / (1 - 0.8) = 5: a time limit keeps the bootstrap.
    assert best(trained(probes.Endless, 500), 0.0) == pytest.approx([5.0], abs=0.3)


def test_an_invalid_row_changes_nothing() -> None:
    one, two, clean = make(), make(), batch_of([1.0, 2.0, 3.0])
    valid = torch.tensor([[True], [False], [True]])
    reward, seen = clean.reward.clone(), clean.observation.clone()
    reward[1], seen[1] = 1e9, torch.nan
    dirty = dataclasses.replace(clean, reward=reward, observation=seen, valid=valid)
    clean = dataclasses.replace(clean, valid=valid)
    assert one.update(clean) == two.update(dirty)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    assert one.env_steps == 2
    with pytest.raises(ValueError, match="no row"):
        one.update(dataclasses.replace(clean, valid=torch.zeros_like(valid)))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"gamma": 2.0}, "gamma"), ({"optimizer": "lbfgs"}, "optimizer"), ({"statistics": "none"}, "statistics"),
        ({"epsilon_ends": (0.1, 2.0)}, "epsilon_ends"), ({"epsilon_probs": (1.0,)}, "epsilon_probs"),
        ({"epsilon_probs": (0.0, 0.0, 0.0)}, "epsilon_probs"), ({"target_every": 0}, "target_every"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SpecError, match=rf"async_q\.{name}"):
        Config(**settings)
