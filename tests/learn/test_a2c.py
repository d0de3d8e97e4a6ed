"""A2C: its gradient worked by brute force, its switches, its probes, and what invalid rows must not do."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from learn import probes
from learn.test_returns import Case, brute_gae, brute_n_step, random_case

from longrein.errors import SpecError
from longrein.learn import algorithms
from longrein.learn.algorithms.a2c import A2C, Config
from longrein.learn.batch import Batch
from longrein.learn.imitation import SelfImitation
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

SMALL = Net(hidden=(16,))
FAST: dict[str, Any] = {
    "rollout_steps": 5, "gamma": 0.8, "lr": 5e-3, "optimizer": "adam", "entropy_weight": 1e-3, "net": SMALL,
}  # fmt: skip
SWITCHES: list[dict[str, Any]] = [
    {},
    {"advantage": "gae", "lambda_": 0.9, "normalise_advantage": True},
    {"shared": True, "optimizer": "rmsprop_tf", "lr": 2e-2},
    {"episodic": True, "episodes_per_update": 16},
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(probe: type[probes.Probe] = probes.Imitate, seed: int = 0, **settings: Any) -> A2C:
    return A2C(Config(**FAST | settings), probe.observation_space, probe.action_space, seed)


def trained(probe: type[probes.Probe], updates: int = 250, **settings: Any) -> A2C:
    algorithm = make(probe, **settings)
    probes.batches(probes.vector(probe), algorithm, updates)
    return algorithm


def values(algorithm: A2C, *observations: float) -> list[float]:
    with torch.no_grad():
        return algorithm.policy.value(torch.tensor(observations).unsqueeze(1)).tolist()  # type: ignore[no-any-return]


def choices(algorithm: A2C, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    return algorithm.policy.act(rows, deterministic=True)[0].reshape(-1).tolist()  # type: ignore[no-any-return]


def random_batch(case: Case, seed: int = 0) -> Batch:
    """Rows whose observations lead to each other where the episode goes on, as an actor's do."""
    generator = torch.Generator().manual_seed(seed)
    steps, envs = case["reward"].shape
    observation = torch.randn(steps, envs, 1, generator=generator)
    following = torch.randn(steps, envs, 1, generator=generator)
    goes_on = ~(case["terminated"] | case["truncated"])[:-1] & case["valid"][:-1] & case["valid"][1:]
    following[:-1] = torch.where(goes_on.unsqueeze(-1), observation[1:], following[:-1])
    action = torch.randint(0, 2, (steps, envs), generator=generator)
    flags = (case["terminated"], case["truncated"], case["valid"])
    return Batch(observation, action, case["reward"].float(), following, *flags)


