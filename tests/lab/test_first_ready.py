"""Environments that each answer for itself: every column is one time line, and nothing is lost or doubled."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from lab.test_crew import settings
from lab.ticking import Ticking
from learn import probes
from numpy.typing import NDArray

import longrein
from longrein.errors import SpecError
from longrein.lab import spec as specs
from longrein.lab.actor import Actor, connect
from longrein.lab.channel import Arrays
from longrein.lab.first_ready import FirstReady
from longrein.lab.records import read_table
from longrein.lab.session import run_session
from longrein.lab.topology import Topology
from longrein.learn import algorithms
from longrein.learn.rollout import Rollout

STEPS = 7


class Late:
    """Environments with send and recv, in a time of their own: an answer takes as long as is drawn for it.

    losses: how often, of 1, an environment is lost and replaced in a step, with same-step autoreset.
    """

    def __init__(self, count: int, mode: AutoresetMode, rng: np.random.Generator, spread: float, losses: float) -> None:
        self.num_envs = count
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = Ticking.observation_space, Ticking.action_space
        self.envs = [SyncVectorEnv([lambda n=n: Ticking(number=n)], autoreset_mode=mode) for n in range(count)]
        self.made = count
        self.mode, self.rng, self.losses = mode, rng, losses
        self.speed = rng.uniform(1.0, 1.0 + spread, count)
        self.now = 0.0
        self.due: dict[int, tuple[float, Any]] = {}
        self.asked = 0

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        self.last = np.concatenate([envs.reset(seed=seed)[0] for envs in self.envs])
        return self.last, {}

    def send(self, actions: Any, env_ids: Any) -> None:
        for action, row in zip(actions, env_ids, strict=True):
            assert row not in self.due, "it was asked twice"
            self.asked += 1
            self.due[row] = self.now + self.rng.exponential(self.speed[row]), action

    def recv(self, min_ready: int = 1) -> Any:
        assert len(self.due) >= min_ready
        ready = sorted(self.due, key=lambda row: self.due[row][0])
        count = min(len(ready), min_ready + int(self.rng.integers(0, 3)))
        found = []
        for row in ready[:count]:
            due, action = self.due.pop(row)
            self.now = max(self.now, due)
            found.append(self._step(row, action))
        gathered: dict[str, Any] = {"env_id": np.array(ready[:count])}
        for at, (_, _, _, _, infos) in enumerate(found):
            for key, value in ((key, value) for key, value in infos.items() if key != "final_info"):
                whole = gathered.setdefault(key, np.zeros((count, *value.shape[1:]), value.dtype))
                whole[at] = value[0]
        arrays = [np.concatenate([one[part] for one in found]) for part in range(4)]
        return arrays[0], arrays[1], arrays[2], arrays[3], gathered

    def _step(self, row: int, action: Any) -> Any:
        if self.losses and self.rng.random() < self.losses:
            end, self.made = self.last[row], self.made + 1
            self.envs[row] = SyncVectorEnv([lambda: Ticking(number=self.made)], autoreset_mode=self.mode)
            first = self.envs[row].reset()[0]
            final = np.empty(1, object)
            final[0] = end
            self.last[row] = first[0]
            no, yes = np.zeros(1, np.bool_), np.ones(1, np.bool_)
            return first, np.zeros(1), no, yes, {"restarted": yes, "_restarted": yes, "final_obs": final}
        moment = self.envs[row].step(np.array([action]))
        self.last[row] = moment[0][0]
        return moment


class Telling:
    """A policy whose extras tell what it saw, and which of its actions this is."""

    def __init__(self) -> None:
        self.made = 0

    def encode(self, observation: Any) -> Any:
        return np.asarray(observation).copy()

    def act(self, observation: Any, deterministic: bool = False, generator: Any = None) -> Any:
        count = len(observation)
        action = torch.randint(3, (count,), generator=generator).numpy()
        number = self.made + np.arange(count)
        self.made += count
        return action, {"saw": observation[:, 1].copy(), "number": number}

    def for_env(self, action: Any) -> Any:
        return action


def rollouts(player: FirstReady, count: int) -> Iterator[tuple[int, Arrays]]:
    for _ in range(count):
        into: Arrays = {}
        yield player.fill(into), into


def assert_whole(columns: dict[int, list[dict[str, NDArray[Any]]]], mode: AutoresetMode) -> None:
    """columns: of each environment, in the order in which they were sent."""
    for number, found in columns.items():
        rows = {name: np.concatenate([column[name] for column in found]) for name in found[0]}
        seen, then = rows["observation"], rows["next_observation"]
        valid, done = rows["valid"], rows["terminated"] | rows["truncated"]
        assert (seen[:, 0] == number).all(), "a column is of one environment"
        assert seen[valid, 1].tolist() == list(range(int(valid.sum()))), "its steps are whole and in order"
        assert (then[valid, 1] == seen[valid, 1] + 1).all()
        assert (then[valid, 2:] == seen[valid, 2:] + [0, 1]).all(), "the true successor, in the same episode"
        assert (rows["reward"] == valid).all()
        assert (rows["extras.saw"] == seen[:, 1]).all(), "what was seen when the action was chosen"
        goes_on = ~done[:-1]
        assert (seen[1:][goes_on] == then[:-1][goes_on]).all()
        if mode == AutoresetMode.SAME_STEP:
            assert (seen[1:, 2:][~goes_on] == then[:-1, 2:][~goes_on] * [1, 0] + [1, 0]).all(), "a new episode"
        else:
            assert (valid[1:] == goes_on).all(), "filler follows an end, and nothing else"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_columns_are_whole_time_lines_whatever_the_delays(mode: AutoresetMode, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 9))
    envs, policy, versions = Late(count, mode, rng, 20.0, 0.0), Telling(), iter(range(10**6))
    least = int(rng.integers(1, count + 1))
    player = FirstReady(envs, policy, least=least, length=STEPS, newest=lambda: next(versions))
    player.begin(envs.reset()[0])
    columns: dict[int, list[dict[str, NDArray[Any]]]] = defaultdict(list)
    numbers: Counter[int] = Counter()
    episodes, ends, last = 0, 0, -1
    for version, into in rollouts(player, 30):
        assert {array.shape[:2] for array in into.values()} == {(STEPS, count)}
        assert last <= version <= next(versions), "the oldest weights of the rollout"
        last = max(last, 0)
        for place in range(count):
            column = {name: array[:, place].copy() for name, array in into.items()}
            columns[int(column["observation"][0, 0])].append(column)
            numbers.update(column["extras.number"].tolist())
            ends += int(((column["terminated"] | column["truncated"]) & column["valid"]).sum())
        told = player.finished()
        episodes += len(told)
        assert episodes == ends, "an episode is told with its column"
        assert all(3 <= episode.length <= 12 and episode.return_ == episode.length for episode in told)
    assert_whole(columns, mode)
    assert max(numbers.values()) == 1, "each action is in one row"
    fewest, most = min(map(len, columns.values())), max(map(len, columns.values()))
    assert most > fewest or least == count, "a fast one gives more columns"
    assert sum(len(found) for found in columns.values()) == 30 * count


def test_a_version_is_that_of_the_oldest_row() -> None:
    rng = np.random.default_rng(0)
    envs, version = Late(4, AutoresetMode.SAME_STEP, rng, 5.0, 0.0), [0]

    class Versioned(Telling):
        def act(self, observation: Any, deterministic: bool = False, generator: Any = None) -> Any:
            action, extras = super().act(observation, deterministic, generator)
            return action, extras | {"version": np.full(len(observation), version[0])}

    def newest() -> int:
        version[0] += 1
        return version[0]

    player = FirstReady(envs, Versioned(), least=1, length=STEPS, newest=newest)
    player.begin(envs.reset()[0])
    for said, into in rollouts(player, 20):
        assert said == into["extras.version"].min()


def test_lost_environments_end_their_episodes_and_are_counted_once() -> None:
    rng = np.random.default_rng(1)
    envs = Late(5, AutoresetMode.SAME_STEP, rng, 5.0, 0.05)
    player = FirstReady(envs, Telling(), least=2, length=STEPS, newest=lambda: 0)
    player.begin(envs.reset()[0])
    steps: dict[int, list[float]] = defaultdict(list)
    lost = 0
    for _, into in rollouts(player, 40):
        for place in range(5):
            column = {name: array[:, place] for name, array in into.items()}
            over = ~column["valid"]
            lost += int(over.sum())
            assert column["truncated"][over].all()
            assert (column["reward"][over] == 0).all()
            for row in np.flatnonzero(column["valid"]):
                steps[int(column["observation"][row, 0])].append(column["observation"][row, 1])
        assert all(3 <= episode.length <= 12 for episode in player.finished())
    assert lost > 20
    assert all(found == list(range(len(found))) for found in steps.values())
    assert player.actor.restarts >= lost


@pytest.mark.parametrize("name", ["impala", "dqn"])
def test_when_all_are_ready_it_is_as_the_plain_actor(name: str) -> None:
    def world() -> Any:
        return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 4, autoreset_mode=AutoresetMode.SAME_STEP)

    class Together:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, key: str) -> Any:
            return getattr(self.inner, key)

        def send(self, actions: Any, env_ids: Any) -> None:
            assert env_ids.tolist() == [0, 1, 2, 3]
            self.asked = actions

        def recv(self, min_ready: int = 1) -> Any:
            order = np.array([2, 0, 3, 1])  # as they may answer
            *moment, infos = self.inner.step(self.asked)
            infos = {key: value[order] for key, value in infos.items() if key in ("final_obs", "_final_obs")}
            return *(array[order] for array in moment), infos | {"env_id": order}

    config_class, build = algorithms.load(name)
    plain = {"net": {"hidden": [16, 16]}} | probes.SMALL[name]
    config = algorithms.config_from(config_class, {k: v for k, v in plain.items() if k in
                                                   config_class.__dataclass_fields__})  # fmt: skip
    envs = world()
    policy = build(config, envs.single_observation_space, envs.single_action_space, 0).policy
    actor = Actor(envs, policy, seed=5, generator=torch.Generator().manual_seed(1))
    late = Together(world())
    player = FirstReady(late, policy, least=4, length=STEPS, newest=lambda: 0,
                        generator=torch.Generator().manual_seed(1))  # fmt: skip
    player.begin(late.reset(seed=5)[0])
    episodes = 0
    for _, into in rollouts(player, 20):
        rollout = Rollout(STEPS)
        for transition in actor.collect(STEPS):
            rollout.add(transition)
        order = np.argsort(into["observation"][0, :, 0])
        same = np.argsort(rollout.columns["observation"][0, :, 0])
        for column, array in rollout.columns.items():
            assert (into[column][:, order] == array[:, same]).all(), column
        told, there = actor.finished(), player.finished()
        episodes += len(told)
        assert sorted(map(repr, told)) == sorted(map(repr, there))
    assert episodes > 3


@pytest.mark.parametrize("servers", [1, 3])
def test_columns_over_the_link_are_whole(servers: int) -> None:
    running = [longrein.Server([("Ticking", Ticking)], at="ws://127.0.0.1:0", options={"delay": 0.01}).start()
               for _ in range(servers)]  # fmt: skip
    try:
        urls = [f"{server.urls[0]}/Ticking" for server in running]
        envs = longrein.connect_vec(urls, num_envs=6, envs_per_lease=1, autoreset="same_step", on_loss="restart")
        player = FirstReady(envs, Telling(), least=2, length=STEPS, newest=lambda: 0)
        player.begin(envs.reset(seed=3)[0])
        columns: dict[int, list[dict[str, NDArray[Any]]]] = defaultdict(list)
        for _, into in rollouts(player, 12):
            for place in range(6):
                column = {name: array[:, place].copy() for name, array in into.items()}
                columns[int(column["observation"][0, 0])].append(column)
        envs.close()
    finally:
        for server in running:
            server.close()
    assert len(columns) == 6
    assert_whole(columns, AutoresetMode.SAME_STEP)


def test_what_cannot_answer_each_for_itself_is_refused() -> None:
    near = SyncVectorEnv([Ticking], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(SpecError, match="no send and recv"):
        FirstReady(near, Telling(), least=1, length=STEPS, newest=lambda: 0)
    far = Late(2, AutoresetMode.DISABLED, np.random.default_rng(0), 1.0, 0.0)
    with pytest.raises(SpecError, match="do not reset themselves"):
        FirstReady(far, Telling(), least=1, length=STEPS, newest=lambda: 0)


# ---------------------------------------------------------------------------------------------------- whole sessions


def far_world(urls: list[str], count: int, each: bool = False) -> Any:
    return connect(urls, count, each=each)


def test_a_session_of_environments_as_they_are_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrein.lab.plots.draw_session", lambda *_, **__: None)
    with longrein.Server([("Ticking", Ticking)], at="ws://127.0.0.1:0", options={"delay": 0.004}) as server:
        asked = settings("impala", max_env_steps=1500, num_envs=6, topology=Topology(actors=2, first_ready=1))
        result = run_session(asked, tmp_path, partial(far_world, [f"{server.urls[0]}/Ticking"]))
    assert result.status == "budget spent"
    rows = read_table(result.folder / "metrics.csv")
    assert "environments" not in rows
    assert result.env_steps >= 1500
    assert 1500 / 12 - 30 < result.episodes <= result.env_steps / 3
    assert max(rows["actor_lag"]) >= 0


@pytest.mark.parametrize(
    ("changes", "key", "problem"),
    [
        ({"meta.topology": {"actors": 1, "first_ready": -1}}, "meta.topology.first_ready", "negative"),
        ({"meta.topology": {"actors": 1, "first_ready": 9}}, "meta.topology.first_ready", "9 answers of 8"),
        ({"meta.topology": {"actors": 2, "first_ready": 5}}, "meta.topology.first_ready", "5 answers of 4"),
        ({"meta.topology": {"actors": 1, "first_ready": 1, "ahead": 0}}, "meta.topology.first_ready", "run ahead"),
        ({"meta.topology": {"actors": 1, "first_ready": 1, "inference": "central"}}, "meta.topology.first_ready",
         "copy of the policy"),
        ({"env.url": "", "env.id": "CartPole-v1"}, "meta.topology.first_ready", "makes them in the actor"),
        ({"meta.topology": {"actors": 1}, "env.elastic": True}, "env.elastic", "each answers for itself"),
        ({"meta.topology": "serial", "env.elastic": True}, "env.elastic", "each answers for itself"),
        ({"env.elastic": "yes"}, "env.elastic", "true or false"),
        ({"env.url": "ws+listen://127.0.0.1:1"}, "meta.eval.episodes", "cannot"),
        ({"env.url": "ws+listen://127.0.0.1:1", "meta.eval.episodes": 0,
          "meta.topology": {"actors": 2, "first_ready": 1}}, "meta.topology.actors", "one process can wait"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_said(tmp_path: Path, changes: dict[str, Any], key: str, problem: str) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("a: {agent: {algorithm: {name: impala}}, env: {url: 'ws://127.0.0.1:1/E', elastic: true}, "
                    "meta: {topology: {actors: 1, first_ready: 1}}}")  # fmt: skip
    assert specs.load(file).envs[0].elastic
    with pytest.raises(SpecError, match=problem) as caught:
        specs.load(file, None, changes)
    assert caught.value.key == key


def test_a_dialect_does_not_answer_each_for_itself() -> None:
    with pytest.raises(SpecError, match=r"gymie://127\.0\.0\.1:1 does not answer each for itself"):
        connect("gymie://127.0.0.1:1", 4, each=True)
