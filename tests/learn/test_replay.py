"""Replay against brute force: windows, draws, priorities, eviction, saving."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn.batch import Batch
from longrein.learn.priorities import SumTree
from longrein.learn.replay import Memory, Replay
from longrein.learn.schedules import Linear
from longrein.learn.sequence_replay import SequenceReplay

GAMMA = 0.9


def made(steps: int, envs: int, *, first: int = 0, seed: int = 0, ends: float = 0.15, lost: float = 0.1) -> Batch:
    """A stretch of time: the observation of step t of env b is [t, b], counted from `first`; random masks."""
    rng = np.random.default_rng([seed, first])
    time = torch.arange(first, first + steps).float()
    observation = torch.stack(torch.meshgrid(time, torch.arange(envs).float(), indexing="ij"), -1)
    step = torch.tensor([1.0, 0.0])
    return Batch(
        observation=observation,
        action=torch.from_numpy(rng.integers(0, 3, (steps, envs))),
        reward=torch.from_numpy(rng.normal(size=(steps, envs)).astype(np.float32)),
        next_observation=observation + step,
        terminated=torch.from_numpy(rng.random((steps, envs)) < ends),
        truncated=torch.from_numpy(rng.random((steps, envs)) < ends),
        valid=torch.from_numpy(rng.random((steps, envs)) >= lost),
        extras={"log_prob": torch.from_numpy(rng.normal(size=(steps, envs)).astype(np.float32))},
    )


def joined(batches: list[Batch]) -> Batch:
    columns = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in Batch.__slots__[:7]}
    return Batch(**columns, extras={"log_prob": torch.cat([batch.extras["log_prob"] for batch in batches])})


def window(batch: Batch, t: int, b: int, n: int) -> tuple[float, float, list[float]]:
    """R, D and s* of the window that begins at step t of env b, by walking."""
    total, discount = 0.0, 1.0
    for i in range(n):
        total += discount * float(batch.reward[t + i, b])
        discount *= GAMMA
        last = t + i
        if batch.done[last, b] or last + 1 == len(batch.reward) or not batch.valid[last + 1, b]:
            break
    return total, discount * (not batch.terminated[last, b]), batch.next_observation[last, b].tolist()


def every_row(replay: Replay, generator: torch.Generator) -> dict[tuple[int, int], tuple[float, float, list[float]]]:
    """(t, b) -> R, D, s* of all rows that come up in many draws."""
    found = {}
    sample = replay.sample(4000, generator)
    for i, (t, b) in enumerate(sample.observation.int().tolist()):
        found[t, b] = (float(sample.reward[i]), float(sample.discount[i]), sample.next_observation[i].tolist())
    return found


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prioritized", [False, True])
def test_windows_are_those_of_a_walk_over_random_masks(n: int, seed: int, prioritized: bool) -> None:
    replay = Replay(Memory(capacity=60, min_size=1, n_steps=n, prioritized=prioritized), gamma=GAMMA)  # 20 slots of 3
    parts, first = [], 0
    for steps in (4, 1, 7, 3, 1, 6, 9, 2):  # 33 steps: the ring comes round
        parts.append(made(steps, 3, first=first, seed=seed))
        replay.add(parts[-1])
        first += steps
        history = joined(parts)
        found = every_row(replay, torch.Generator().manual_seed(seed))
        kept = range(max(0, first - 20), first)
        assert found.keys() == {(t, b) for t in kept for b in range(3) if history.valid[t, b]}
        for (t, b), (reward, discount, successor) in found.items():
            expected = window(history, t, b, n)
            assert (reward, discount) == pytest.approx(expected[:2], rel=1e-5, abs=1e-6)
            assert successor == expected[2]
        assert len(replay) == int(history.valid[-20:].sum())
        assert replay.env_steps == int(history.valid.sum())


@pytest.mark.parametrize("prioritized", [False, True])
def test_sampled_eviction_keeps_windows_whole(prioritized: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    memory = Memory(capacity=60, min_size=1, n_steps=3, eviction="sampled", prioritized=prioritized)
    replay, parts, first = Replay(memory, gamma=GAMMA), [], 0
    for steps in [4, 1, 7, 3, 1, 6, 9, 2] * 3:
        parts.append(made(steps, 3, first=first))
        replay.add(parts[-1], generator)
        first += steps
    history = joined(parts)
    found = every_row(replay, generator)
    assert len(found) == len(replay)
    kept = {t for t, _ in found}
    assert len(kept) <= 20
    assert min(kept) < first - 20  # something older than a ring would have
    for (t, b), (reward, discount, successor) in found.items():
        n = 1 + (t + 1 in kept) + (t + 1 in kept and t + 2 in kept)  # what was evicted ends a window
        expected = window(history, t, b, n)
        assert (reward, discount) == pytest.approx(expected[:2], rel=1e-5, abs=1e-6)
        assert successor == expected[2]
    with pytest.raises(ValueError, match="generator"):
        replay.add(made(1, 3, first=first))


def test_a_window_by_hand() -> None:
    # gamma 0.9, rewards 1, 2, 4; the third step ends by its time limit.
    replay = Replay(Memory(capacity=10, min_size=1, n_steps=5), gamma=GAMMA)
    batch = made(4, 1, ends=0.0, lost=0.0)
    batch.reward[:, 0] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    batch.truncated[2, 0] = True
    replay.add(batch)
    found = every_row(replay, torch.Generator().manual_seed(0))
    assert found[0, 0][:2] == pytest.approx((1 + 0.9 * 2 + 0.81 * 4, 0.729))  # bootstraps behind three steps
    assert found[0, 0][2] == [3.0, 0.0]
    assert found[2, 0][:2] == pytest.approx((4.0, 0.9))
    assert found[3, 0][:2] == pytest.approx((8.0, 0.9))  # the head: one step, and gamma, not gamma^5


def test_a_hole_between_two_batches_ends_windows() -> None:
    # The learner leaves out a batch without a valid row. What follows is another episode.
    replay = Replay(Memory(capacity=10, min_size=1, n_steps=3), gamma=GAMMA)
    replay.add(made(2, 1, ends=0.0, lost=0.0))
    replay.add(made(2, 1, first=7, ends=0.0, lost=0.0))
    found = every_row(replay, torch.Generator().manual_seed(0))
    assert found[1, 0][1] == pytest.approx(0.9)
    assert found[1, 0][2] == [2.0, 0.0]
    assert found[7, 0][1] == pytest.approx(0.81)


def test_a_batch_longer_than_the_memory_leaves_its_end() -> None:
    for eviction in ("oldest", "sampled"):
        replay = Replay(Memory(capacity=12, min_size=1, eviction=eviction), gamma=GAMMA)
        generator = torch.Generator().manual_seed(0)
        replay.add(made(3, 2, lost=0.0), generator)
        replay.add(made(20, 2, first=3, lost=0.0), generator)
        assert {t for t, _ in every_row(replay, generator)} == set(range(17, 23))
        assert replay.env_steps == 46


def test_dtypes_and_copies() -> None:
    batch = made(4, 2, lost=0.0)
    image = torch.arange(4 * 2 * 3, dtype=torch.uint8).reshape(4, 2, 3)
    kept = Batch(image, batch.action, batch.reward, image + 1, batch.terminated, batch.truncated, batch.valid)
    replay = Replay(Memory(capacity=20, min_size=1), gamma=GAMMA)
    replay.add(kept)
    image.zero_()
    sample = replay.sample(50, torch.Generator().manual_seed(0))
    assert sample.observation.dtype == sample.next_observation.dtype == torch.uint8
    assert sample.action.dtype == sample.index.dtype == torch.int64
    assert sample.reward.dtype == sample.discount.dtype == sample.weight.dtype == torch.float32
    assert sample.observation.max() > 0


def test_a_copy_of_a_memory_goes_on_by_itself() -> None:
    replay = Replay(Memory(capacity=60, min_size=1, n_steps=3), gamma=GAMMA)
    replay.add(made(4, 3))
    twin = copy.deepcopy(replay)
    for first in (4, 12):
        replay.add(made(8, 3, first=first))
        twin.add(made(8, 3, first=first))
    one, other = (every_row(each, torch.Generator().manual_seed(0)) for each in (replay, twin))
    assert one == other
    assert max(t for t, _ in one) == 19


def test_what_does_not_fit_is_refused() -> None:
    replay = Replay(Memory(capacity=20, min_size=1), gamma=GAMMA)
    with pytest.raises(ValueError, match="no valid row"):
        replay.sample(1, torch.Generator())
    replay.add(made(2, 2))
    with pytest.raises(ValueError, match="holds 2 environments"):
        replay.add(made(2, 3))
    other = made(2, 2)
    with pytest.raises(ValueError, match=r"extras\.log_prob"):
        replay.add(Batch(**{name: getattr(other, name) for name in Batch.__slots__[:7]}))
    with pytest.raises(ValueError, match="action"):
        replay.add(dataclasses.replace(other, action=other.action.float()))


def test_it_is_ready_when_it_has_enough_or_can_hold_no_more() -> None:
    replay = Replay(Memory(capacity=20, min_size=20), gamma=GAMMA)
    for first in range(0, 12, 2):
        assert replay.ready is (first >= 6)  # 6 slots of 3
        replay.add(made(2, 3, first=first))


def test_uniform_draws_are_uniform() -> None:
    replay = Replay(Memory(capacity=64, min_size=1), gamma=GAMMA)
    replay.add(made(16, 4, lost=0.3))
    draws = 64_000
    counts = torch.bincount(replay.sample(draws, torch.Generator().manual_seed(0)).index, minlength=64)
    assert (counts[~replay._columns["valid"]] == 0).all()
    chi_square(counts[counts > 0].double(), torch.full((len(replay),), draws / len(replay)).double())


def test_few_valid_rows_are_found() -> None:
    replay = Replay(Memory(capacity=2000, min_size=1), gamma=GAMMA)
    batch = made(1000, 2, lost=1.0)
    batch.valid[17, 1] = batch.valid[500, 0] = True
    replay.add(batch)
    assert set(replay.sample(50, torch.Generator().manual_seed(0)).index.tolist()) == {17 * 2 + 1, 1000}


def chi_square(counts: Tensor, expected: Tensor) -> None:
    """Fails for a statistic beyond five deviations of its distribution."""
    assert len(counts) == len(expected)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5 + 5


def test_prioritized_draws_follow_the_errors() -> None:
    replay = Replay(Memory(capacity=64, min_size=1, prioritized=True, alpha=0.7), gamma=GAMMA)
    replay.add(made(16, 4, lost=0.2))
    valid = replay._columns["valid"].nonzero().squeeze(1)
    error = torch.linspace(-2.0, 3.0, len(valid))
    replay.update_priorities(valid, error)
    p = (error.double().abs() + 1e-6) ** 0.7
    generator, draws, rounds = torch.Generator().manual_seed(0), 32, 4000
    counts = torch.zeros(64, dtype=torch.float64)
    for _ in range(rounds):
        counts += torch.bincount(replay.sample(draws, generator).index, minlength=64)
    assert (counts[~replay._columns["valid"]] == 0).all()
    # Stratified draws vary less than independent ones: the statistic may only be too small.
    expected = draws * rounds * p / p.sum()
    freedom = len(p) - 1
    assert float(((counts[valid] - expected) ** 2 / expected).sum()) < freedom + 5 * (2 * freedom) ** 0.5
    one = replay.sample(1, generator)  # one draw a time is independent
    counts = torch.zeros(64, dtype=torch.float64)
    for _ in range(20_000):
        counts[replay._priorities.draw(1, generator)] += 1
    chi_square(counts[valid], 20_000 * p / p.sum())
    assert one.weight.tolist() == [1.0]


def test_importance_weights_by_hand() -> None:
    # p = 1, 4 by alpha 1: P = 0.2, 0.8; N P = 0.4, 1.6; beta 0.5: 1.581, 0.791; over the largest: 1, 0.5.
    memory = Memory(capacity=2, min_size=1, prioritized=True, alpha=1.0, beta=0.5, epsilon=1e-12)
    replay = Replay(memory, gamma=GAMMA)
    replay.add(made(2, 1, lost=0.0))
    replay.update_priorities(torch.tensor([0, 1]), torch.tensor([-1.0, 4.0]))
    sample = replay.sample(10, torch.Generator().manual_seed(0))
    assert sample.index.tolist() == [0] * 2 + [1] * 8  # stratified: exactly in proportion
    assert sample.weight.tolist() == pytest.approx([1.0] * 2 + [0.5] * 8)
    replay.update_priorities(torch.tensor([1, 1]), torch.tensor([9.0, 1.0]))  # the last of equals
    assert replay.sample(2, torch.Generator().manual_seed(0)).index.tolist() == [0, 1]


def test_beta_follows_env_steps() -> None:
    memory = Memory(capacity=10, min_size=1, prioritized=True, alpha=1.0, beta=Linear(0.0, 1.0, 4))
    replay = Replay(memory, gamma=GAMMA)
    for first, least in ((0, 0.25**0.5), (2, 0.25)):  # after 2 env steps beta is 0.5, after 4 it is 1
        replay.add(made(2, 1, first=first, lost=0.0))
        replay.update_priorities(torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 4.0, 4.0, 4.0])[:4])
        weight = replay.sample(200, torch.Generator().manual_seed(0)).weight
        assert float(weight.min()) == pytest.approx(least, rel=1e-3)


def test_new_rows_have_the_largest_priority_met() -> None:
    replay = Replay(Memory(capacity=4, min_size=1, prioritized=True, alpha=1.0), gamma=GAMMA)
    replay.add(made(2, 1, lost=0.0))
    replay.update_priorities(torch.tensor([0, 1]), torch.tensor([5.0, 0.1]))
    replay.update_priorities(torch.tensor([0]), torch.tensor([0.2]))
    replay.add(made(4, 1, first=2, lost=0.0))
    assert replay._priorities.of(torch.arange(4)).tolist() == pytest.approx([5.0] * 4)
    with pytest.raises(ValueError, match="finite"):
        replay.update_priorities(torch.tensor([0]), torch.tensor([float("nan")]))


def test_the_newest_rows_are_in_each_combined_batch() -> None:
    for prioritized in (False, True):
        memory = Memory(capacity=1000, min_size=1, combined=True, prioritized=prioritized)
        replay = Replay(memory, gamma=GAMMA)
        for first in range(0, 200, 2):
            replay.add(made(2, 2, first=first, lost=0.0))
            times = replay.sample(16, torch.Generator().manual_seed(0)).observation[:, 0].tolist()
            assert times[-4:] == [first, first, first + 1, first + 1]
        assert replay.sample(4, torch.Generator().manual_seed(0)).observation[-2:, 0].tolist() == [199, 199]


def test_the_sum_tree_is_a_cumulated_sum() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 5, 64, 65, 5000):
        tree, values = SumTree(size), np.zeros(size)
        for _ in range(20):
            index = rng.integers(0, size, 30)
            new = rng.exponential(size=30) * (rng.random(30) < 0.8)
            tree.set(index, new)
            for i, value in zip(index, new, strict=True):
                values[i] = value
            assert np.array_equal(tree.values, values)
            assert tree.total == pytest.approx(values.sum())
            if values.sum() == 0:
                continue
            heights = rng.random(200) * values.sum()
            expected = np.searchsorted(values.cumsum(), heights, side="right")
            assert np.array_equal(tree.find(heights), expected)
        loaded = SumTree(size)
        loaded.load(tree.values)
        assert loaded.total == tree.total
        assert np.array_equal(loaded.find(heights), tree.find(heights))


def test_a_height_at_the_very_end_finds_the_last_number_above_zero() -> None:
    tree = SumTree(200)
    tree.set(np.array([3, 70]), np.array([0.1, 0.2]))
    assert tree.find(np.array([0.0, 0.1, tree.total, tree.total * 2])).tolist() == [3, 70, 70, 70]


MEMORIES: list[dict[str, Any]] = [
    {}, {"prioritized": True, "n_steps": 3}, {"eviction": "sampled", "combined": True},
    {"eviction": "sampled", "prioritized": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", MEMORIES, ids=str)
@pytest.mark.parametrize("steps", [3, 30])
def test_a_saved_memory_draws_the_same(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    memory = Memory(capacity=50, min_size=1, **settings)
    one, generator = Replay(memory, gamma=GAMMA), torch.Generator().manual_seed(0)
    one.add(made(steps, 2), generator)
    first = one.sample(8, generator)
    one.update_priorities(first.index, torch.randn(8, generator=generator))
    torch.save({"memory": one.state_dict(), "generator": generator.get_state()}, tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    two, other = Replay(memory, gamma=GAMMA), torch.Generator()
    two.load_state_dict(state["memory"])
    other.set_state(state["generator"])
    for replay, draws in ((one, generator), (two, other)):
        replay.add(made(4, 2, first=steps), draws)
    for _ in range(3):
        a, b = one.sample(16, generator), two.sample(16, other)
        for name in ("observation", "action", "reward", "next_observation", "discount", "weight", "index"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(a.extras["log_prob"], b.extras["log_prob"])
        one.update_priorities(a.index, a.reward)
        two.update_priorities(b.index, b.reward)
    assert len(one) == len(two)


def test_an_empty_memory_can_be_saved() -> None:
    two = Replay(Memory(), gamma=GAMMA)
    two.load_state_dict(Replay(Memory(), gamma=GAMMA).state_dict())
    assert len(two) == 0
    with pytest.raises(ValueError, match="prioritized"):
        two.load_state_dict(Replay(Memory(prioritized=True), gamma=GAMMA).state_dict())


def test_a_saved_half_empty_memory_is_small(tmp_path: Path) -> None:
    replay = Replay(Memory(capacity=1_000_000), gamma=GAMMA)
    replay.add(made(10, 2))
    torch.save(replay.state_dict()["columns"], tmp_path / "m.pt")
    assert (tmp_path / "m.pt").stat().st_size < 20_000


def test_wrong_settings_are_named() -> None:
    for name, value in {"capacity": 0, "batch_size": 0, "n_steps": 0, "min_size": -1, "alpha": -1.0, "epsilon": 0.0,
                        "eviction": "newest"}.items():  # fmt: skip
        with pytest.raises(SpecError, match=rf"memory\.{name}"):
            Memory(**{name: value})  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(SpecError, match=r"memory\.min_size"):
        Memory(capacity=10, min_size=11)


# ------------------------------------------------------------------------------------------------------------ sequences


def test_sequences_overlap_and_learn_behind_the_burn_in() -> None:
    replay = SequenceReplay(Memory(capacity=1000, min_size=1), 6, stride=3, burn_in=2, first_only=("log_prob",))
    parts, first = [], 0
    for steps in (1, 4, 2, 7, 1):
        parts.append(made(steps, 2, first=first))
        replay.add(parts[-1])
        first += steps
    history = joined(parts)  # 15 steps: sequences from 0, 3, 6 and 9 of each env
    drawn = replay.sample(500, torch.Generator().manual_seed(0))
    starts = set()
    for k in range(500):
        t, b = drawn.batch.observation[0, k].int().tolist()
        starts.add((t, b))
        for name in ("observation", "action", "reward", "next_observation", "terminated", "truncated", "valid"):
            assert torch.equal(getattr(drawn.batch, name)[:, k], getattr(history, name)[t : t + 6, b]), name
        assert drawn.batch.extras["log_prob"][:, k].tolist() == [float(history.extras["log_prob"][t, b])] * 6
        assert drawn.learn[:, k].tolist() == [False] * 2 + history.valid[t + 2 : t + 6, b].tolist()
    assert starts == {(t, b) for t in (0, 3, 6, 9) for b in range(2)}
    assert replay.num_sequences == 8
    assert replay.env_steps == int(history.valid.sum())


def test_whole_rollouts_come_back_as_they_were_and_the_oldest_go() -> None:
    replay = SequenceReplay(Memory(capacity=40, min_size=1), 5)  # 8 fragments
    for first in range(0, 30, 5):
        replay.add(made(5, 2, first=first, lost=0.0))
    drawn = replay.sample(300, torch.Generator().manual_seed(0))
    assert drawn.batch.reward.shape == (5, 300)
    assert set(drawn.batch.observation[0, :, 0].int().tolist()) == {10, 15, 20, 25}
    assert len(replay) == 40
    assert drawn.batch.extras["log_prob"].shape == (5, 300)


def test_a_sequence_without_anything_to_learn_is_not_kept() -> None:
    replay = SequenceReplay(Memory(capacity=100, min_size=1), 5)
    batch = made(5, 2, lost=0.0)
    batch.valid[:, 1] = False
    replay.add(batch)
    assert replay.num_sequences == 1
    assert not replay.sample(20, torch.Generator().manual_seed(0)).batch.observation[..., 1].any()


def test_a_hole_between_batches_is_a_truncation() -> None:
    replay = SequenceReplay(Memory(capacity=100, min_size=1), 4)
    replay.add(made(2, 1, ends=0.0, lost=0.0))
    replay.add(made(2, 1, first=9, ends=0.0, lost=0.0))
    batch = replay.sample(1, torch.Generator().manual_seed(0)).batch
    assert batch.truncated[:, 0].tolist() == [False, True, False, False]
    assert batch.observation[:, 0, 0].tolist() == [0, 1, 9, 10]


@pytest.mark.parametrize("settings", MEMORIES, ids=str)
def test_saved_sequences_are_drawn_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = settings | {"n_steps": 1}
    memory = Memory(capacity=60, min_size=1, **settings)
    one, generator = SequenceReplay(memory, 5, stride=2, burn_in=1), torch.Generator().manual_seed(0)
    one.add(made(23, 2), generator)
    drawn = one.sample(6, generator)
    one.update_priorities(drawn.index, torch.randn(6, generator=generator))
    torch.save({"memory": one.state_dict(), "generator": generator.get_state()}, tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    two, other = SequenceReplay(memory, 5, stride=2, burn_in=1), torch.Generator()
    two.load_state_dict(state["memory"])
    other.set_state(state["generator"])
    for replay, draws in ((one, generator), (two, other)):
        replay.add(made(4, 2, first=23), draws)
    for _ in range(3):
        a, b = one.sample(6, generator), two.sample(6, other)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.weight, b.weight)
        assert torch.equal(a.batch.observation, b.batch.observation)
        assert torch.equal(a.learn, b.learn)


def test_prioritized_sequences_follow_their_errors() -> None:
    replay = SequenceReplay(Memory(capacity=100, min_size=1, prioritized=True, alpha=1.0, beta=1.0), 5)
    replay.add(made(5, 2, lost=0.0))
    replay.update_priorities(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    drawn = replay.sample(8, torch.Generator().manual_seed(0))
    assert drawn.index.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert drawn.weight.tolist() == pytest.approx([1.0] * 2 + [1 / 3] * 6, rel=1e-4)


def test_a_batch_that_is_filled_anew_is_looked_at_anew() -> None:
    # As a rollout's is: the same tensors, other numbers; and a copy of the memory has arrays of its own.
    replay, batch = Replay(Memory(capacity=100, min_size=1), gamma=GAMMA), made(5, 2, ends=0.0, lost=0.0)
    replay.add(batch)
    batch.reward.fill_(7.0)
    other = copy.deepcopy(replay)
    other.add(batch)
    other.add(batch)
    replay.add(batch)
    assert len(replay) == 20
    assert len(other) == 30
    assert (replay.draw(200, torch.Generator().manual_seed(0)).reward == 7.0).mean() == pytest.approx(0.5, abs=0.15)
    assert (other.draw(200, torch.Generator().manual_seed(0)).reward == 7.0).mean() == pytest.approx(0.67, abs=0.15)


def test_a_draw_holds_what_a_sample_holds() -> None:
    replay = Replay(Memory(capacity=100, min_size=1, n_steps=3), gamma=GAMMA)
    replay.add(made(20, 2))
    drawn, sample = (draw(9, torch.Generator().manual_seed(0)) for draw in (replay.draw, replay.sample))
    tensors = drawn.tensors()  # type: ignore[attr-defined]
    torch.testing.assert_close(dataclasses.asdict(tensors), dataclasses.asdict(sample))
    assert {name: getattr(tensors, name).dtype for name in ("reward", "discount", "weight", "index")} == {
        "reward": torch.float32, "discount": torch.float32, "weight": torch.float32, "index": torch.int64,
    }  # fmt: skip