# -------------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("advantage", ["n_step", "gae"])
def test_the_gradient_is_that_of_the_sum_over_rows(advantage: str, seed: int) -> None:
    case = random_case(seed, 6, 2)
    case["valid"][2, 1] = True  # at least one row
    batch = random_batch(case, seed)
    settings = {"advantage": advantage, "lambda_": 0.7, "optimizer": "sgd", "lr": 1.0, "max_grad_norm": 1e9}
    algorithm = make(seed=seed, **settings, entropy_weight=0.3, value_weight=0.8)
    before = [p.detach().clone() for p in algorithm.policy.parameters()]

    policy = algorithm.policy
    with torch.no_grad():
        case["value"] = policy.value(batch.observation.flatten(0, 1)).view(6, 2).double()
        case["next_value"] = policy.value(batch.next_observation.flatten(0, 1)).view(6, 2).double()
    if advantage == "gae":
        target = brute_gae(case, 0.8, 0.7) + case["value"]
    else:
        target = brute_n_step(case, 0.8)
    loss, rows = torch.zeros(()), 0
    for t in range(6):
        for b in range(2):
            if batch.valid[t, b]:
                distribution, value = policy.evaluate(batch.observation[t, b].unsqueeze(0))
                log_prob = distribution.log_prob(batch.action[t, b].unsqueeze(0))
                error = target[t, b].float() - value
                loss = loss - (log_prob * error.detach() - 0.8 * 0.5 * error**2 + 0.3 * distribution.entropy()).sum()
                rows += 1
    gradients = torch.autograd.grad(loss / rows, list(policy.parameters()))

    algorithm.update(batch)
    for parameter, start, gradient in zip(policy.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(start - parameter, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("advantage", ["n_step", "gae"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("entropy_weight", [0.0, 0.3])
def test_few_rows_by_numpy_are_learnt_from_as_by_torch(
    advantage: str, normalise: bool, entropy_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"advantage": advantage, "normalise_advantage": normalise, "entropy_weight": entropy_weight}
    found: list[list[Any]] = []
    for quick in (True, False):
        if not quick:
            monkeypatch.setattr("longrein.learn.algorithms.a2c.quick_chains", lambda *_: None)
        algorithm = make(**settings, max_grad_norm=0.05)
        measured = [algorithm.update(random_batch(random_case(seed, 6, 2), seed)) for seed in range(5)]
        found.append([measured, *algorithm.policy.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- probes


def test_probe_constant_reward() -> None:
    assert values(trained(probes.OneReward, 150), 0.0) == pytest.approx([1.0], abs=0.05)


def test_probe_reward_of_the_observation() -> None:
    assert values(trained(probes.RewardOfObservation), -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.15)


def test_probe_discount_over_two_steps() -> None:
    assert values(trained(probes.LaterReward), 0.0, 1.0) == pytest.approx([0.8, 1.0], abs=0.05)


def test_probe_reward_of_the_action() -> None:
    assert choices(trained(probes.RewardOfAction, 100), 0.0) == [1]


@pytest.mark.parametrize("switched", SWITCHES, ids=str)
def test_probe_action_by_the_observation(switched: dict[str, Any]) -> None:
    assert choices(trained(probes.Imitate, **switched), -1.0, 1.0) == [0, 1]


def test_probe_continuous_action() -> None:
    assert choices(trained(probes.Aim, 500), 0.0) == pytest.approx([0.5], abs=0.2)


@pytest.mark.parametrize("switched", SWITCHES, ids=str)
def test_probe_time_limit_keeps_the_bootstrap(switched: dict[str, Any]) -> None:
    # 1 / (1 - 0.8) = 5; taking the limit for an end would give at most (1 - 0.8^5) / 0.2 = 3.4.
    assert values(trained(probes.Endless, 500, **switched), 0.0) == pytest.approx([5.0], abs=0.3)


# -------------------------------------------------------------------------------------------------------------- masks


def poisoned(batch: Batch) -> tuple[Batch, Batch]:
    """The batch with one column's middle row invalid: as it was otherwise, and with nonsense in that row."""
    fields = {name: getattr(batch, name).clone() for name in Batch.__slots__[:7]}
    fields["valid"][2, 0] = False
    clean = Batch(**{name: tensor.clone() for name, tensor in fields.items()})
    fields["reward"][2, 0] = 1e9
    fields["observation"][2, 0] = torch.nan
    fields["next_observation"][2, 0] = -1e9
    return clean, Batch(**fields)


@pytest.mark.parametrize(
    "switched",
    [*SWITCHES, {"imitation": SelfImitation(min_size=8, updates_per_step=0.1)}, {"scale_reward": True}],
    ids=str,
)
def test_an_invalid_row_changes_nothing(switched: dict[str, Any]) -> None:
    made = probes.batches(probes.vector(probes.Imitate), make(), 3)
    one, two = make(seed=3, **switched), make(seed=3, **switched)
    for batch in made:
        clean, dirty = poisoned(batch)
        assert str(one.update(clean)) == str(two.update(dirty))
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()
    assert one.env_steps == 3 * (8 * 5 - 1)


def test_scaled_rewards_are_the_same_whatever_their_unit() -> None:
    made = probes.batches(probes.vector(probes.Imitate), make(), 3)
    one, two = (make(scale_reward=True) for _ in range(2))
    for batch in made:
        one.update(batch)
        two.update(dataclasses.replace(batch, reward=1000.0 * batch.reward))
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_batch_without_a_valid_row_is_refused() -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), make(), 1)
    with pytest.raises(ValueError, match="no row"):
        make().update(dataclasses.replace(batch, valid=torch.zeros_like(batch.valid)))


# ----------------------------------------------------------------------------------------------------------- settings


def test_schedules_follow_env_steps() -> None:
    algorithm = make(lr=Linear(1e-3, 0.0, 80), entropy_weight=Linear(0.1, 0.0, 40))
    (batch,) = probes.batches(probes.vector(probes.Imitate), make(), 1)
    told = [algorithm.update(batch) for _ in range(3)]
    assert [row["lr"] for row in told] == pytest.approx([1e-3, 5e-4, 0.0])
    assert [row["entropy_weight"] for row in told] == pytest.approx([0.1, 0.0, 0.0])


@pytest.mark.parametrize("switched", [{}, {"episodic": True, "episodes_per_update": 30}], ids=str)
def test_metrics_have_the_same_names_each_time(switched: dict[str, Any]) -> None:
    algorithm = make(imitation=SelfImitation(min_size=8), **switched)
    (batch,) = probes.batches(probes.vector(probes.LaterReward), make(probes.LaterReward), 1)
    names = [list(algorithm.update(batch)) for _ in range(4)]
    assert all(row == names[0] for row in names)


@pytest.mark.parametrize(
    "switched",
    [*SWITCHES, {"imitation": SelfImitation(min_size=8, updates_per_step=0.1)}, {"scale_reward": True}],
    ids=str,
)
def test_going_on_from_a_save_is_going_on(switched: dict[str, Any], tmp_path: Any) -> None:
    made = probes.batches(probes.vector(probes.LaterReward), make(probes.LaterReward), 6)
    one, two = make(seed=1, **switched), make(seed=2, **switched)
    for batch in made[:3]:
        one.update(batch)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in made[3:]:
        assert str(one.update(batch)) == str(two.update(batch))
    assert all(torch.equal(a, b) for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True))


def test_sections_come_from_plain_values() -> None:
    plain = {"imitation": {"capacity": 900}, "net": {"hidden": [8]}, "optimizer_settings": {"alpha": 0.9}}
    config = algorithms.config_from(Config, plain)
    assert config.imitation == SelfImitation(capacity=900)
    assert config.net == Net(hidden=(8,))
    assert algorithms.config_from(Config, dataclasses.asdict(config)) == config
    assert A2C(config, Box(-1, 1, (1,)), Discrete(2), 0).optimizer.param_groups[0]["alpha"] == 0.9


def test_wrong_settings_are_named() -> None:
    for settings, name in (
        ({"gamma": 1.5}, "gamma"), ({"advantage": "td"}, "advantage"), ({"episodes_per_update": 0}, "episodes_per"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=rf"a2c\.{name}"):
            Config(**settings)
    with pytest.raises(SpecError, match="did you mean 'capacity'"):
        algorithms.config_from(Config, {"imitation": {"capasity": 3}})
    with pytest.raises(SpecError, match="recurrent"):
        make(net=Net(recurrent="gru"), imitation=SelfImitation())
    with pytest.raises(SpecError, match="no optimizer"):
        make(optimizer="adan")
    with pytest.raises(SpecError, match="action_space"):
        A2C(Config(), Box(-1, 1, (1,)), gymnasium.spaces.Text(3), 0)
