"""What every algorithm of the table must do, and what PPO must do beyond it."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from learn import probes

from longrein.errors import SpecError
from longrein.learn import algorithms
from longrein.learn.algorithms import Algorithm
from longrein.learn.algorithms.ppo import PPO, Config
from longrein.learn.batch import Batch
from longrein.learn.schedules import Exponential, Linear
from longrein.learn.torsos import Net

EVERY = sorted(algorithms.TABLE)
SPACES: list[gymnasium.Space[Any]] = [Discrete(3), MultiDiscrete([2, 3]), MultiBinary(2), Box(-1, 1, (2,))]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(name: str, seed: int = 0, make: type[probes.Probe] = probes.Imitate, **settings: Any) -> Algorithm:
    config_class, build_ = algorithms.load(name)
    small = probes.SMALL.get(name, {}) | settings
    return build_(config_class(**small), make.observation_space, actions_for(name, make), seed)


def actions_for(name: str, make: type[probes.Probe]) -> gymnasium.Space[Any]:
    """The probe's own action space, or another where the algorithm cannot act in that."""
    allowed = import_module(algorithms.TABLE[name]).ACTION_SPACES
    return make.action_space if isinstance(make.action_space, allowed) else probes.Aim.action_space


def probe_for(name: str) -> type[probes.Probe]:
    """A probe that the algorithm can act in."""
    allowed = import_module(algorithms.TABLE[name]).ACTION_SPACES
    return probes.Imitate if isinstance(probes.Imitate.action_space, allowed) else probes.Aim


def weights(algorithm: Algorithm) -> list[torch.Tensor]:
    policy = algorithm.state_dict()["policy"]
    return [tensor.clone() for tensor in policy.values()]


def same(one: Algorithm, other: Algorithm) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_no_schedule_goes_below_0(name: str) -> None:
    config_class, _ = algorithms.load(name)
    sections = [config_class()]
    sections += [value for value in vars(sections[0]).values() if dataclasses.is_dataclass(value)]
    for section in sections:
        for key, hint in get_type_hints(type(section)).items():
            if Linear in get_args(hint):
                for wrong in (-1.0, Linear(1.0, -0.1, 10), Exponential(-0.1, 1.0, 10)):
                    with pytest.raises(SpecError, match=rf"\.{key}: must .*, got {re.escape(str(wrong))}"):
                        dataclasses.replace(section, **{key: wrong})


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_weights_to_the_bit(name: str) -> None:
    one, two, other = build(name, 1), build(name, 1), build(name, 2)
    for algorithm in (one, two, other):
        probes.batches(probes.vector(probe_for(name)), algorithm, 2)
    assert same(one, two)
    assert name in probes.LEARNS_NOTHING or not same(one, other)


@pytest.mark.parametrize("name", EVERY)
def test_going_on_from_a_save_is_going_on(name: str, tmp_path: Path) -> None:
    one = build(name, 1)
    probes.batches(probes.vector(probe_for(name)), one, 2)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two = build(name, 99)
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for algorithm in (one, two):
        probes.batches(probes.vector(probe_for(name)), algorithm, 2, seed=5)
    assert same(one, two)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_it_acts_and_learns_in_each_space(name: str, space: gymnasium.Space[Any]) -> None:
    class Anything(probes.Probe):
        observation_space = Dict(a=Box(-1, 1, (2,)), b=Discrete(3))  # type: ignore[assignment]  # wider than Probe's
        action_space = space

        def observation(self) -> Any:
            return {"a": np.zeros(2, np.float32), "b": 1}

        def step(self, action: Any) -> Any:
            assert space.contains(action)
            self.time += 1
            return self.observation(), 0.5, self.time == 3, False, {}

    config_class, build_ = algorithms.load(name)
    config = config_class(**probes.SMALL.get(name, {}))
    envs = probes.vector(Anything, 2)
    if not isinstance(space, import_module(algorithms.TABLE[name]).ACTION_SPACES):
        with pytest.raises(SpecError, match="action_space"):
            build_(config, envs.single_observation_space, envs.single_action_space, 0)
        return
    algorithm = build_(config, envs.single_observation_space, envs.single_action_space, 0)
    before = weights(algorithm)
    probes.batches(envs, algorithm, 1)
    changed = any(not torch.equal(a, b) for a, b in zip(before, weights(algorithm), strict=True))
    assert changed != (name in probes.LEARNS_NOTHING)
    observation = algorithm.policy.encode(envs.reset(seed=0)[0])
    action, _ = algorithm.policy.act(observation, deterministic=True)
    envs.step(algorithm.policy.for_env(action))


