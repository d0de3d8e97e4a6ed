"""What off-policy corrected updates take: cleaned batches, replays in the right number, shares, priorities."""

from __future__ import annotations

import pytest
import torch

from longrein.learn.batch import Batch
from longrein.learn.fragments import Fragments, replays, scaled, without_invalid
from longrein.learn.replay import Memory
from longrein.learn.sequence_replay import SequenceReplay


def batch(steps: int = 4, envs: int = 3, first: float = 0.0, valid: torch.Tensor | None = None) -> Batch:
    """Rows numbered in `reward`; each column a time line of its own."""
    reward = torch.arange(steps * envs, dtype=torch.float32).view(steps, envs) + first
    never = torch.zeros(steps, envs, dtype=torch.bool)
    observation = torch.stack([reward, reward + 0.5], -1)
    return Batch(
        observation, torch.zeros(steps, envs, dtype=torch.int64), reward, observation + envs, never, never,
        ~never if valid is None else valid, {"log_prob": -reward},
    )  # fmt: skip


def filled(memory: Memory, batches: int = 4) -> tuple[SequenceReplay, Batch]:
    replay = SequenceReplay(memory, 4)
    made = [batch(first=100.0 * number) for number in range(batches)]
    for one in made:
        replay.add(one)
    return replay, made[-1]


def test_invalid_rows_become_zeros_and_keep_their_flags() -> None:
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[1, 2] = False
    dirty = batch(valid=valid)
    dirty.observation[1, 2] = float("nan")
    dirty.extras["log_prob"][1, 2] = -float("inf")
    dirty.truncated[1, 2] = True
    clean = without_invalid(dirty)
    assert clean.observation[1, 2].tolist() == [0.0, 0.0]
    assert clean.extras["log_prob"][1, 2] == 0.0
    assert clean.truncated[1, 2]
    assert torch.equal(clean.reward[valid], dirty.reward[valid])
    whole = batch()
    assert without_invalid(whole) is whole


def test_shares_are_a_mean_over_valid_rows_times_the_column_weight() -> None:
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[:2, 0] = False
    share = Fragments(batch(valid=valid), torch.tensor([1.0, 0.5, 1.0])).share
    assert share[:, 0].tolist() == pytest.approx([0.0, 0.0, 0.1, 0.1])
    assert share[:, 1].tolist() == pytest.approx([0.05] * 4)


@pytest.mark.parametrize("envs", [1, 2, 8])
def test_replayed_rows_follow_fresh_rows_whatever_the_number_of_environments(envs: int) -> None:
    # 2 replayed rows for each fresh one: 4 * 4 rows in a replay, so 4 * envs * 2 / 16 replays of a rollout.
    memory = Memory(capacity=1_000, batch_size=4, min_size=1)
    replay, generator = SequenceReplay(memory, 4), torch.Generator().manual_seed(0)
    fresh = batch(envs=envs)
    replay.add(fresh)
    settings = {"ratio": 2.0, "fresh_fraction": 0.0, "generator": generator}
    rounds = 8_000 // envs
    rows = sum(one.batch.reward.numel() for _ in range(rounds) for one in replays(replay, fresh, **settings))
    assert rows / (rounds * 4 * envs) == pytest.approx(2.0, rel=0.06)


def test_nothing_is_replayed_before_the_memory_is_ready() -> None:
    replay, fresh = filled(Memory(capacity=1_000, batch_size=2, min_size=49))
    settings = {"ratio": 50.0, "fresh_fraction": 0.0, "generator": torch.Generator().manual_seed(0)}
    assert list(replays(replay, fresh, **settings)) == []
    replay.add(fresh)
    assert len(list(replays(replay, fresh, **settings))) > 10


@pytest.mark.parametrize("prioritized", [False, True])
def test_a_share_of_the_columns_is_fresh(prioritized: bool) -> None:
    replay, _ = filled(Memory(capacity=1_000, batch_size=4, min_size=1, prioritized=prioritized))
    fresh = batch(first=1e6)
    settings = {"ratio": 50.0, "fresh_fraction": 0.5, "generator": torch.Generator().manual_seed(0)}
    for fragments in replays(replay, fresh, **settings):
        new = fragments.batch.reward[0] >= 1e6
        assert new.tolist() == [True, True, False, False]
        assert torch.equal(fragments.batch.extras["log_prob"], -fragments.batch.reward)
        # A column is one time line: rewards grow by the number of environments of the rollout it came from.
        assert (fragments.batch.reward.diff(dim=0) == 3).all()
        assert fragments.index is not None
        assert len(fragments.index) == 2
        assert (fragments.weight is not None) == prioritized


def test_the_worst_fragment_is_replayed_most() -> None:
    memory = Memory(capacity=1_000, batch_size=4, min_size=1, prioritized=True, alpha=1.0, beta=1.0)
    replay, _ = filled(memory, 1)
    generator = torch.Generator().manual_seed(0)
    everything = Fragments(batch(), None, torch.arange(3))
    everything.remember(replay, torch.tensor([1.0, 2.0, 5.0]).expand(4, 3))
    drawn = torch.cat([replay.sample(100, generator).index for _ in range(20)])
    assert (drawn.bincount() / len(drawn)).tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=0.02)


def test_errors_of_invalid_rows_are_no_part_of_a_priority() -> None:
    memory = Memory(capacity=1_000, batch_size=4, min_size=1, prioritized=True, alpha=1.0)
    replay, _ = filled(memory, 1)
    valid = torch.ones(4, 3, dtype=torch.bool)
    valid[0, 0] = False
    error = torch.ones(4, 3)
    error[0, 0] = 1e9
    Fragments(batch(valid=valid), None, torch.arange(3)).remember(replay, error)
    drawn = torch.cat([replay.sample(100, torch.Generator().manual_seed(1)).index for _ in range(10)])
    assert (drawn.bincount() / len(drawn)).tolist() == pytest.approx([1 / 3] * 3, abs=0.02)


def test_rewards_are_scaled_then_clipped() -> None:
    assert scaled(torch.tensor([-30.0, 5.0]), 0.1, 1.0).tolist() == [-1.0, 0.5]
