"""Random: uniform in each space, by the generator it is given; and no more than that."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Text
from learn import probes
from learn.training import train

from longrein.errors import SpecError
from longrein.learn.algorithms.random import Config, Policy, Random, build

SEEN = Box(-1, 1, (1,))


def drawn(space: gymnasium.Space[Any], count: int = 6000) -> np.ndarray[Any, Any]:
    policy = Policy(SEEN, space)
    rows = np.zeros((count, 1), np.float32)
    return policy.for_env(policy.act(rows, generator=torch.Generator().manual_seed(0))[0])


@pytest.mark.parametrize(
    "space",
    [Discrete(3, start=5), MultiDiscrete([2, 3]), MultiDiscrete([[2, 3], [4, 5]], start=[[1, 1], [-1, 0]]),
     MultiBinary([2, 2]), Box(-2, 3, (2, 2)), Box(0, 255, (3,), np.uint8), Box(-np.inf, np.inf, (2,)),
     Box(np.array([-np.inf, 1.0]), np.array([1.0, np.inf]), dtype=np.float64)],
    ids=str,
)  # fmt: skip
def test_what_it_draws_is_in_the_space_and_spread(space: gymnasium.Space[Any]) -> None:
    actions = drawn(space)
    assert actions.dtype == space.dtype
    space.seed(0)
    theirs = np.array([space.sample() for _ in range(len(actions))])
    for action in actions[:50]:
        assert space.contains(action)
    np.testing.assert_allclose(actions.mean(0), theirs.mean(0), atol=0.06 * max(1.0, float(theirs.std())))
    np.testing.assert_allclose(actions.std(0), theirs.std(0), rtol=0.06)
    first, _ = Policy(SEEN, space).act(np.zeros((2, 1), np.float32), deterministic=True)
    assert space.contains(Policy(SEEN, space).for_env(first)[1])


def test_every_option_is_as_likely() -> None:
    counts = np.bincount(drawn(Discrete(4), 8000))
    # Chi-square with 3 degrees of freedom exceeds 16.3 once in a thousand times.
    assert ((counts - 2000) ** 2 / 2000).sum() < 16.3


def test_it_counts_valid_rows_and_keeps_the_count() -> None:
    one = Random(Config(rollout_steps=4), SEEN, Discrete(2))
    (batch,) = probes.batches(probes.vector(probes.OneReward, 3), one, 1)
    batch.valid[0] = False
    assert one.update(batch) == {"env_steps": 12 + 9, "reward": 1.0}
    two = build(Config(), SEEN, Discrete(2), 7)
    two.load_state_dict(one.state_dict())
    assert two.env_steps == 21
    batch.valid.fill_(False)
    with pytest.raises(ValueError, match="no row"):
        two.update(batch)


def test_its_return_is_that_of_a_random_policy() -> None:
    # CartPole-v1 under random actions: 22.3 (published: 22.97 over 100 episodes).
    assert 20.0 < train("random", {}, "CartPole-v1", env_steps=20_000, window=800).last < 24.5


def test_a_space_it_cannot_draw_from_is_refused() -> None:
    with pytest.raises(SpecError, match="action_space"):
        build(Config(), SEEN, Text(3), 0)
    with pytest.raises(SpecError, match=r"random\.rollout_steps"):
        Config(rollout_steps=0)