@pytest.mark.parametrize("name", EVERY)
def test_deterministic_actions_draw_nothing(name: str) -> None:
    policy = build(name).policy
    observation = np.linspace(-1, 1, 6, dtype=np.float32).reshape(6, 1)
    before = torch.get_rng_state()
    assert np.array_equal(policy.act(observation, True)[0], policy.act(observation, True)[0])
    policy.act(observation, False, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", EVERY)
def test_every_setting_is_documented(name: str) -> None:
    config_class, _ = algorithms.load(name)
    page = (Path(__file__).parents[2] / "docs" / "algorithms" / f"{name}.md").read_text()
    for field in dataclasses.fields(config_class):
        assert f"`{field.name}`" in page, field.name


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'ppo'"):
        algorithms.load("pp0")
    with pytest.raises(SpecError, match="did you mean 'gamma'"):
        algorithms.config_from(Config, {"gama": 0.9})


def test_a_config_comes_back_from_plain_values() -> None:
    config = Config(lr=Linear(1.0, 0.0, 10), net=Net(hidden=(8,)))
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    assert algorithms.config_from(Config, plain) == config
    assert algorithms.config_from(Config, {"lr": {"linear": [1.0, 0.0, 10]}}).lr == Linear(1.0, 0.0, 10)


# ---------------------------------------------------------------------------------------------------------------- PPO

FAST = {
    "rollout_steps": 32, "minibatch_size": 64, "epochs": 4, "lr": 5e-3, "gamma": 0.8, "lambda_": 0.9,
    "net": Net(hidden=(16,)),
}  # fmt: skip


def trained(make: type[probes.Probe], updates: int = 40, **settings: Any) -> PPO:
    envs = probes.vector(make)
    algorithm = PPO(Config(**FAST | settings), envs.single_observation_space, envs.single_action_space, 0)
    probes.batches(envs, algorithm, updates)
    return algorithm


def values(algorithm: PPO, *observations: float) -> list[float]:
    inputs, _ = algorithm.policy.split(torch.tensor(observations).unsqueeze(1))
    with torch.no_grad():
        return algorithm.policy.net.value(inputs).tolist()  # type: ignore[no-any-return]  # torch says Any


def choices(algorithm: PPO, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].reshape(-1).tolist()  # type: ignore[no-any-return]


def test_probe_constant_reward() -> None:
    assert values(trained(probes.OneReward), 0.0) == pytest.approx([1.0], abs=0.05)


def test_probe_reward_of_the_observation() -> None:
    assert values(trained(probes.RewardOfObservation), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.1)


def test_probe_discount_over_two_steps() -> None:
    assert values(trained(probes.LaterReward), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


def test_probe_reward_of_the_action() -> None:
    assert choices(trained(probes.RewardOfAction), 0.0) == [1]


def test_probe_action_by_the_observation() -> None:
    assert choices(trained(probes.Imitate), -1.0, 1.0) == [0, 1]


@pytest.mark.parametrize("switched", [{}, {"normalise_observation": True, "scale_reward": True, "value_clip": 0.5}])
def test_probe_continuous_action(switched: dict[str, Any]) -> None:
    assert choices(trained(probes.Aim, 60, **switched), 0.0) == pytest.approx([0.5], abs=0.15)


def test_probe_time_limit_keeps_the_bootstrap() -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(probes.Endless, 60), 0.0) == pytest.approx([5.0], abs=0.25)


def poisoned(batch: Batch) -> Batch:
    """The batch with one column's middle row invalid, and nonsense in it."""
    fields = {name: getattr(batch, name).clone() for name in Batch.__slots__[:7]}
    fields["valid"][5, 0] = False
    fields["reward"][5, 0] = 1e9
    fields["observation"][5, 0] = 1e9
    fields["next_observation"][5, 0] = -1e9
    extras = {"log_prob": batch.extras["log_prob"].clone()}
    extras["log_prob"][5, 0] = -1e9
    return Batch(**fields, extras=extras)


@pytest.mark.parametrize("switched", [{}, {"normalise_observation": True, "scale_reward": True}])
def test_an_invalid_row_changes_nothing(switched: dict[str, Any]) -> None:
    envs = probes.vector(probes.Imitate)
    (batch,) = probes.batches(envs, build("ppo", **FAST), 1)
    dirty = poisoned(batch)
    clean = Batch(
        **{name: getattr(batch, name) for name in Batch.__slots__[:6]}, valid=dirty.valid, extras=batch.extras
    )
    one, two = build("ppo", 3, **FAST | switched), build("ppo", 3, **FAST | switched)
    assert one.update(dirty) == two.update(clean)
    assert same(one, two)
    assert one.state_dict()["env_steps"] == 8 * 32 - 1


def test_a_batch_without_a_valid_row_is_refused() -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build("ppo", **FAST), 1)
    nothing = torch.zeros_like(batch.valid)
    void = Batch(**{name: getattr(batch, name) for name in Batch.__slots__[:6]}, valid=nothing, extras=batch.extras)
    with pytest.raises(ValueError, match="no row"):
        build("ppo").update(void)
    with pytest.raises(ValueError, match="log_prob"):
        build("ppo").update(dataclasses.replace(batch, extras={}))


