"""Agents x environments x bodies in one session: each of the five cases learns, is recorded, resumed and evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lab.test_resume import Killed, assert_same_folder, die_at
from learn import probes
from pettingzoo import ParallelEnv

from longrein.errors import SpecError
from longrein.lab import aeb, records
from longrein.lab import spec as specs
from longrein.lab.actor import Actor
from longrein.lab.experiment import open_world, session_settings
from longrein.lab.games import Games
from longrein.lab.session import SessionResult, SessionSettings, load_policy, run_session
from longrein.lab.stage import OpenWorld
from longrein.learn import algorithms
from longrein.link.server import Server

PPO = {"rollout_steps": 32, "epochs": 6, "minibatch_size": 64, "gamma": 0.9, "lr": 3e-3, "net": {"hidden": [16, 16]}}
DQN = {"rollout_steps": 4, "lr": 3e-3, "gamma": 0.9, "net": {"hidden": [16, 16]}, "target_every": 50,
       "memory": {"capacity": 2000, "batch_size": 32, "min_size": 64}}  # fmt: skip


pytestmark = pytest.mark.usefixtures("undrawn")


class Pick(probes.Imitate):
    """As Imitate, with other spaces: the place of the 1 among four numbers."""

    observation_space = Box(0.0, 1.0, (4,), np.float32)
    action_space = Discrete(4)

    def first(self) -> float:
        return float(self.np_random.integers(4))

    def observation(self) -> Any:
        return np.eye(4, dtype=np.float32)[int(self.seen)]

    def step(self, action: Any) -> probes.Step:
        return self.observation(), 1.0 if action == self.seen else -1.0, True, False, {}


class Duel(ParallelEnv[str, Any, Any]):
    """Each seat sees a number and names its sign, for `rounds` rounds; who is right takes 1 from who is wrong.

    `wide`: one seat sees three numbers, so that its form is another. `leaves`: the second seat leaves after a round.
    """

    metadata = {"name": "duel"}

    def __init__(self, wide: bool = False, leaves: bool = False, rounds: int = 2) -> None:
        self.possible_agents = ["left", "right"]
        self.leaves, self.rounds = leaves, rounds
        self.sizes = {"left": 1, "right": 3 if wide else 1}

    def observation_space(self, agent: str) -> gymnasium.Space[Any]:
        return Box(-1.0, 1.0, (self.sizes[agent],), np.float32)

    def action_space(self, agent: str) -> gymnasium.Space[Any]:
        return Discrete(2)

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None or not hasattr(self, "random"):
            self.random = np.random.default_rng(seed)
        self.agents, self.round = list(self.possible_agents), 0
        return self.look(), {agent: {} for agent in self.agents}

    def look(self) -> dict[str, Any]:
        self.signs = {agent: float(self.random.choice([-1.0, 1.0])) for agent in self.possible_agents}
        return {agent: np.full(self.sizes[agent], self.signs[agent], np.float32) for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> Any:
        assert list(actions) == self.agents
        right = {agent: float((action == 1) == (self.signs[agent] > 0)) for agent, action in actions.items()}
        total = sum(right.values())
        rewards = {agent: 2 * value - total if len(right) == 2 else value for agent, value in right.items()}
        self.round += 1
        over = self.round == self.rounds
        out = {agent: over or (self.leaves and agent == "right") for agent in self.agents}
        seen, infos = self.look(), {agent: {} for agent in self.agents}
        self.agents = [agent for agent in self.agents if not out[agent]]
        return seen, rewards, out, dict.fromkeys(out, False), infos

    def close(self) -> None:
        pass


def vector(make: type[gymnasium.Env[Any, Any]]) -> OpenWorld:
    return lambda count: SyncVectorEnv([make] * count, autoreset_mode=AutoresetMode.SAME_STEP)


def duels(**options: Any) -> OpenWorld:
    return lambda count: Games([Duel(**options) for _ in range(count)])


def settings(
    agents: Sequence[tuple[str, dict[str, Any]]], envs: int, num: Any = 1, product: str = "outer", **changes: Any
) -> SessionSettings:
    configs = [(name, algorithms.config_from(algorithms.load(name)[0], plain)) for name, plain in agents]
    bodies = aeb.resolve(specs.BodySpec(product, num), len(agents), envs).bodies  # type: ignore[arg-type]
    asked: dict[str, Any] = {"num_envs": 4, "max_env_steps": 3_000, "evaluation_episodes": 20, "seed": 1,
                             "checkpoint_every": 1_500, "window": 50}  # fmt: skip
    return SessionSettings("bodies", *configs[0], more_agents=tuple(configs[1:]), more_envs=(4,) * (envs - 1),
                           bodies=bodies, **asked | changes)  # fmt: skip


def mean_of(result: SessionResult, body: str) -> float:
    return float(np.mean(result.bodies[body].evaluation))


def assert_goes_on(asked: SessionSettings, tmp_path: Path, opens: Any, whole: SessionResult) -> None:
    """Ended in the middle and taken up, it is the same session."""
    with pytest.raises(Killed):
        run_session(asked, tmp_path / "parts", opens, die_at(asked.max_env_steps * 2 // 3))
    parts = run_session(asked, tmp_path / "parts", opens, resume=True)
    assert_same_folder(whole.folder, parts.folder)


def test_one_agent_in_one_environment(tmp_path: Path) -> None:
    result = run_session(settings([("ppo", PPO)], 1), tmp_path, vector(probes.Imitate))
    assert np.mean(result.evaluation) == 1.0
    assert result.bodies == {}
    assert "body" not in records.read_columns(result.folder / "episodes.csv")


def test_several_bodies_in_copies_of_one_environment(tmp_path: Path) -> None:
    result = run_session(settings([("ppo", PPO)], 1, num=3), tmp_path, vector(probes.Imitate))
    assert list(result.bodies) == ["0.0.0", "0.0.1", "0.0.2"]
    assert all(body.training_mean > 0.8 for body in result.bodies.values())
    assert mean_of(result, "0.0.0") == 1.0, "the first plays for all: they are copies"
    table = records.read_columns(result.folder / "episodes.csv")
    assert set(table["body"]) == {"0.0.0", "0.0.1", "0.0.2"}
    assert set(table["env"]) == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("options", [{}, {"wide": True}, {"leaves": True}], ids=str)
def test_one_agent_against_itself(tmp_path: Path, options: dict[str, Any]) -> None:
    asked = settings([("ppo", PPO)], 1, num=2)
    result = run_session(asked, tmp_path / "whole", duels(**options))
    # Both are right in the end, so that nobody takes anything; alone, the one that stayed is right, and gets 1.
    assert mean_of(result, "0.0.0") == (1.0 if options.get("leaves") else 0.0)
    assert mean_of(result, "0.0.1") == 0.0
    returns = records.read_columns(result.folder / "episodes.csv")
    assert len(returns["return"]) == result.episodes
    assert_goes_on(asked, tmp_path, duels(**options), result)


def test_two_algorithms_in_one_game(tmp_path: Path) -> None:
    asked = settings([("ppo", PPO), ("random", {})], 1)
    result = run_session(asked, tmp_path / "whole", duels())
    # Always right against a coin: 0.5 a round on average, two rounds.
    assert mean_of(result, "0.0.0") > 0.5
    assert mean_of(result, "0.0.0") == -mean_of(result, "1.0.0"), "what one wins the other loses"
    assert set(records.read_columns(result.folder / "metrics.csv")["agent"]) <= {0.0, 1.0}
    assert_goes_on(asked, tmp_path, duels(), result)


def test_two_learners_in_one_game(tmp_path: Path) -> None:
    result = run_session(settings([("ppo", PPO), ("dqn", DQN)], 1), tmp_path, duels())
    table = duels()(1)
    for body, seat in (("0.0.0", "left"), ("1.0.0", "right")):
        assert isinstance(table, Games)
        policy = load_policy(result.folder, table.table([seat]), body).policy
        signs = np.array([[-1.0], [1.0]], np.float32)
        assert policy.act(policy.encode(signs), deterministic=True)[0].tolist() == [0, 1]
    metrics = records.read_columns(result.folder / "metrics.csv")
    assert set(metrics["agent"]) == {0.0, 1.0}
    assert np.isnan(metrics["entropy"][metrics["agent"] == 1.0]).all(), "a cell that an agent has not is empty"


@pytest.mark.parametrize("agent", [("ppo", PPO), ("dqn", DQN)], ids=["ppo", "dqn"])
def test_one_agent_in_different_environments(tmp_path: Path, agent: tuple[str, dict[str, Any]]) -> None:
    asked, opens = settings([agent], 2), [vector(probes.Imitate), vector(Pick)]
    result = run_session(asked, tmp_path / "whole", opens)
    assert mean_of(result, "0.0.0") == 1.0
    assert mean_of(result, "0.1.0") >= 0.9
    one = load_policy(result.folder, opens[0](1), "0.0.0")  # type: ignore[arg-type]  # these are vectors
    other = load_policy(result.folder, opens[1](1), "0.1.0")  # type: ignore[arg-type]
    weights, others = (algorithm.state_dict()["policy"] for algorithm in (one, other))
    inner = [name for name in weights if name.endswith("torso.net.3.weight")]
    assert inner
    assert all(weights[name].equal(others[name]) for name in inner), "the torso is shared"
    assert not any(weights[name].shape == others[name].shape for name in weights if name.endswith("net.1.weight"))
    assert_goes_on(asked, tmp_path, opens, result)


def test_the_full_product(tmp_path: Path) -> None:
    asked = settings([("ppo", PPO), ("dqn", DQN)], 2)
    opens = [vector(Pick), duels()]
    result = run_session(asked, tmp_path / "whole", opens)
    assert list(result.bodies) == ["0.0.0", "0.1.0", "1.0.0", "1.1.0"]
    assert mean_of(result, "0.0.0") >= 0.9
    assert mean_of(result, "1.0.0") >= 0.9
    assert abs(mean_of(result, "0.1.0")) < 0.3, "both are nearly always right"
    assert_goes_on(asked, tmp_path, opens, result)


def test_the_specs_that_ship_run_and_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    file = Path(__file__).parents[2] / "spec" / "aeb.yaml"
    for name in ("aeb_duel", "aeb_product"):
        spec = specs.load(file, name, {"meta.env_steps": 400, "meta.eval.episodes": 2})
        opens = [partial(open_world, env) for env in spec.envs]
        result = run_session(session_settings(spec, 0), tmp_path / name, opens)
        assert len(result.bodies) == len(spec.agents) * len(spec.envs)
        assert result.graph.stat().st_size > 10_000


def test_a_far_game(tmp_path: Path) -> None:
    with Server([("duel", Duel)], at="ws://127.0.0.1:0") as server:
        spec = specs.from_plain("far", {
            "agent": {"algorithm": {"name": "ppo", "rollout_steps": 16}, "net": {"hidden": [16, 16]}},
            "env": {"url": f"{server.urls[0].rstrip('/')}/duel", "num_envs": 2}, "body": {"num": 2},
            "meta": {"env_steps": 200, "eval": {"episodes": 3}},
        })  # fmt: skip
        opens = [partial(open_world, spec.envs[0])]
        result = run_session(session_settings(spec, 0), tmp_path, opens)
    assert [len(body.evaluation) for body in result.bodies.values()] == [3, 3]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_agent_learns_cartpole_and_acrobot_at_once(tmp_path: Path) -> None:
    spec = specs.load(Path(__file__).parents[2] / "spec" / "aeb.yaml", "aeb_multitask")
    opens = [partial(open_world, env) for env in spec.envs]
    result = run_session(session_settings(spec, 0), tmp_path, opens)
    assert mean_of(result, "0.0.0") >= 400
    assert mean_of(result, "0.1.0") >= -120


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "other"), [("aeb_duel", "1.0.0"), ("aeb_self_play", "0.0.1")])
def test_rock_paper_scissors_is_played_to_the_end(tmp_path: Path, name: str, other: str) -> None:
    spec = specs.load(Path(__file__).parents[2] / "spec" / "aeb.yaml", name)
    result = run_session(session_settings(spec, 0), tmp_path, [partial(open_world, env) for env in spec.envs])
    assert result.env_steps >= 20_000
    assert mean_of(result, "0.0.0") == -mean_of(result, other), "what one wins the other loses"
    if name == "aeb_self_play":  # against itself it is no better than itself
        assert abs(result.bodies["0.0.0"].training_mean) < 3


def test_bodies_must_fill_the_seats(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"environment 0 has 2 seats \(left, right\), and 1 bodies were asked for"):
        run_session(settings([("ppo", PPO)], 1), tmp_path, duels())


def test_a_torso_of_one_layer_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no layer to share"):
        run_session(settings([("ppo", PPO | {"net": {"hidden": [16]}})], 2), tmp_path, [vector(probes.Imitate)] * 2)


def test_a_seat_that_has_left_is_idle() -> None:
    games = Games([Duel(leaves=True) for _ in range(2)])
    table = games.table(["right"])
    other = games.table(["left"])
    _, build = algorithms.load("random")
    policy = build(algorithms.load("random")[0](), table.single_observation_space, Discrete(2), 0).policy
    actor = Actor(table, policy, seed=None, bodies=("0.0.1",))
    actor.begin(games.reset([table, other], 3)[0])
    flags = []
    for _ in range(4):
        mine, _ = games.step([table, other], [actor.choose(), np.zeros(2, np.int64)])
        transition = actor.take(*mine, played=2)
        flags.append((transition.valid.all(), transition.terminated.all()))
    # It plays the first of two rounds, sits out the second, and plays again.
    assert flags == [(True, True), (False, False), (True, True), (False, False)]
    assert [(e.length, e.env_steps, e.body) for e in actor.finished()] == [(1, 2, "0.0.1")] * 2 + [(1, 6, "0.0.1")] * 2
    assert actor.env_steps == 8, "the game went on without it"
