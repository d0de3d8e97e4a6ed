"""Losses, networks, statistics, schedules, batches and the rollout store: numbers worked by hand."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from gymnasium.vector.utils import concatenate, create_empty_array

from longrein.errors import SpecError
from longrein.learn import losses
from longrein.learn.batch import Batch, Transition
from longrein.learn.distributions import Categorical
from longrein.learn.networks import flat_observation, observation_size
from longrein.learn.normalise import ObservationNormaliser, RewardScale, RunningMoments
from longrein.learn.rollout import Rollout
from longrein.learn.schedules import Linear, value_at


def test_clipped_surrogate_by_hand() -> None:
    # Ratios 2, 2, 0.5, 0.5 with advantages 1, -1, 1, -1 and clip 0.2:
    # min(2, 1.2) = 1.2; min(-2, -1.2) = -2; min(0.5, 0.8) = 0.5; min(-0.5, -0.8) = -0.8. Mean -0.275.
    log_ratio = torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    loss = losses.clipped_surrogate(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert loss.item() == pytest.approx(0.275)


def test_value_losses_by_hand() -> None:
    value, target, old = torch.tensor([3.0]), torch.tensor([1.0]), torch.tensor([0.0])
    assert losses.value_loss(value, target).item() == 2.0  # (3 - 1)^2 / 2
    # Clipped to 0.5 from 0: (0.5 - 1)^2 = 0.25 is less than 4, so the larger stays.
    assert losses.clipped_value_loss(value, target, old, 0.5).item() == 2.0
    # From 3 towards 0 the clipped one is larger: near = 2.5, (2.5 - 0)^2 / 2.
    pulled = losses.clipped_value_loss(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([3.0]), 0.5)
    assert pulled.item() == 3.125


def test_kl_estimate_is_close_to_the_kl_and_never_negative() -> None:
    mu, pi = torch.tensor([0.5, 0.5]), torch.tensor([0.6, 0.4])
    exact = (mu * (mu / pi).log()).sum()
    log_ratio = (pi / mu).log()  # both actions equally often under mu: the sample mean is the expectation
    assert losses.approx_kl(log_ratio).item() == pytest.approx(exact.item(), abs=1e-6)
    assert losses.approx_kl(torch.randn(100)).item() >= 0


def test_clip_fraction_counts_both_sides() -> None:
    assert losses.clip_fraction(torch.tensor([1.0, 1.3, 0.7, 1.1]).log(), 0.2).item() == 0.5


def test_explained_variance_ends() -> None:
    target = torch.tensor([1.0, 2.0, 3.0])
    assert losses.explained_variance(target, target) == 1.0
    assert losses.explained_variance(torch.full((3,), 9.0), target) == 0.0
    assert math.isnan(losses.explained_variance(target, torch.ones(3)))


def test_one_advantage_is_left_alone() -> None:
    assert losses.normalised(torch.tensor([5.0])).item() == 5.0
    assert losses.normalised(torch.tensor([1.0, 3.0])).mean().item() == 0.0


def test_means_of_numbers_leave_nan_out() -> None:
    nan = math.nan
    assert losses.mean_of_numbers(("a", "b"), [[1.0, nan], [3.0, 5.0]]) == {"a": 2.0, "b": 5.0}
    assert losses.mean_of_numbers(("a", "b"), [[1.0, 2.0]]) == {"a": 1.0, "b": 2.0}
    assert all(math.isnan(mean) for mean in losses.mean_of_numbers(("a", "b"), [[nan, nan], [nan, nan]]).values())
    assert all(math.isnan(mean) for mean in losses.mean_of_numbers(("a", "b"), []).values())


@pytest.mark.parametrize("entropy_weight", [0.0, 0.4])
def test_the_policy_gradient_by_numpy_is_autograds(entropy_weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(40, 3, generator=generator)).requires_grad_()
    action = torch.randint(3, (40,), generator=generator)
    advantage = torch.randn(40, generator=generator)
    distribution = Categorical(logits)
    loss = losses.policy_gradient(distribution.log_prob(action), advantage)
    entropy = distribution.entropy().mean()
    (loss - entropy_weight * entropy).backward()  # type: ignore[no-untyped-call]
    rows = (logits.detach().numpy(), action.numpy(), advantage.numpy())
    quick_loss, quick_entropy, gradient = losses.quick_policy_gradient(*rows, entropy_weight)
    assert quick_loss == pytest.approx(loss.item(), rel=1e-5)
    assert quick_entropy == pytest.approx(entropy.item(), rel=1e-5)
    assert logits.grad is not None
    torch.testing.assert_close(torch.from_numpy(gradient), logits.grad, rtol=1e-4, atol=1e-7)


def test_linear_schedule() -> None:
    line = Linear(1.0, 0.0, 100)
    assert [value_at(line, steps) for steps in (0, 25, 100, 500)] == [1.0, 0.75, 0.0, 0.0]
    assert value_at(0.3, 10**9) == 0.3


def test_moments_merge_like_one_pass() -> None:
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0)) * 5 + 2
    moments = RunningMoments((3,))
    for piece in rows.split([1, 60, 39]):
        moments.update(piece)
    moments.update(rows[:0])
    torch.testing.assert_close(moments.mean, rows.double().mean(0))
    torch.testing.assert_close(moments.variance, rows.double().var(0, correction=0))


def test_an_observation_normaliser_travels_with_the_weights() -> None:
    one, two = ObservationNormaliser(2, 10.0), ObservationNormaliser(2, 10.0)
    one.moments.update(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    two.load_state_dict(one.state_dict())
    # Means 1 and 20, deviations 1 and 10.
    torch.testing.assert_close(two(torch.tensor([[2.0, 20.0]])), torch.tensor([[1.0, 0.0]]))
    assert two(torch.tensor([[1e6, 0.0]]))[0, 0].item() == 10.0


def test_reward_scale_follows_the_discounted_return_of_each_environment() -> None:
    scale = RewardScale(gamma=0.5, clip=10.0)
    reward = torch.tensor([[2.0, 0.0], [2.0, 100.0], [2.0, 4.0]])
    done = torch.tensor([[False, False], [True, False], [False, False]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    scaled = scale.scale(reward, done, valid)
    # Environment 0: 2, 3 (ends), 2. Environment 1: 0, invalid, 4. Deviation of (2, 3, 2, 0, 4): mean 2.2, var 1.76.
    assert scale.moments.count.item() == 5
    assert scale.moments.variance.item() == pytest.approx(1.76)
    torch.testing.assert_close(scaled[0, 0].item(), 2.0 / math.sqrt(1.76))
    with pytest.raises(ValueError, match="expected 2 environments"):
        scale.scale(reward[:, :1], done[:, :1], valid[:, :1])


OBSERVATION_SPACES: list[tuple[gymnasium.Space[Any], int]] = [
    (Box(-1, 1, (2, 3)), 6),
    (Discrete(4, start=-1), 4),
    (MultiDiscrete([2, 3]), 5),
    (MultiBinary(3), 3),
    (Dict(a=Box(0, 1, (2,)), b=Tuple((Discrete(2), MultiBinary(1)))), 5),
]


@pytest.mark.parametrize(("space", "size"), OBSERVATION_SPACES, ids=str)
def test_observations_become_rows_of_numbers(space: gymnasium.Space[Any], size: int) -> None:
    space.seed(0)
    samples = [space.sample() for _ in range(3)]
    batch = concatenate(space, samples, create_empty_array(space, 3))
    rows = flat_observation(space, batch)
    assert rows.shape == (3, size) == (3, observation_size(space))
    assert rows.dtype == np.float32
    # Gymnasium's own flattening of one value agrees.
    for row, sample in zip(rows, samples, strict=True):
        np.testing.assert_allclose(row, gymnasium.spaces.flatten(space, sample).astype(np.float32))


def test_a_space_without_a_size_is_refused() -> None:
    with pytest.raises(SpecError, match=r"env\.observation_space"):
        observation_size(Dict(a=Text(3)))


def step(number: float, valid: bool = True) -> Transition:
    yes, no = np.ones(2, np.bool_), np.zeros(2, np.bool_)
    return Transition(
        np.full((2, 3), number), np.zeros(2, np.int64), np.full(2, number, np.float32), np.full((2, 3), number + 1),
        no, no, yes if valid else no, {"log_prob": np.full(2, -number, np.float32)},
    )  # fmt: skip


def test_a_rollout_keeps_time_in_its_first_dimension() -> None:
    rollout = Rollout(3)
    for number in range(3):
        rollout.add(step(float(number), valid=number != 1))
    assert rollout.full
    batch = rollout.take()
    assert batch.reward[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert batch.extras["log_prob"][:, 1].tolist() == [0.0, -1.0, -2.0]
    assert batch.valid[:, 0].tolist() == [True, False, True]
    assert batch.observation.dtype == torch.float32
    assert len(rollout) == 0


def test_a_rollout_gives_the_memory_that_it_was_told_to_use() -> None:
    def step(reward: float) -> Transition:
        rows, no = np.full((2, 3), reward, np.float32), np.zeros(2, np.bool_)
        return Transition(rows, np.zeros(2, np.int64), np.full(2, reward, np.float32), rows, no, no, ~no)

    rollout = Rollout(1)
    rollout.add(step(1.0))
    first = rollout.take()
    rollout.add(step(2.0))
    assert rollout.take().reward.tolist() == [[2.0, 2.0]]
    assert first.reward.tolist() == [[2.0, 2.0]]  # a view, good until the next step
    rollout.use({name: column.copy() for name, column in rollout.columns.items()})
    rollout.add(step(3.0))
    assert rollout.take().reward.tolist() == [[3.0, 3.0]]
    assert first.reward.tolist() == [[2.0, 2.0]]
    rollout.load_state_dict(rollout.state_dict())
    rollout.add(step(4.0))
    assert rollout.take().reward.tolist() == [[4.0, 4.0]]


def test_a_rollout_refuses_what_does_not_fit() -> None:
    rollout = Rollout(1)
    with pytest.raises(ValueError, match="0 of 1"):
        rollout.take()
    rollout.add(step(0.0))
    with pytest.raises(ValueError, match="take the batch first"):
        rollout.add(step(1.0))
    rollout.take()
    other = step(1.0)
    with pytest.raises(ValueError, match="extras"):
        rollout.add(Transition(*[getattr(other, name) for name in other.__slots__[:7]]))


def test_a_batch_names_the_field_that_does_not_fit() -> None:
    good = {
        "observation": torch.zeros(4, 2, 3), "action": torch.zeros(4, 2), "reward": torch.zeros(4, 2),
        "next_observation": torch.zeros(4, 2, 3), "terminated": torch.zeros(4, 2).bool(),
        "truncated": torch.zeros(4, 2).bool(), "valid": torch.ones(4, 2).bool(),
    }  # fmt: skip
    assert not Batch(**good).done.any()
    for name, wrong in (
        ("action", torch.zeros(3, 2)),
        ("next_observation", torch.zeros(4, 2, 4)),
        ("valid", torch.ones(4, 2)),
    ):
        with pytest.raises(ValueError, match=name):
            Batch(**{**good, name: wrong})
    with pytest.raises(ValueError, match=r"extras\.log_prob"):
        Batch(**good, extras={"log_prob": torch.zeros(2, 4)})