@pytest.mark.parametrize("space", [Discrete(3), Box(-1, 1, (2,))], ids=str)
def test_the_first_minibatch_has_ratio_one(space: gymnasium.Space[Any]) -> None:
    class Free(probes.Probe):
        action_space = space

        def step(self, action: Any) -> Any:
            return self.observation(), 1.0, True, False, {}

    settings = {"epochs": 1, "minibatch_size": 10**6, "normalise_observation": True, "rollout_steps": 16}
    algorithm = PPO(Config(**settings), Free.observation_space, space, 0)
    envs = probes.vector(Free)
    for batch in probes.batches(envs, algorithm, 2):
        assert batch.valid.all()
    # The third rollout is made with the statistics of the first two, and must be learnt from with the same.
    fresh = PPO(Config(**settings), Free.observation_space, space, 0)
    fresh.load_state_dict(algorithm.state_dict())
    (batch,) = probes.batches(envs, fresh, 1)
    assert algorithm.update(batch)["approx_kl"] == pytest.approx(0.0, abs=1e-6)


def test_kl_beyond_the_limit_ends_the_update() -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), build("ppo", 1, **FAST), 1)
    free, bound = (build("ppo", 1, **FAST | {"lr": 0.1, "target_kl": limit}) for limit in (None, 1e-3))
    assert free.update(batch)["minibatches"] == 4 * 4
    assert bound.update(batch)["minibatches"] < 4 * 4


def test_a_remainder_is_spread_over_the_minibatches() -> None:
    # 256 rows by at most 100: three pieces of about 85, not two of 100 and one of 56.
    (batch,) = probes.batches(probes.vector(probes.Imitate), build("ppo", **FAST), 1)
    assert build("ppo", **FAST | {"minibatch_size": 100, "epochs": 1}).update(batch)["minibatches"] == 3


def test_schedules_follow_env_steps() -> None:
    algorithm = build("ppo", **FAST | {"lr": Linear(1.0e-3, 0.0, 512)})
    rates = []
    (batch,) = probes.batches(probes.vector(probes.Imitate), build("ppo", **FAST), 1)
    for _ in range(3):
        rates.append(algorithm.update(batch)["lr"])
    assert rates == pytest.approx([1e-3, 5e-4, 0.0])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SpecError, match=r"ppo\.gamma"):
        Config(gamma=1.5)
    with pytest.raises(SpecError, match=r"ppo\.epochs"):
        Config(epochs=0)
    with pytest.raises(SpecError, match="tanh"):
        build("ppo", net=Net(activation="tahn"))
