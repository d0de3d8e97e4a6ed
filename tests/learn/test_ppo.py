"""PPO's own parts: how its parameters are stepped, its minibatches, one torso or two. More of it in test_algorithms."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from learn import probes
from torch import nn

from longrein.learn.algorithms import appo, ppo
from longrein.learn.algorithms.ppo import PPO, Config
from longrein.learn.batch import Batch
from longrein.learn.distributions import Categorical
from longrein.learn.optimizers import FlatParameters
from longrein.learn.torsos import Net


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(seed: int = 0, make: type[probes.Probe] = probes.Imitate, **settings: Any) -> PPO:
    return PPO(Config(**settings), make.observation_space, make.action_space, seed)


class Seen(probes.Endless):
    """A picture that changes with time."""

    observation_space = Box(0, 255, (10, 10, 2), np.uint8)  # type: ignore[assignment]  # wider than Probe's

    def observation(self) -> Any:
        return np.random.default_rng(self.time).integers(0, 256, (10, 10, 2), np.uint8)


def test_flat_parameters_are_stepped_as_separate_ones() -> None:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    two = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    two.load_state_dict(one.state_dict())
    flat = FlatParameters(two.parameters())
    optimizers = (torch.optim.Adam(one.parameters(), lr=0.1), torch.optim.Adam([flat.whole], lr=0.1))
    rows = torch.randn(16, 3)
    for _ in range(5):
        for net in (one, two):
            one.zero_grad() if net is one else flat.zero_grad()
            (net(rows).square().mean() * 100).backward()
        norms = (nn.utils.clip_grad_norm_(one.parameters(), 0.5), flat.clip_(0.5))
        torch.testing.assert_close(*norms)
        assert norms[0] > 0.5
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    state = {name: torch.zeros_like(tensor) for name, tensor in two.state_dict().items()}
    two.load_state_dict(state)
    assert not flat.whole.any(), "loaded weights are the whole's"


def test_what_needs_no_gradient_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2))
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    flat = FlatParameters(net.parameters())
    assert flat.whole.numel() == 8 * 2 + 2
    net(torch.ones(1, 3)).sum().backward()
    torch.optim.SGD([flat.whole], lr=1.0).step()
    assert torch.equal(net[0].weight, before)


def test_sampling_draws_what_torch_draws_and_nothing_that_is_ruled_out() -> None:
    logits = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    ours = Categorical(logits).sample(torch.Generator().manual_seed(1))
    theirs = torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(1)).squeeze(-1)
    assert torch.equal(ours, theirs)
    certain = torch.full((100_000, 3), -1e9)
    certain[:, 1] = 0.0
    assert (Categorical(certain).sample(torch.Generator().manual_seed(2)) == 1).all()


def test_an_epoch_takes_every_row_once() -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(rollout_steps=10), 1)
    algorithm = build(minibatch_size=30)
    rows, memory = algorithm._rows(batch)
    assert memory is None
    pieces = [piece.log_prob for piece, _ in algorithm._minibatches(rows, None)]
    assert sorted(len(piece) for piece in pieces) == [26, 27, 27]  # 80 rows by at most 30
    assert torch.equal(torch.cat(pieces).sort().values, rows.log_prob.sort().values)


def test_rows_are_copied_only_where_some_are_not_valid() -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(rollout_steps=10), 1)
    whole = build()._rows(batch)[0]
    assert whole.inputs.data_ptr() == batch.observation.data_ptr()
    batch.valid[3, 1] = False
    some = build()._rows(batch)[0]
    kept = torch.ones(80, dtype=torch.bool).index_fill_(0, torch.tensor(25), False)
    assert torch.equal(some.inputs, whole.inputs[kept])
    assert torch.equal(some.action, whole.action[kept])


def test_values_in_parts_are_those_of_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(rollout_steps=10), 1)
    whole = build()._rows(batch)[0].value
    monkeypatch.setattr("longrein.learn.policy_value.NUMBERS_AT_ONCE", 7)
    torch.testing.assert_close(build()._rows(batch)[0].value, whole)


@pytest.mark.parametrize("shared", [False, True])
def test_a_value_loss_moves_the_policy_only_through_a_shared_torso(shared: bool) -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build(rollout_steps=16), 1)
    algorithm = build(shared=shared, epochs=1, net=Net((8,)))
    before = algorithm.policy.act(np.ones((1, 1), np.float32), True)[1]["log_prob"]
    same = Batch(
        **{name: getattr(batch, name) for name in Batch.__slots__[:7]},
        extras={"log_prob": batch.extras["log_prob"]},
    )
    # Clipped to nothing, the surrogate has no gradient, but for rows whose ratio is just 1; a ratio of e has none.
    same.extras["log_prob"].sub_(1.0)
    algorithm.config = Config(shared=shared, epochs=1, clip=0.0, normalise_advantage=False, net=Net((8,)), lambda_=0.0)
    positive = Batch(
        same.observation, same.action, same.reward.abs() + 100, same.next_observation,
        torch.ones_like(same.terminated), same.truncated, same.valid, same.extras,
    )  # fmt: skip
    assert algorithm.update(positive)["clip_fraction"] == 1.0
    after = algorithm.policy.act(np.ones((1, 1), np.float32), True)[1]["log_prob"]
    assert (before != after).any() == shared


def test_the_successors_value_is_asked_only_where_an_episode_does_not_go_on() -> None:
    class Two(probes.Endless):
        observation_space = Dict(a=Box(-1, 1, (1,)), b=Box(-1, 1, (2,)))  # type: ignore[assignment]  # wider than Probe's

        def observation(self) -> Any:
            return {"a": np.full(1, self.time / 5, np.float32), "b": np.zeros(2, np.float32)}

    algorithm = build(make=Two, rollout_steps=16, gamma=0.9, lambda_=0.0)
    (batch,) = probes.batches(probes.vector(Two, 3), algorithm, 1)
    rows, _ = algorithm._rows(batch)
    # lambda 0: the target is r + gamma V(s'), with V of the true successor, by brute force.
    with torch.no_grad():
        successor = algorithm.policy.net.value(batch.next_observation.flatten(0, 1))
    torch.testing.assert_close(rows.target, 1.0 + 0.9 * successor)


def test_a_box_is_drawn_with_the_deviation_asked_for() -> None:
    box = Box(-1.0, 1.0, (3,))
    algorithm = PPO(Config(initial_log_std=-2.0), box, box, 0)
    drawn, _ = algorithm.policy.act(np.zeros((4_000, 3), np.float32), generator=torch.Generator().manual_seed(0))
    assert drawn.std(0) == pytest.approx(np.exp(-2.0), rel=0.05)
    PPO(Config(initial_log_std=-2.0), box, probes.Imitate.action_space, 0)  # choices have none


@pytest.mark.parametrize("module", [ppo, appo])
def test_values_of_the_acting_pass_are_those_of_the_rollout(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = module.Config(rollout_steps=4, lr=0.0, shared=True, net=Net((16,), image="minatar"))
    algorithm = module.build(config, Seen.observation_space, Seen.action_space, 0)
    (batch,) = probes.batches(probes.vector(Seen, 3), algorithm, 1)
    given = batch.extras["value"]
    assert given.std() > 0
    passes: list[int] = []
    value = algorithm.policy.net.value
    monkeypatch.setattr(algorithm.policy.net, "value", lambda rows: (passes.append(len(rows)), value(rows))[1])
    torch.testing.assert_close(algorithm._rows(batch)[0].value, given.flatten())
    # Without lag the rows' own need no other pass: those of the successors of the last rows are all that is asked for.
    assert sum(passes) == (3 if module is ppo else 3 + 12)
    bare = dataclasses.replace(batch, extras={"log_prob": batch.extras["log_prob"]})
    torch.testing.assert_close(algorithm._rows(bare)[0].value, given.flatten())


def test_one_space_may_be_everything() -> None:
    class Image(probes.Probe):
        observation_space = Dict(eye=Box(0, 255, (36, 36, 1), np.uint8), arm=Box(-1, 1, (2,)))  # type: ignore[assignment]  # wider than Probe's
        action_space: gymnasium.Space[Any] = Dict(arm=Box(-1, 1, (2,)))

        def observation(self) -> Any:
            return {"eye": np.zeros((36, 36, 1), np.uint8), "arm": np.zeros(2, np.float32)}

        def step(self, action: Any) -> Any:
            return self.observation(), 1.0, True, False, {}

    algorithm = build(make=Image, rollout_steps=8, shared=True)
    (batch,) = probes.batches(probes.vector(Image, 2), algorithm, 1)
    assert np.isfinite(algorithm.update(batch)["entropy"])
