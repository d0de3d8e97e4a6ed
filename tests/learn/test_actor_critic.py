"""The policy that the actor-critics share: recurrence, masks and models of the user's own, in each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from learn import probes
from learn.test_recurrent import Recall
from learn.training import train
from torch import Tensor, nn

from longrein.errors import SpecError
from longrein.lab.actor import Actor
from longrein.learn import algorithms
from longrein.learn.actor_critic import ActorCriticPolicy, successor_values
from longrein.learn.algorithms import Algorithm
from longrein.learn.batch import Batch
from longrein.learn.replay import Memory
from longrein.learn.rollout import Rollout
from longrein.learn.torsos import Net

MEMORY = Net((16,), recurrent="lstm", recurrent_size=16)
EACH = {
    "a2c": {"rollout_steps": 20},
    "a3c": {"rollout_steps": 20},
    "reinforce": {"rollout_steps": 20, "episodes_per_update": 8},
    "impala": {
        "rollout_steps": 20,
        "replay_ratio": 1.0,
        "fresh_fraction": 0.25,
        "memory": Memory(capacity=2_000, batch_size=8, min_size=60),
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def collected(envs: SyncVectorEnv, algorithm: Algorithm, steps: int) -> Batch:
    """The third rollout: its first rows are in the midst of episodes."""
    actor = Actor(envs, algorithm.policy, seed=5, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        rollout = Rollout(steps)
        for transition in actor.collect(steps):
            rollout.add(transition)
        batch = rollout.take()
    return batch


def recalls(mode: AutoresetMode) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Recall(3, jitter=3)] * 3, autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("shared", [False, True])
def test_a_recurrent_rollout_at_once_equals_step_by_step(mode: AutoresetMode, shared: bool) -> None:
    algorithm = _built("a2c", Recall.observation_space, Recall.action_space, net=MEMORY, shared=shared)
    batch = collected(recalls(mode), algorithm, 13)
    policy = algorithm.policy
    assert isinstance(policy, ActorCriticPolicy)
    distribution, value, all_values, next_value = policy.rollout(batch)
    # The actor stored its state with every row: from there, one step at a time.
    log_probs, state = [], batch.extras["state"]
    for t in range(13):
        numbers, _ = policy.net.act(batch.observation[t], state[t])
        log_probs.append(policy.form.distribution(numbers, None).log_prob(batch.action[t]))
    expected = torch.stack(log_probs)[batch.valid]
    torch.testing.assert_close(distribution.log_prob(batch.action[batch.valid]), expected)
    torch.testing.assert_close(all_values[batch.valid], value.detach())
    # Where the episode goes on, the successor is the next row; and where it terminated, there is none.
    goes_on = (~batch.done & batch.valid)[:-1] & batch.valid[1:]
    torch.testing.assert_close(next_value[:-1][goes_on], all_values[1:][goes_on])
    assert not next_value[batch.terminated | ~batch.valid].any()
    assert next_value[-1].any()


@pytest.mark.parametrize("name", EACH)
def test_a_hole_in_a_recurrent_rollout_changes_nothing(name: str) -> None:
    made = [_built(name, Recall.observation_space, Recall.action_space, net=MEMORY) for _ in range(2)]
    batch = collected(recalls(AutoresetMode.SAME_STEP), made[0], 20)
    valid = batch.valid.clone()
    valid[7, 1] = False
    seen = batch.observation.clone()
    seen[7, 1] = torch.nan
    clean, dirty = dataclasses.replace(batch, valid=valid), dataclasses.replace(batch, valid=valid, observation=seen)
    assert str(made[0].update(clean)) == str(made[1].update(dirty))
    one, two = (algorithm.state_dict()["policy"].values() for algorithm in made)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", EACH)
def test_only_a_recurrent_net_solves_what_must_be_remembered(name: str) -> None:
    settings = EACH[name] | {
        "gamma": 0.95, "lr": 5e-3, "optimizer": "adam", "entropy_weight": 0.01,
        "net": {"hidden": [16], "recurrent": "gru", "recurrent_size": 16},
    }  # fmt: skip
    trained = train(name, settings, Recall, env_steps=40_000, num_envs=8, target=0.9)
    assert trained.reached is not None, trained


class Masked(probes.Probe):
    """Three options, of which action 2 is best and forbidden where the observation is -1."""

    observation_space = Dict(seen=Box(-1.0, 1.0, (1,)), action_mask=MultiBinary(3))  # type: ignore[assignment]
    action_space = Discrete(3)

    def first(self) -> float:
        return float(self.np_random.choice([-1.0, 1.0]))

    def observation(self) -> Any:
        mask = np.array([1, 1, self.seen > 0], np.int8)
        return {"seen": np.array([self.seen], np.float32), "action_mask": mask}

    def step(self, action: Any) -> probes.Step:
        assert action < 2 or self.seen > 0, "a forbidden action"
        return self.observation(), float(action), True, False, {}


@pytest.mark.parametrize("name", EACH)
def test_a_forbidden_action_is_never_taken(name: str) -> None:
    algorithm = _built(name, Masked.observation_space, Masked.action_space, net=Net((16,)), lr=5e-3, optimizer="adam")
    envs = probes.vector(Masked)
    probes.batches(envs, algorithm, 60)
    observation = {"seen": np.array([[-1.0], [1.0]], np.float32), "action_mask": np.array([[1, 1, 0], [1, 1, 1]])}
    assert algorithm.policy.act(algorithm.policy.encode(observation), True)[0].tolist() == [1, 2]


def two_heads(observation_space: Any, action_space: Any) -> nn.Module:
    """A model of a user's own."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(1, 16), nn.Tanh())
            self.logits, self.worth = nn.Linear(16, 2), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            features = self.body(x)
            return self.logits(features), self.worth(features)

    return Heads()


