"""A3C: a worker's turn by hand, what workers share and what they do not, and several of them at once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from learn import a3c_worker, probes

from longrein.errors import SpecError
from longrein.learn.algorithms.a3c import A3C, Config, build
from longrein.learn.batch import Batch
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

FAST: dict[str, Any] = {"rollout_steps": 5, "gamma": 0.8, "lr": 5e-3, "entropy_weight": 1e-3, "net": Net(hidden=(16,))}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(probe: type[probes.Probe] = probes.Imitate, seed: int = 0, **settings: Any) -> A3C:
    return build(Config(**FAST | settings), probe.observation_space, probe.action_space, seed)


def trained(probe: type[probes.Probe], updates: int = 250, **settings: Any) -> A3C:
    algorithm = make(probe, **settings)
    probes.batches(probes.vector(probe, 4), algorithm, updates)
    return algorithm


def values(algorithm: A3C, *observations: float) -> list[float]:
    with torch.no_grad():
        return algorithm.policy.value(torch.tensor(observations).unsqueeze(1)).tolist()  # type: ignore[no-any-return]


def choices(algorithm: A3C, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].reshape(-1).tolist()  # type: ignore[no-any-return]


def batch_of(rewards: list[float]) -> Batch:
    """One environment, one-step episodes at s = 1, action 1."""
    steps = len(rewards)
    seen, yes = torch.ones(steps, 1, 1), torch.ones(steps, 1, dtype=torch.bool)
    return Batch(seen, yes.long(), torch.tensor(rewards).view(steps, 1), seen, yes, ~yes, yes)


def weights(algorithm: A3C) -> list[torch.Tensor]:
    return [p.detach().clone() for p in algorithm.policy.parameters()]


def test_a_turn_by_hand() -> None:
    # No hidden layer, weights 0, s = 1: pi = (1/2, 1/2), V = 0. Rewards 1 and 2: R - V = 1, 2.
    # Summed gradients of the loss: action bias (1.5, -1.5), value bias -3. Averages start at 1, alpha 0.5, eps 0:
    # g = 0.5 + 0.5 * 1.5^2 = 1.625 and 0.5 + 0.5 * 9 = 5; steps of 0.1 / sqrt(g) times the gradient.
    algorithm = make(net=Net(hidden=()), lr=0.1, optimizer_settings={"alpha": 0.5, "eps": 0.0}, entropy_weight=0.0)
    with torch.no_grad():
        algorithm.shared.weights.zero_()
    algorithm.refresh()
    told = algorithm.update(batch_of([1.0, 2.0]))
    policy = algorithm.policy
    step = 0.1 * 1.5 / math.sqrt(1.625)
    assert policy.actor.bias.tolist() == pytest.approx([-step, step])
    assert policy.critic is not None
    assert policy.critic.bias.item() == pytest.approx(0.3 / math.sqrt(5))
    # s = 1: the weights have the same gradients. Norm: sqrt(4 * 1.5^2 + 2 * 3^2).
    assert told["grad_norm"] == pytest.approx(math.sqrt(27))
    assert told["value_loss"] == pytest.approx(0.5 * (1 + 4) / 2)


def test_gradients_are_those_of_the_weights_that_acted() -> None:
    # Two workers read the same weights; the second's gradient is computed from what it read, not from what the first
    # has made of the shared ones since, and is added to that.
    one = make(optimizer="sgd", lr=0.1)
    two, alone = one.worker(), make(optimizer="sgd", lr=0.1)
    start = weights(alone)
    first, second = batch_of([1.0]), batch_of([-3.0, 2.0])
    steps = []
    for batch in (first, second):
        alone.load_state_dict(make(optimizer="sgd").state_dict())
        alone.update(batch)
        steps.append([after - before for after, before in zip(weights(alone), start, strict=True)])
    one.update(first)
    two.update(second)
    shared = one.state_dict()["policy"].values()
    for together, begun, a, b in zip(shared, start, *steps, strict=True):
        torch.testing.assert_close(together, begun + a + b)
    # Each knows what was there when its own turn ended.
    assert all(torch.equal(a, b) for a, b in zip(shared, weights(two), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    one.refresh()
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


@pytest.mark.parametrize("optimizer", ["rmsprop_tf", "adam", "rmsprop"])
def test_statistics_are_shared(optimizer: str) -> None:
    one, alone = make(optimizer=optimizer), make(optimizer=optimizer)
    two = one.worker()
    one.update(batch_of([1.0]))
    two.refresh()
    two.update(batch_of([2.0]))
    for reward in (1.0, 2.0):
        alone.update(batch_of([reward]))
    for turn_by_turn, in_one in zip(weights(two), weights(alone), strict=True):
        assert torch.equal(turn_by_turn, in_one)
    assert one.shared.statistics
    assert all(tensor.is_shared() for tensor in one.shared.statistics.values())


def test_own_statistics_are_not_shared() -> None:
    one, alone = make(statistics="own"), make(statistics="own")
    two = one.worker()
    one.update(batch_of([1.0]))
    two.refresh()
    begun = weights(two)
    two.update(batch_of([2.0]))
    assert one.shared.statistics == {}
    # The second's step is the first one of its optimizer: as that of somebody who begins with these weights.
    state = alone.state_dict()
    state["policy"] = dict(zip(state["policy"], begun, strict=True))
    alone.load_state_dict(state)
    alone.update(batch_of([2.0]))
    assert all(torch.equal(a, b) for a, b in zip(weights(two), weights(alone), strict=True))
    # A worker goes on in another process with what it alone had; so does another that loads the saved state.
    own, saved = two.own_state(), two.state_dict()
    there, again = one.worker(), make(seed=5, statistics="own")
    there.load_own_state(own)
    again.load_state_dict(saved)
    for worker in (there, again):
        for name, tensor in own["statistics"].items():
            assert torch.equal(worker.own_state()["statistics"][name], tensor)
    with pytest.raises(SpecError, match="statistics: 'mine' is neither"):
        make(statistics="mine")


def test_lag_is_counted_by_the_writes_of_others() -> None:
    one = make()
    two, three = one.worker(), one.worker()
    lags = []
    for worker in (one, two, three, one, one):
        worker.update(batch_of([1.0]))
        lags.append(worker.lags)
    # The second copied before the first wrote, the third before both; the first copied again before these two.
    assert lags == [[0], [1], [2], [2], [0]]
    assert one.updates == 5
    # Who takes the place of one that is gone counts on, with a copy of what is there now.
    again = one.worker(seed=3, place=1)
    again.update(batch_of([1.0]))
    assert again.lags == [0]
    assert one.shared.updates[:3].tolist() == [3, 2, 1]
    assert int(one.shared.workers) == 3


def test_schedules_follow_the_steps_of_all_workers() -> None:
    one = make(lr=Linear(1e-3, 0.0, 4))
    two = one.worker()
    rates = [worker.update(batch_of([1.0, 1.0]))["lr"] for worker in (one, two, one)]
    assert rates == pytest.approx([1e-3, 5e-4, 0.0])
    assert one.env_steps == two.env_steps == 6


def test_workers_in_threads_learn_together() -> None:
    first = make()
    workers = [first, first.worker()]
    probes.train_in_threads(workers, 200)
    first.refresh()
    assert choices(first, -1.0, 1.0) == [0, 1]
    assert first.env_steps == 2 * 200 * 5 * 4
    assert first.shared.weights.isfinite().all()


def test_workers_in_processes_learn_together() -> None:
    context = torch.multiprocessing.get_context("spawn")
    first = make()
    start = weights(first)
    # Handles of shared memory go over; nothing but the weights themselves ever comes back.
    processes = [
        context.Process(target=a3c_worker.run, args=(worker, 150, seed))
        for seed, worker in enumerate((first.worker(), first.worker()))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    assert first.env_steps == 2 * 150 * 5 * 2
    first.refresh()
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(first), strict=True))
    assert choices(first, -1.0, 1.0) == [0, 1]


def test_a_save_is_of_the_shared_weights() -> None:
    one = make()
    two = one.worker()
    two.update(batch_of([1.0, -1.0]))
    state = one.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(state["policy"].values(), weights(two), strict=True))
    other = make(seed=5)
    helper = other.worker()
    other.load_state_dict(state)
    helper.refresh()
    assert all(torch.equal(a, b) for a, b in zip(weights(helper), weights(two), strict=True))
    assert other.env_steps == one.env_steps == 2
    for worker in (two, helper):
        worker.update(batch_of([0.5]))
    assert all(torch.equal(a, b) for a, b in zip(weights(helper), weights(two), strict=True))


def test_probe_constant_reward() -> None:
    assert values(trained(probes.OneReward), 0.0) == pytest.approx([1.0], abs=0.05)


def test_probe_reward_of_the_observation() -> None:
    assert values(trained(probes.RewardOfObservation), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)


def test_probe_discount_over_two_steps() -> None:
    assert values(trained(probes.LaterReward), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


def test_probe_reward_of_the_action() -> None:
    assert choices(trained(probes.RewardOfAction), 0.0) == [1]


@pytest.mark.parametrize("switched", [{}, {"shared": True}, {"optimizer": "adam"}], ids=str)
def test_probe_action_by_the_observation(switched: dict[str, Any]) -> None:
    assert choices(trained(probes.Imitate, **switched), -1.0, 1.0) == [0, 1]


def test_probe_continuous_action() -> None:
    assert choices(trained(probes.Aim, 600), 0.0) == pytest.approx([0.5], abs=0.2)


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    assert values(trained(probes.Endless, 500), 0.0) == pytest.approx([5.0], abs=0.3)


def test_an_invalid_row_changes_nothing() -> None:
    one, two, clean = make(), make(), batch_of([1.0, 2.0, 3.0])
    valid = torch.tensor([[True], [False], [True]])
    reward, seen = clean.reward.clone(), clean.observation.clone()
    reward[1], seen[1] = 1e9, torch.nan
    dirty = dataclasses.replace(clean, reward=reward, observation=seen, next_observation=seen, valid=valid)
    clean = dataclasses.replace(clean, valid=valid)
    # The row after the hole begins an episode of its own either way: all of these last one step.
    assert one.update(clean) == two.update(dirty)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))
    assert one.env_steps == 2
    with pytest.raises(ValueError, match="no row"):
        one.update(dataclasses.replace(clean, valid=torch.zeros_like(valid)))


def test_wrong_settings_are_named() -> None:
    for settings, name in (({"gamma": 2.0}, "gamma"), ({"optimizer": "lbfgs"}, "optimizer")):
        with pytest.raises(SpecError, match=rf"a3c\.{name}"):
            Config(**settings)
