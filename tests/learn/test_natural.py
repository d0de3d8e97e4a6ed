"""K-FAC in the optimizer's place: the step by hand, in A2C, A3C, ACER and IMPALA, on probes, saved, and from specs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learn import a3c_worker, probes
from torch import nn

from longrein.errors import SpecError
from longrein.lab import spec as specs
from longrein.learn import algorithms, losses
from longrein.learn.algorithms import a3c
from longrein.learn.batch import Batch
from longrein.learn.imitation import SelfImitation
from longrein.learn.natural import NaturalGradient
from longrein.learn.replay import Memory
from longrein.learn.schedules import Linear
from longrein.learn.torsos import Net

REPLAY: dict[str, Any] = {"replay_ratio": 1.0, "memory": Memory(capacity=2_000, batch_size=8, min_size=100)}
FAST: dict[str, dict[str, Any]] = {
    "a2c": {},
    "a3c": {},
    "impala": REPLAY,
    "acer": REPLAY | {"trust_region": None},
}
EVERY = sorted(FAST)
NATURAL = NaturalGradient(kl_clip=0.02)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(
    name: str, probe: type[probes.Probe] = probes.Imitate, seed: int = 0, natural: Any = NATURAL, **settings: Any
) -> Any:
    config_class, build = algorithms.load(name)
    config = config_class(**{
        "rollout_steps": 8, "gamma": 0.8, "entropy_weight": 0.0, "net": Net((16,)), "natural": natural,
    } | FAST[name] | settings)  # fmt: skip
    return build(config, probe.observation_space, probe.action_space, seed)


def trained(name: str, probe: type[probes.Probe], updates: int = 50, **settings: Any) -> Any:
    algorithm = make(name, probe, **settings)
    probes.batches(probes.vector(probe), algorithm, updates)
    return algorithm


def values(algorithm: Any, *observations: float) -> list[float]:
    with torch.no_grad():
        return algorithm.policy.value(torch.tensor(observations).unsqueeze(1)).tolist()  # type: ignore[no-any-return]


def choices(algorithm: Any, *observations: float) -> list[float]:
    rows = np.array(observations, np.float32).reshape(-1, 1)
    action = algorithm.policy.act(rows, deterministic=True)[0]
    return np.asarray(algorithm.policy.for_env(action)).reshape(-1).tolist()  # type: ignore[no-any-return]


def weights(algorithm: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in algorithm.policy.parameters()]


def same(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


# ------------------------------------------------------------------------------------------------------------ the step


def by_hand() -> Batch:
    """Two episodes of one step: s = 1 with reward 1, s = -1 with reward 3; the action is 1, and was as likely as 0."""
    seen, yes = torch.tensor([[[1.0], [-1.0]]]), torch.ones(1, 2, dtype=torch.bool)
    extras = {
        "log_prob": torch.full((1, 2), math.log(0.5)), "log_probs": torch.full((1, 2, 2), math.log(0.5)),
        "version": torch.zeros(1, 2, dtype=torch.int64),
    }  # fmt: skip
    return Batch(seen, yes.long(), torch.tensor([[1.0, 3.0]]), seen, yes, ~yes, yes, extras)


def at_zero(name: str, **settings: Any) -> Any:
    """A learner whose policy and critic are linear, with weights 0."""
    still = NaturalGradient(lr=0.1, momentum=0.0, cold_updates=0, damping=0.3, kl_clip=1e9, value_kl_clip=1e9)
    algorithm = make(name, natural=dataclasses.replace(still, **settings), net=Net(hidden=()))
    with torch.no_grad():
        for parameter in algorithm.policy.parameters():
            parameter.zero_()
    if name == "a3c":
        algorithm.shared.weights.zero_()
    return algorithm


@pytest.mark.parametrize("name", EVERY)
def test_the_step_is_the_inverse_fisher_matrix_times_the_gradient(name: str) -> None:
    # Logits W s + b are 0, so pi = (1/2, 1/2), V = 0. The loss's gradient of the logits of a row is
    # -1/2 R ((0, 1) - pi) = R (1/4, -1/4): (1, -1) / 4 and (3, -3) / 4. Of b that is (1, -1), of W (-1/2, 1/2).
    # Fisher: diag(pi) - pi pi^T = ((1, -1), (-1, 1)) / 4 in each state, whatever is drawn, times the mean of
    # (s, 1) (s, 1)^T, the identity. (1, -1) has the eigenvalue 1/2, so (F + 0.3)^-1 is 1 / 0.8 along it.
    algorithm = at_zero(name)
    told = algorithm.update(by_hand())
    actor = algorithm.policy.actor
    assert actor.bias.tolist() == pytest.approx([-0.125, 0.125])
    assert actor.weight.flatten().tolist() == pytest.approx([0.0625, -0.0625])
    # <G, dW> = (1 + 1 + 1/4 + 1/4) / 0.8, and half of 0.1^2 of it is the KL, damping included.
    assert told["predicted_kl"] == pytest.approx(0.5 * 0.01 * 2.5 / 0.8)
    assert told["nu"] == 1.0
    assert told["lr"] == 0.1


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_the_critic_moves_by_its_own_fisher_matrix(name: str, noise: float) -> None:
    # Half the mean of (V - R)^2: the gradient of the bias is -(1 + 3) / 2 = -2, of the weight -(1 - 3) / 2 = 1, over
    # the noise's square. Fisher: the identity times S, a mean over two draws that nobody can know by hand.
    algorithm = at_zero(name, value_noise=noise)
    algorithm.update(by_hand())
    critic, kfac = algorithm.policy.critic, algorithm.natural.kfacs[1]
    ((inputs, gradients),) = kfac.factors().values()
    torch.testing.assert_close(inputs, torch.eye(2))
    weight = getattr(algorithm.config, "value_weight", None) or algorithm.config.q_weight
    step = 0.1 * weight / noise**2 / (float(gradients[-1, -1]) + 0.3)
    assert critic.bias.tolist()[-1] == pytest.approx(2 * step)
    assert critic.weight.flatten().tolist()[-1] == pytest.approx(-step)
    if name == "acer":  # nothing was done with the other action, and nothing is learnt of it
        assert critic.bias[0] == critic.weight[0] == 0.0
        assert gradients[0].tolist() == [0.0, 0.0]


def test_the_critic_of_acer_is_a_gaussian_around_the_q_of_what_was_done() -> None:
    policy = make("acer").policy
    rows = torch.linspace(-1, 1, 6).unsqueeze(1)
    action = torch.tensor([0, 1, 1, 0, 0, 1])
    distribution, q = policy.model(rows, action, torch.Generator())
    torch.testing.assert_close(q, policy.critic(policy.critic_torso(rows))[torch.arange(6), action])
    torch.testing.assert_close(distribution.log_probs, policy.statistics(rows).log_softmax(-1))
    policy = make("acer", probes.Aim).policy
    _, q = policy.model(rows, torch.full((6, 1), 0.2), torch.Generator().manual_seed(0))
    _, again = policy.model(rows, torch.full((6, 1), 0.9), torch.Generator().manual_seed(0))
    assert q.shape == again.shape == (6,)
    assert not torch.allclose(q, again)


def test_an_older_policys_actions_are_no_statistics() -> None:
    # Whatever was done, and however likely it was then, the model draws its own.
    batch = by_hand()
    other = dataclasses.replace(batch, action=1 - batch.action, reward=9 * batch.reward)
    for name in ("a2c", "a3c", "impala"):
        one, two = make(name), make(name)
        one.update(batch)
        two.update(other)
        for first, second in zip(one.natural.kfacs, two.natural.kfacs, strict=True):
            for layer, pair in first.factors().items():
                assert all(torch.equal(a, b) for a, b in zip(pair, second.factors()[layer], strict=True))


def test_networks_that_share_nothing_have_a_trust_region_each() -> None:
    for name in EVERY:
        separate, shared = make(name), make(name, shared=True)
        assert [len(kfac.param_groups[0]["params"]) for kfac in separate.natural.kfacs] == [4, 4]
        assert [len(kfac.param_groups[0]["params"]) for kfac in shared.natural.kfacs] == [6]
        for algorithm in (separate, shared):
            moved = {id(p) for kfac in algorithm.natural.kfacs for group in kfac.param_groups for p in group["params"]}
            assert moved == {id(p) for p in algorithm.policy.parameters()}


def two_heads(space: Any, actions: Any) -> nn.Module:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.torso, self.numbers, self.value = nn.Linear(1, 8), nn.Linear(8, 2), nn.Linear(8, 1)

        def forward(self, rows: torch.Tensor) -> Any:
            features = torch.tanh(self.torso(rows))
            return self.numbers(features), self.value(features)

    return Heads()


@pytest.mark.parametrize("name", ["a2c", "impala"])
def test_a_model_of_the_users_own_is_one_network(name: str) -> None:
    algorithm = trained(name, probes.Imitate, net=Net(model_maker=two_heads))
    (kfac,) = algorithm.natural.kfacs
    assert len(kfac.factors()) == 3
    assert choices(algorithm, -1.0, 1.0) == [0, 1]


# ---------------------------------------------------------------------------------------------------------- A3C's part


def test_a_worker_moves_the_shared_weights_by_what_precondition_gives() -> None:
    one, twin = at_zero("a3c"), at_zero("a3c")
    batch = by_hand()
    policy, natural = twin.policy, twin.natural
    rows, reward = batch.observation[0], batch.reward[0]
    with natural.recording():
        natural.observe(*policy.evaluate(rows))
    distribution, value = policy.evaluate(rows)
    loss = losses.policy_gradient(distribution.log_prob(batch.action[0]), reward) + losses.value_loss(value, reward)
    for kfac in natural.kfacs:
        kfac.zero_grad()
    loss.backward()
    for kfac in natural.kfacs:
        kfac.precondition()
    one.update(batch)
    torch.testing.assert_close(one.shared.weights, -0.1 * torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert same(one, one.worker())


def test_what_others_did_meanwhile_stays() -> None:
    one = at_zero("a3c")
    two = one.worker()
    one.update(by_hand())
    two.update(by_hand())  # with weights from before the first's turn
    bias = one.shared.weights[2:4]
    assert bias.tolist() == pytest.approx([-0.25, 0.25])
    assert two.policy.actor.bias.tolist() == pytest.approx([-0.25, 0.25])


def test_a_worker_in_another_process_goes_on_with_its_statistics() -> None:
    one = make("a3c")
    probes.batches(probes.vector(probes.Imitate), one, 12)
    arrive, told = one.__reduce__()
    two = arrive(*told)
    assert two.shared is one.shared
    again = make("a3c", seed=4)
    again.load_state_dict(one.state_dict())
    for algorithm in (two, again):
        probes.batches(probes.vector(probes.Imitate), algorithm, 5)
    assert same(two, again)


def test_a_worker_runs_in_a_process_of_its_own() -> None:
    first = make("a3c")
    probes.batches(probes.vector(probes.Imitate, 2), first, 12)  # its statistics travel with it
    before = first.shared.weights.clone()
    process = torch.multiprocessing.get_context("spawn").Process(target=a3c_worker.run, args=(first, 20, 0))
    process.start()
    process.join(100)
    assert process.exitcode == 0
    assert first.env_steps == (12 + 20) * 8 * 2
    assert not torch.equal(before, first.shared.weights)


def test_workers_in_threads_learn_together() -> None:
    first = make("a3c")
    workers = [first, first.worker()]
    assert isinstance(workers[1], a3c.A3C)
    probes.train_in_threads(workers, 40, 8)
    first.refresh()
    assert choices(first, -1.0, 1.0) == [0, 1]


# -------------------------------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shared", [False, True])
def test_probe_action_and_value_by_the_observation(name: str, shared: bool) -> None:
    assert choices(trained(name, probes.Imitate, 40, shared=shared), -1.0, 1.0) == [0, 1]
    if not shared:
        algorithm = trained(name, probes.RewardOfObservation)
        assert values(algorithm, -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.15)


@pytest.mark.parametrize("name", EVERY)
def test_probe_continuous_action(name: str) -> None:
    # The rate falls: with a step of as much KL as the first, a mean is never still.
    natural = dataclasses.replace(NATURAL, lr=Linear(0.25, 0.0, 60 * 8 * 8), fallback_lr=0.02)
    algorithm = trained(name, probes.Aim, 60, natural=natural)
    assert choices(algorithm, 0.0) == pytest.approx([0.5], abs=0.2)
    if name != "acer":  # whose deviation is fixed unless it is asked to learn
        assert float(algorithm.policy.log_std.detach()) < -0.2  # which Adam moves: it is in no layer
        assert algorithm.natural.kfacs[0].others == ["2"]


def test_acer_learns_its_deviation_with_adam() -> None:
    algorithm = trained("acer", probes.Aim, 5, learn_sigma=True)
    assert algorithm.natural.kfacs[0].others == ["2"]
    assert float(algorithm.policy.log_std.detach()) != pytest.approx(math.log(0.3), abs=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_probe_time_limit_keeps_the_bootstrap(name: str) -> None:
    assert values(trained(name, probes.Endless, 60), 0.0) == pytest.approx([5.0], abs=0.4)


def test_imitation_takes_natural_steps_too() -> None:
    imitation = SelfImitation(capacity=500, batch_size=32, min_size=32, updates_per_step=0.05)
    algorithm = make("a2c", imitation=imitation, episodic=True, episodes_per_update=10**6)  # nothing else learns
    start = weights(algorithm)
    probes.batches(probes.vector(probes.Imitate), algorithm, 8)
    assert not all(torch.equal(a, b) for a, b in zip(start, weights(algorithm), strict=True))
    assert algorithm.updates == 0
    assert algorithm.natural.kfacs[0].updates > 10  # beyond the cold phase
    assert algorithm.update(probes.batches(probes.vector(probes.Imitate), make("a2c"), 1)[0])["nu"] <= 1


# ------------------------------------------------------------------------------------------------- what it owes anyone


@pytest.mark.parametrize("name", EVERY)
def test_the_same_seed_gives_the_same_weights_to_the_bit(name: str) -> None:
    one, two, other = (trained(name, probes.Imitate, 14, seed=seed) for seed in (1, 1, 2))
    assert same(one, two)
    assert not same(one, other)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("updates", [4, 15])  # within the cold phase, and beyond
def test_going_on_from_a_save_is_going_on(name: str, updates: int, tmp_path: Path) -> None:
    one, two = make(name, probes.Aim, 1), make(name, probes.Aim, 99)
    probes.batches(probes.vector(probes.Aim), one, updates)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for algorithm in (one, two):
        probes.batches(probes.vector(probes.Aim), algorithm, 12, seed=5)
    assert same(one, two)


@pytest.mark.parametrize("name", EVERY)
def test_an_invalid_row_changes_nothing(name: str) -> None:
    (batch,) = probes.batches(probes.vector(probes.Imitate), make(name, natural=None), 1)
    columns = {field: getattr(batch, field).clone() for field in Batch.__slots__[:7]}
    columns["valid"][5, 0] = False
    clean = Batch(**columns, extras=batch.extras)
    columns = {field: tensor.clone() for field, tensor in columns.items()}
    extras = {field: tensor.clone() for field, tensor in batch.extras.items()}
    columns["reward"][5, 0] = 1e9
    columns["action"][5, 0] = 1 - columns["action"][5, 0]
    for tensor in (columns["observation"], columns["next_observation"], *extras.values()):
        if tensor.is_floating_point():
            tensor[5, 0] = torch.nan
    dirty = Batch(**columns, extras=extras)
    one, two = make(name, seed=3), make(name, seed=3)
    for _ in range(12):  # beyond the cold phase
        told, asked = one.update(dirty), two.update(clean)
        assert told == pytest.approx(asked, rel=0, abs=0, nan_ok=True)
    assert same(one, two)
    assert all(torch.isfinite(p).all() for p in one.policy.parameters())
    with pytest.raises(ValueError, match="no row"):
        one.update(dataclasses.replace(batch, valid=torch.zeros_like(batch.valid)))


@pytest.mark.parametrize("name", EVERY)
def test_without_it_nothing_is_drawn_and_nothing_is_told(name: str) -> None:
    plain = trained(name, probes.Imitate, 2, natural=None)
    assert plain.natural is None
    assert plain.state_dict()["natural"] is None
    (batch,) = probes.batches(probes.vector(probes.Imitate), make(name, natural=None), 1)
    assert "nu" not in plain.update(batch)


@pytest.mark.parametrize("name", EVERY)
def test_schedules_follow_env_steps(name: str) -> None:
    algorithm = make(name, natural=NaturalGradient(lr=Linear(1.0, 0.0, 128), kl_clip=Linear(0.01, 0.02, 64)))
    (batch,) = probes.batches(probes.vector(probes.Imitate), make(name, natural=None), 1)  # 64 rows
    clips = []
    for rate in (1.0, 0.5, 0.0):
        assert algorithm.update(batch)["lr"] == pytest.approx(rate)
        clips.append(algorithm.natural.kfacs[0].param_groups[0]["kl_clip"])
    assert clips == pytest.approx([0.01, 0.02, 0.02])


@pytest.mark.parametrize("name", EVERY)
def test_a_recurrent_net_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=rf"{name}\.natural.*recurrent"):
        make(name, net=Net(recurrent="gru"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr", 0.0), ("kl_clip", 0.0), ("value_kl_clip", -1.0), ("damping", 0.0), ("value_noise", 0.0),
     ("cold_updates", -1), ("inverse_every", 0), ("momentum", 1.0), ("statistics_decay", 1.0), ("fallback_lr", -1.0),
     ("max_grad_norm", 0.0)],
)  # fmt: skip
def test_wrong_settings_are_named(setting: str, value: float) -> None:
    with pytest.raises(SpecError, match=rf"natural\.{setting}"):
        NaturalGradient(**{setting: value})  # type: ignore[arg-type]


SPEC = """\
one:
  agent:
    algorithm: {name: NAME, natural: {damping: 0.2, lr: {linear: [0.25, 0, 1000]}}}
  env: {id: CartPole-v1}
