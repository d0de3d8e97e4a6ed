"""Whole episodes out of batches: against an account kept row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longrein.learn.batch import Batch
from longrein.learn.episodes import EpisodeStore


def stream(seed: int, steps: int, envs: int, ends: float = 0.2, holes: float = 0.1) -> Batch:
    """Rows whose observation is their own number, so that each begins where the one before it ended."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(steps * envs, dtype=torch.float32).view(steps, envs, 1)

    def flags(share: float) -> torch.Tensor:
        return torch.rand(steps, envs, generator=generator) < share

    return Batch(
        numbers, numbers[..., 0].long(), numbers[..., 0], numbers + envs, flags(ends), flags(ends), ~flags(holes)
    )


def piece(batch: Batch, first: int, last: int) -> Batch:
    return Batch(*[getattr(batch, name)[first:last] for name in Batch.__slots__[:7]])


def expected(batch: Batch) -> list[tuple[int, bool]]:
    """(row number, whether it belongs to a cut episode) of the rows of whole episodes, env by env."""
    rows = []
    for b in range(batch.reward.shape[1]):
        episode: list[int] = []
        for t in range(len(batch.reward)):
            if not batch.valid[t, b]:
                rows += [(number, True) for number in episode]  # the next step was lost: it was cut before
                episode = []
                continue
            episode.append(int(batch.action[t, b]))
            if batch.terminated[t, b] or batch.truncated[t, b]:
                rows += [(number, False) for number in episode]
                episode = []
    return rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 3), st.lists(st.integers(1, 5), min_size=1))
def test_every_row_of_a_whole_episode_comes_out_once(seed: int, steps: int, envs: int, lengths: list[int]) -> None:
    batch = stream(seed, steps, envs)
    store, came, first = EpisodeStore(10**6), [], 0
    while first < steps:
        length = lengths[first % len(lengths)]
        store.add(piece(batch, first, first + length))
        first += length
        if store.ended and (seed + first) % 2:
            came += rows_of(store.take())
    if store.ended:
        came += rows_of(store.take())
    assert sorted(came) == sorted(expected(batch))


def rows_of(taken: Batch) -> list[tuple[int, bool]]:
    """As in `expected`, read off what the store gave."""
    rows = []
    for b in range(taken.reward.shape[1]):
        episode: list[int] = []
        for t in range(len(taken.reward)):
            if taken.valid[t, b]:
                episode.append(int(taken.action[t, b]))
                if taken.done[t, b]:
                    rows += [(number, bool(taken.extras["cut"][t, b])) for number in episode]
                    episode = []
        assert not episode, "an episode without its end"
    return rows


def plain(observation: list[float], ends: list[bool]) -> Batch:
    """One environment; each row ends where the next begins, by number."""
    seen = torch.tensor(observation).view(-1, 1, 1)
    end = torch.tensor(ends).view(-1, 1)
    steps = len(observation)
    zeros, never = torch.zeros(steps, 1), torch.zeros(steps, 1, dtype=torch.bool)
    return Batch(seen, zeros, zeros, seen + 1, end, never, ~never)


def test_an_episode_goes_on_over_batches() -> None:
    store = EpisodeStore(100)
    store.add(plain([0, 1], [False, False]))
    store.add(plain([2, 3], [False, False]))
    assert store.ended == 0
    with pytest.raises(ValueError, match="no whole episode"):
        store.take()
    store.add(plain([4, 0], [True, False]))
    assert store.ended == 1
    taken = store.take()
    assert taken.observation[taken.valid].flatten().tolist() == [0, 1, 2, 3, 4]
    assert store.ended == 0
    store.add(plain([1], [True]))
    taken = store.take()
    assert taken.observation[taken.valid].flatten().tolist() == [0, 1]


def test_an_environment_reset_from_outside_cuts_its_episode() -> None:
    store = EpisodeStore(100)
    store.add(plain([0, 1], [False, False]))
    store.add(plain([7, 8], [False, False]))  # 1 leads to 2, not to 7
    assert store.ended == 1
    taken = store.take()
    assert taken.observation[taken.valid].flatten().tolist() == [0, 1]
    assert taken.truncated[taken.valid].flatten().tolist() == [False, True]
    assert taken.extras["cut"][taken.valid].flatten().tolist() == [False, True]


def test_an_endless_episode_is_cut() -> None:
    store = EpisodeStore(4)
    for first in (0, 2, 4):
        store.add(plain([first, first + 1], [False, False]))
        assert store.ended == (first >= 2)
    taken = store.take()
    assert taken.observation[taken.valid].flatten().tolist() == [0, 1, 2, 3]
    assert taken.truncated[taken.valid].flatten().tolist() == [False, False, False, True]


def test_the_store_goes_on_from_a_save() -> None:
    batch = stream(3, 12, 2, ends=0.1)
    one = EpisodeStore(100)
    one.add(piece(batch, 0, 6))
    if one.ended:
        one.take()
    two = EpisodeStore(100)
    two.load_state_dict(one.state_dict())
    for store in (one, two):
        store.add(piece(batch, 6, 12))
    assert one.ended == two.ended > 0
    assert rows_of(one.take()) == rows_of(two.take())


def test_the_store_keeps_copies_and_its_width() -> None:
    store, batch = EpisodeStore(100), plain([0, 1], [False, True])
    store.add(batch)
    batch.observation.fill_(99.0)
    assert store.take().observation.flatten().tolist() == [0, 1]
    with pytest.raises(ValueError, match="1 environments"):
        store.add(stream(0, 2, 3))