@pytest.mark.parametrize("name", EACH)
def test_a_model_of_ones_own_learns(name: str) -> None:
    probe = probes.Imitate
    net = Net(model_maker=two_heads)
    algorithm = _built(name, probe.observation_space, probe.action_space, net=net, lr=5e-3, optimizer="adam")
    probes.batches(probes.vector(probe), algorithm, 80)
    rows = np.array([[-1.0], [1.0]], np.float32)
    assert algorithm.policy.act(rows, True)[0].tolist() == [0, 1]
    with pytest.raises(SpecError, match="layers"):
        algorithm.policy.torso  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", EACH)
def test_actions_in_parts(name: str) -> None:
    class Parts(probes.Probe):
        action_space = Tuple((Discrete(2), Box(-1, 1, (2,))))

        def step(self, action: Any) -> probes.Step:
            assert self.action_space.contains(action)
            return self.observation(), float(action[0]), True, False, {}

    envs = SyncVectorEnv([Parts] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    algorithm = _built(name, Parts.observation_space, Parts.action_space)
    probes.batches(envs, algorithm, 3)


@pytest.mark.parametrize("seed", range(8))
def test_values_of_successors_are_those_of_a_pass_over_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def flags(share: float) -> Tensor:
        return torch.rand(7, 3, generator=generator) < share

    terminated, truncated, valid = flags(0.2), flags(0.2), ~flags(0.15)
    observation, following = (torch.randn(7, 3, 1, generator=generator) for _ in range(2))
    goes_on = ~(terminated | truncated)[:-1] & valid[:-1] & valid[1:]
    following[:-1] = torch.where(goes_on.unsqueeze(-1), observation[1:], following[:-1])
    batch = Batch(observation, torch.zeros(7, 3), torch.zeros(7, 3), following, terminated, truncated, valid)
    policy = ActorCriticPolicy(Box(-1, 1, (1,)), Discrete(2), Net((8,)), generator=generator)
    with torch.no_grad():
        value = policy.value(observation.flatten(0, 1)).view(7, 3)
        every = policy.value(following.flatten(0, 1)).view(7, 3)
    asked = valid & ~terminated
    got = successor_values(policy.value, batch, value)
    torch.testing.assert_close(got[asked], every[asked])
    assert not got[~asked].any()


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_torso_is_one(shared: bool) -> None:
    policy = ActorCriticPolicy(Box(-1, 1, (1,)), Discrete(2), Net((8,)), shared=shared)
    _, value = policy.evaluate(torch.zeros(1, 1))
    gradients = torch.autograd.grad(value.sum(), list(policy.torso.parameters()), allow_unused=True)
    assert all((gradient is not None) == shared for gradient in gradients)
    torch.testing.assert_close(policy.value(torch.ones(3, 1)), policy.evaluate(torch.ones(3, 1))[1])


def _built(name: str, observation_space: Any, action_space: Any, **settings: Any) -> Algorithm:
    config_class, build = algorithms.load(name)
    small = EACH[name] | settings
    return build(config_class(**small), observation_space, action_space, 0)