"""


@pytest.mark.parametrize("name", EVERY)
def test_a_spec_says_it_and_what_is_shown_reads_back(name: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace("NAME", name))
    spec = specs.load(path)
    assert spec.agents[0].config.natural == NaturalGradient(damping=0.2, lr=Linear(0.25, 0.0, 1000))
    shown = tmp_path / "shown.yaml"
    shown.write_text(specs.as_yaml({"one": spec.plain}))
    assert specs.load(shown).fingerprint == spec.fingerprint
    # As a checkpoint has it: plain values.
    config_class, _ = algorithms.load(name)
    assert config_class(natural=specs.plain_config(spec.agents[0].config)["natural"]) == spec.agents[0].config


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("dampng: 0.2", r"natural\.dampng: there is no such key\n.*did you mean 'damping'"),
        ("damping: -1", r"natural\.damping: must be over 0"),
        ("inverse_every: often", r"natural\.inverse_every: is 'often'"),
    ],
)
def test_a_mistake_in_a_spec_is_named(wrong: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace("NAME", "a2c").replace("damping: 0.2", wrong))
    with pytest.raises(SpecError, match=message):
        specs.load(path)


SHIPPED = Path(__file__).parents[2] / "spec" / "kfac.yaml"


def test_the_shipped_specs_are_right() -> None:
    assert sorted(specs.read(SHIPPED)) == [f"{name}_kfac_cartpole" for name in EVERY]
    for name in EVERY:
        assert specs.load(SHIPPED, f"{name}_kfac_cartpole").agents[0].config.natural is not None
