"""Recurrent layers against torch's own, a rollout at once against step by step, and the state's way through the lab."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from learn import probes
from learn.training import train

from longrein.lab.actor import Actor
from longrein.lab.evaluation import evaluate
from longrein.learn.algorithms import initial_state
from longrein.learn.algorithms.ppo import PPO, Config
from longrein.learn.batch import Batch
from longrein.learn.distributions import action_form
from longrein.learn.policy_value import PolicyValue, values
from longrein.learn.recurrent import Core, Sequences, begins
from longrein.learn.rollout import Rollout
from longrein.learn.torsos import Net

KINDS = ("gru", "lstm")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_orthogonal_and_biases_zero(kind: str) -> None:
    before = torch.get_rng_state()
    core = Core(kind, 8, 8, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state()), "the caller's random numbers are not ours to draw"
    for name, parameter in core.named_parameters():
        if "bias" in name:
            assert not parameter.any()
        else:
            torch.testing.assert_close(parameter.T @ parameter, torch.eye(8), atol=1e-5, rtol=0)


def test_a_gru_by_hand() -> None:
    # All weights 1, biases 0, x = 1, h = 0: r = z = sigmoid(1), n = tanh(1 + r * 0), h' = (1 - z) n + z * 0.
    core = Core("gru", 1, 1)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            parameter.fill_(1.0 if "weight" in name else 0.0)
        output, state = core.step(torch.ones(1, 1), torch.zeros(1, 1))
    z = 1 / (1 + math.exp(-1))
    assert output.item() == pytest.approx((1 - z) * math.tanh(1.0))
    assert state.item() == output.item()


def test_an_lstm_by_hand() -> None:
    # As above: i = f = o = sigmoid(1), g = tanh(1), c' = i g, h' = o tanh(c'); a row of state is h' and c'.
    core = Core("lstm", 1, 1)
    with torch.no_grad():
        for name, parameter in core.named_parameters():
            parameter.fill_(1.0 if "weight" in name else 0.0)
        output, state = core.step(torch.ones(1, 1), torch.zeros(1, 2))
    gate = 1 / (1 + math.exp(-1))
    cell = gate * math.tanh(1.0)
    assert output.item() == pytest.approx(gate * math.tanh(cell))
    assert state[0].tolist() == pytest.approx([output.item(), cell])


def test_a_state_begins_after_an_end_and_after_a_row_that_was_none() -> None:
    #                          step   0  ends     2      ends   filler  5
    done = torch.tensor([[False], [True], [False], [True], [False], [False]])
    valid = torch.tensor([[True], [True], [True], [True], [False], [True]])
    assert begins(done, valid).squeeze(1).tolist() == [False, False, True, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_rollout_at_once_equals_step_by_step(kind: str, seed: int) -> None:
    steps, envs = 23, 4
    generator = torch.Generator().manual_seed(seed)
    core = Core(kind, 5, 3, generator)
    rows, ends = normal(steps, envs, 5, seed=seed + 1), normal(steps, envs, 5, seed=seed + 2)
    done = torch.rand(steps, envs, generator=generator) < (0.0, 0.1, 0.4, 1.0)[seed]
    valid = torch.rand(steps, envs, generator=generator) > 0.1
    begin = begins(done, valid)
    first = normal(envs, core.state_size, seed=seed + 3) * 0.3
    # The true successor is the next row, unless the state begins anew there.
    goes_on = torch.cat([~begin[1:], torch.zeros(1, envs).bool()])
    successor = torch.where(goes_on[..., None], torch.cat([rows[1:], rows[:1]]), ends)
    state, now, later = first, [], []
    for t in range(steps):
        state = torch.where(begin[t, :, None], 0.0, state)
        output, state = core.step(rows[t], state)
        now.append(output)
        later.append(core.step(successor[t], state)[0])
    at_once, successors = Sequences.of(begin).run(core, rows, first, (~goes_on, successor[~goes_on]))
    torch.testing.assert_close(at_once, torch.stack(now))
    torch.testing.assert_close(successors, torch.stack(later))
    # And so do the gradients: through time inside an episode, and not across its end.
    weights = normal(steps, envs, 3, seed=9)
    loops = torch.autograd.grad((torch.stack(now) * weights).sum(), core.parameters())
    for gradient, expected in zip(
        torch.autograd.grad((at_once * weights).sum(), core.parameters()), loops, strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_value_unroll_as_they_act(kind: str, shared: bool) -> None:
    steps, envs = 17, 3
    space, form = Box(-1, 1, (4,)), action_form(Discrete(3))
    generator = torch.Generator().manual_seed(0)
    net = PolicyValue(space, form, Net((8,), recurrent=kind, recurrent_size=6), shared=shared, generator=generator)
    assert net.state_size == 6 * (1 if kind == "gru" else 2) * (1 if shared else 2)
    rows, begin = normal(steps, envs, 4), torch.rand(steps, envs, generator=generator) < 0.2
    first = state = normal(envs, net.state_size, seed=1) * 0.3
    numbers = []
    with torch.no_grad():
        for t in range(steps):
            state = torch.where(begin[t, :, None], 0.0, state) if t else state
            given, following = net.act(rows[t], state)
            assert following is not None
            numbers.append(given)
            state = following
        unrolled, value = net.evaluate_sequences(rows, first, begin)
    torch.testing.assert_close(unrolled, torch.stack(numbers))
    successor = torch.cat([rows[1:], normal(1, envs, 4, seed=2)])
    ends = torch.cat([begin[1:], torch.ones(1, envs).bool()])
    now, later = values(net, rows, (ends, successor[ends]), first, begin)
    torch.testing.assert_close(now, value)
    torch.testing.assert_close(later[:-1][~ends[:-1]], now[1:][~ends[:-1]])
    # The same observation is worth something else to another episode, which begins with zeros.
    assert not torch.isclose(later[:-1][ends[:-1]], now[1:][ends[:-1]]).any()


# ---------------------------------------------------------------------------------------------- through the lab


class Recall(gymnasium.Env[Any, Any]):
    """Shows -1 or 1 at first, then `delay` times 0; the last action is rewarded when it names what was shown."""

    observation_space = Box(-1.0, 1.0, (2,), np.float32)
    action_space = Discrete(2)

    def __init__(self, delay: int = 4, jitter: int = 0) -> None:
        self.delay, self.jitter = delay, jitter

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time, self.cue = 0, float(self.np_random.choice([-1.0, 1.0]))
        self.end = self.delay + int(self.np_random.integers(0, self.jitter + 1))
        return self.observation(), {}

    def observation(self) -> Any:
        return np.array([self.cue if self.time == 0 else 0.0, float(self.time == self.end)], np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        over = self.time == self.end
        reward = (1.0 if (action == 1) == (self.cue > 0) else -1.0) if over else 0.0
        self.time += 1
        return self.observation(), reward, over, False, {}


MEMORY = Net((16,), recurrent="gru", recurrent_size=16)
SMALL: dict[str, Any] = {"rollout_steps": 20, "minibatch_size": 40, "epochs": 2, "net": MEMORY}


def recurrent_ppo(envs: SyncVectorEnv, seed: int = 0, **settings: Any) -> PPO:
    return PPO(Config(**SMALL | settings), envs.single_observation_space, envs.single_action_space, seed)


def collected(envs: Any, algorithm: PPO, rollouts: int = 1) -> Batch:
    """The last of some rollouts, the others not learnt from."""
    actor = Actor(envs, algorithm.policy, seed=5, generator=torch.Generator().manual_seed(1))
    for _ in range(rollouts):
        rollout = Rollout(algorithm.rollout_steps)
        for transition in actor.collect(algorithm.rollout_steps):
            rollout.add(transition)
    return rollout.take()


def recalls(mode: AutoresetMode, count: int = 4) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Recall(3, jitter=3)] * count, autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_minibatch_has_ratio_one(mode: AutoresetMode, kind: str) -> None:
    envs = recalls(mode)
    net = Net((16,), recurrent=kind, recurrent_size=16)
    algorithm = recurrent_ppo(envs, epochs=1, minibatch_size=10**6, net=net, normalise_observation=True)
    batch = collected(envs, algorithm, rollouts=3)  # the third begins in the middle of episodes
    assert batch.extras["state"][0].any()
    assert "next_state" not in batch.extras
    assert algorithm.update(batch)["approx_kl"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_actor_zeroes_what_an_episode_left_behind(mode: AutoresetMode) -> None:
    envs = recalls(mode)
    algorithm = recurrent_ppo(envs)
    batch = collected(envs, algorithm)
    first = batch.extras["state"]
    assert not first[0].any()
    begin = begins(batch.done, batch.valid)
    begin[0] = True
    for t in range(1, len(begin)):
        assert torch.equal(~first[t].any(1), begin[t]), t
    # A first observation shows the cue in its first number: where one is acted on, the state is zeros.
    shown = (batch.observation[..., 0] != 0) & batch.valid
    assert shown[1:].any()
    assert not first[shown].any()


def test_same_step_and_disabled_give_the_same_recurrent_weights() -> None:
    made = []
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        envs = recalls(mode)
        algorithm = recurrent_ppo(envs)
        algorithm.update(collected(envs, algorithm))
        made.append(algorithm.state_dict()["policy"])
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_minibatches_are_of_environments() -> None:
    # 4 environments by 20 rows, at most 40 rows: 2 minibatches of 2; at most 5: still no less than one environment.
    envs = recalls(AutoresetMode.SAME_STEP)
    batch = collected(envs, recurrent_ppo(envs))
    assert recurrent_ppo(envs).update(batch)["minibatches"] == 2 * 2
    assert recurrent_ppo(envs, minibatch_size=5).update(batch)["minibatches"] == 2 * 4


def test_an_environment_without_a_valid_row_is_left_out() -> None:
    envs = recalls(AutoresetMode.SAME_STEP)
    batch = collected(envs, recurrent_ppo(envs))
    batch.valid[:, 1] = False
    measured = recurrent_ppo(envs, minibatch_size=5).update(batch)
    assert measured["minibatches"] == 2 * 3
    assert all(math.isfinite(value) for value in measured.values())


def test_an_invalid_row_changes_nothing() -> None:
    envs = recalls(AutoresetMode.NEXT_STEP)
    batch = collected(envs, recurrent_ppo(envs))
    assert not batch.valid.all()
    one, two = recurrent_ppo(envs, 3), recurrent_ppo(envs, 3)
    one.update(batch)
    for column, nonsense in ((batch.observation, 1e3), (batch.reward, 1e9), (batch.extras["log_prob"], -1e9)):
        column[~batch.valid] = nonsense
    two.update(batch)
    for a, b in zip(one.policy.parameters(), two.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_recurrent_learner_goes_on_from_its_save() -> None:
    envs = recalls(AutoresetMode.SAME_STEP)
    batch = collected(envs, recurrent_ppo(envs), rollouts=2)
    one = recurrent_ppo(envs, 1)
    one.update(batch)
    two = recurrent_ppo(envs, 7)
    two.load_state_dict(deepcopy(one.state_dict()))  # torch's optimizers share what they load
    assert one.update(batch) == two.update(batch)


def test_a_policy_without_memory_has_no_state() -> None:
    envs = recalls(AutoresetMode.SAME_STEP)
    assert initial_state(recurrent_ppo(envs, net=Net()).policy, 4) is None
    state = initial_state(recurrent_ppo(envs).policy, 4)
    assert state is not None
    assert state.shape == (4, 32)


def test_a_state_that_was_not_stored_is_missed() -> None:
    envs = recalls(AutoresetMode.SAME_STEP)
    batch = collected(envs, recurrent_ppo(envs, net=Net()))
    with pytest.raises(ValueError, match="state"):
        recurrent_ppo(envs).update(batch)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_evaluation_carries_the_state(mode: AutoresetMode) -> None:
    envs = recalls(mode, 3)
    policy = recurrent_ppo(envs, 2).policy
    with torch.no_grad():  # far from the start, where both actions are about equally likely whatever was seen
        policy.net.actor.weight.mul_(1000.0)  # type: ignore[union-attr,operator]  # it is a PolicyValue
    seeds = [21, 22, 23, 24, 25]
    rows = evaluate(policy, envs, seeds)
    for seed, row in zip(seeds, rows, strict=True):
        env = Recall(3, jitter=3)
        observation, _ = env.reset(seed=seed)
        state, total, length, over = policy.initial_state(1), 0.0, 0, False
        while not over:
            action, extras = policy.act(policy.encode(observation[None]), True, None, state)
            state = extras["next_state"]  # type: ignore[assignment]  # float32
            observation, reward, over, _, _ = env.step(policy.for_env(action)[0])
            total, length = total + reward, length + 1
        assert row == (seed, length, total)


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_recurrent_net_solves_what_must_be_remembered(kind: str) -> None:
    settings = {
        "rollout_steps": 20, "minibatch_size": 160, "epochs": 4, "gamma": 0.95, "lr": 5e-3, "entropy_weight": 0.01,
        "shared": True, "net": {"hidden": [16], "recurrent": kind, "recurrent_size": 16},
    }  # fmt: skip
    trained = train("ppo", settings, Recall, env_steps=25_000, num_envs=16, target=0.95)
    assert trained.reached is not None, trained
    blind = train("ppo", settings | {"net": {"hidden": [16]}}, Recall, env_steps=6_000, num_envs=16)
    assert blind.best < 0.5, blind


def test_probes_are_learnt_with_memory_too() -> None:
    envs = probes.vector(probes.Imitate)
    settings = {"rollout_steps": 16, "minibatch_size": 64, "lr": 5e-3, "gamma": 0.8, "net": MEMORY}
    algorithm = PPO(Config(**settings), envs.single_observation_space, envs.single_action_space, 0)
    probes.batches(envs, algorithm, 30)
    rows = np.array([[-1.0], [1.0]], np.float32)
    assert algorithm.policy.act(rows, deterministic=True)[0].tolist() == [0, 1]
