"""Actors in processes of their own: as one process to the bit in turns, whole when they are killed, gone at the end."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from lab import far_envs
from learn import probes

from longrein.errors import RunError, SpecError
from longrein.lab import checkpoint, records
from longrein.lab.actor import Actor
from longrein.lab.channel import PREFIX
from longrein.lab.session import Progress, SessionSettings, run_session, seed_of
from longrein.lab.topology import Topology
from longrein.learn import algorithms
from longrein.learn.batch import FIELDS
from longrein.learn.rollout import Rollout, batch_of

TURNS = Topology(actors=1, ahead=0)


pytestmark = pytest.mark.usefixtures("undrawn", "nothing_stays")


def settings(name: str, **changes: Any) -> SessionSettings:
    config_class, _ = algorithms.load(name)
    plain = {"net": {"hidden": [16, 16]}} | probes.SMALL[name]
    known = {key: value for key, value in plain.items() if key in config_class.__dataclass_fields__}
    asked: dict[str, Any] = {"seed": 3, "num_envs": 4, "max_env_steps": 900, "checkpoint_every": 300,
                             "evaluation_episodes": 2, "window": 5}  # fmt: skip
    return SessionSettings("a walk", name, algorithms.config_from(config_class, known), **asked | changes)


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def assert_same(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape, path
        assert one.numpy().tobytes() == other.numpy().tobytes(), path
    elif isinstance(one, Mapping):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}.{index}")
    else:
        assert one == other or (one != one and other != other), f"{path}: {one} and {other}"


def saved(folder: Path) -> dict[str, Any]:
    return checkpoint.load(folder / "checkpoint.pt")


# --------------------------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("name", ["ppo", "impala", "dqn"])
def test_an_actor_that_takes_turns_is_as_one_process(tmp_path: Path, name: str) -> None:
    here = run_session(settings(name), tmp_path / "here", far_envs.walks)
    there = run_session(settings(name, topology=TURNS), tmp_path / "there", far_envs.walks)
    assert (here.status, here.env_steps, here.episodes) == (there.status, there.env_steps, there.episodes)
    assert here.evaluation == there.evaluation
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert table(here.folder / "episodes.csv") == table(there.folder / "episodes.csv")
    rows = records.read_table(there.folder / "metrics.csv")
    assert set(rows["actor_lag"]) == {0.0}
    assert set(rows["lag_0"]) == {1.0}


def test_an_actor_killed_while_it_opens_its_environments_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    here = run_session(settings("ppo"), tmp_path / "here", far_envs.walks)
    opens = partial(far_envs.killed_once, str(tmp_path))
    there = run_session(settings("ppo", topology=TURNS), tmp_path / "there", opens)
    assert (tmp_path / "killed").exists()
    assert there.restarts == 0
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert records.read_table(there.folder / "metrics.csv")["actors_replaced"][-1] == 1


def test_several_actors_that_take_turns_give_the_same_batches_as_in_one_process(tmp_path: Path) -> None:
    asked = settings("ppo", checkpoint_every=10**6, topology=Topology(actors=2, ahead=0))
    there = run_session(asked, tmp_path / "there", far_envs.walks)
    # The same roles, one after the other in this process.
    _, build = algorithms.load("ppo")
    worlds = [far_envs.walks(2) for _ in range(2)]
    spaces = worlds[0].single_observation_space, worlds[0].single_action_space
    algorithm = build(asked.config, *spaces, seed_of(3, "learner"))
    actors = []
    for index, world in enumerate(worlds):
        generator = torch.Generator().manual_seed(seed_of(3, "actor", f"actor {index}"))
        actor = Actor(world, algorithm.policy, seed=None, generator=generator)
        actor.begin(world.reset(seed=seed_of(3, "environments") // 2 + 2 * index)[0])
        actors.append(actor)
    while sum(actor.env_steps for actor in actors) < 900:
        rollouts = [Rollout(algorithm.rollout_steps) for _ in actors]
        for actor, rollout in zip(actors, rollouts, strict=True):
            for transition in actor.collect(rollout.length):
                rollout.add(transition)
        names = rollouts[0].columns
        algorithm.update(
            batch_of({name: np.concatenate([rollout.columns[name] for rollout in rollouts], 1) for name in names})
        )
    assert set(FIELDS) <= set(names)
    assert_same(algorithm.state_dict(), saved(there.folder)["state"])


def test_a_session_in_turns_resumes_to_the_bit(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(progress: Progress) -> None:
        if progress.env_steps >= 500:
            raise Killed

    asked = settings("dqn", topology=Topology(actors=2, ahead=0))
    whole = run_session(asked, tmp_path / "whole", far_envs.walks)
    with pytest.raises(Killed):
        run_session(asked, tmp_path / "parts", far_envs.walks, die)
    parts = run_session(asked, tmp_path / "parts", far_envs.walks, resume=True)
    assert_same(saved(whole.folder)["state"], saved(parts.folder)["state"])
    assert table(whole.folder / "episodes.csv") == table(parts.folder / "episodes.csv")


# ------------------------------------------------------------------------------------------------------- side by side


def test_actors_run_ahead_and_the_lag_is_measured(tmp_path: Path) -> None:
    asked = settings("impala", max_env_steps=4000, topology=Topology(actors=2, ahead=2))
    told: list[Progress] = []
    result = run_session(asked, tmp_path, far_envs.walks, told.append)
    assert result.status == "budget spent"
    assert told[-1].processes.keys() >= {"actor_lag", "queue", "learner_waiting", "actor_waiting"}
    rows = records.read_table(result.folder / "metrics.csv")
    bins = np.array([rows[f"lag_{low}"] for low in (0, 1, 2, 4, 8, 16)])
    assert np.allclose(bins.sum(0), 1.0)
    assert max(rows["actor_lag"]) > 0
    for share in ("queue", "learner_waiting", "actor_waiting"):
        assert 0.0 <= min(rows[share]) <= max(rows[share]) <= 1.0
    assert min(rows["actor_steps_per_second"]) > 0
    assert [e["env"] for e in table(result.folder / "episodes.csv") if int(e["env"]) >= 2], "the second actor's"


def test_what_is_too_old_is_dropped(tmp_path: Path) -> None:
    asked = settings("impala", max_env_steps=3000, topology=Topology(actors=2, ahead=3, max_lag=0))
    result = run_session(asked, tmp_path, far_envs.walks)
    rows = records.read_table(result.folder / "metrics.csv")
    assert set(rows["actor_lag"]) == {0.0}
    assert rows["rollouts_dropped"][-1] > 0


# --------------------------------------------------------------------------------------------------------------- faults


def test_killed_actors_are_replaced_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    killed: list[int] = []
    pids = tmp_path / "pids"
    pids.mkdir()

    def kill(progress: Progress) -> None:
        alive = [int(path.name) for path in pids.iterdir() if int(path.name) not in killed]
        if progress.env_steps >= 1000 * (len(killed) + 1) and len(killed) < 3 and len(alive) == 2:
            killed.append(alive[len(killed) % 2])
            os.kill(killed[-1], signal.SIGKILL)

    asked = settings("impala", max_env_steps=8000, evaluation_episodes=0, topology=Topology(actors=2, ahead=1))
    result = run_session(asked, tmp_path, partial(far_envs.noted, str(pids)), kill)
    assert result.status == "budget spent"
    assert len(killed) == 3
    rows = records.read_table(result.folder / "metrics.csv")
    assert rows["actors_replaced"][-1] == 3
    episodes = table(result.folder / "episodes.csv")
    assert all((row["length"], float(row["return"])) == ("100", 100.0) for row in episodes), "no half, no double steps"
    assert result.episodes * 100 <= result.env_steps + 2 * 4 * 100


@pytest.mark.parametrize(
    ("open_envs", "error", "said"),
    [
        (far_envs.broken, RunError, "there is no such game here"),
        (far_envs.doomed, RunError, "it never works"),
    ],
)
def test_an_actor_that_cannot_work_ends_the_session(
    tmp_path: Path, open_envs: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run_session(settings("dqn", topology=TURNS), tmp_path, open_envs)


def test_environments_that_only_this_process_knows(tmp_path: Path) -> None:
    bound = 3.0
    opens = lambda count: far_envs.walks(int(bound) - 3 + count)  # noqa: E731  # a lambda is what is tried
    result = run_session(settings("ppo", topology=TURNS), tmp_path / "made", opens)
    assert result.status == "budget spent"
    lock = threading.Lock()
    with pytest.raises(SpecError, match="cannot be sent to another process"):
        run_session(settings("ppo", topology=TURNS), tmp_path / "held", lambda count: (lock, far_envs.walks(count))[1])


def test_environments_that_break_now_and_then_are_replaced(tmp_path: Path) -> None:
    asked = settings("dqn", max_env_steps=1500, evaluation_episodes=0, topology=Topology(actors=1, ahead=1))
    result = run_session(asked, tmp_path, far_envs.fragile)
    assert result.status == "budget spent"
    assert result.restarts >= 4


def test_more_actors_than_fit_and_settings_that_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"ahead: a2c learns only"):
        run_session(settings("a2c", topology=Topology(actors=2)), tmp_path / "a", far_envs.walks)
    monkeypatch.setattr("longrein.lab.role_process.ROLE_BYTES", 2**60)
    with pytest.raises(RunError, match="fewer actors"):
        run_session(settings("dqn", topology=TURNS), tmp_path / "b", far_envs.walks)


def test_an_actor_that_is_never_ready_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrein.lab.role_process.READY_SECONDS", 0.5)
    with pytest.raises(RunError, match="was not ready"):
        run_session(settings("dqn", topology=TURNS), tmp_path, far_envs.asleep)


def test_an_interrupted_session_ends_its_actors(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.env_steps > 300:
            os.kill(os.getpid(), signal.SIGINT)

    asked = settings("dqn", max_env_steps=10**7, topology=Topology(actors=2, ahead=1))
    result = run_session(asked, tmp_path, far_envs.counts, interrupt)
    assert result.status == "interrupted"


LEARNER = """
import sys
from pathlib import Path
from functools import partial
sys.path.insert(0, {tests!r})
from lab import far_envs, test_crew
from longrein.lab.session import run_session
from longrein.lab.topology import Topology

if __name__ == "__main__":
    asked = test_crew.settings("dqn", max_env_steps=10**9, evaluation_episodes=0, topology=Topology(actors=2))
    run_session(asked, Path({run!r}), partial(far_envs.noted, {pids!r}), resume=True)
"""


def test_a_killed_learner_leaves_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    pids, run = tmp_path / "pids", tmp_path / "run"
    pids.mkdir()
    script = tmp_path / "trains.py"
    script.write_text(LEARNER.format(tests=str(Path(__file__).parents[1]), run=str(run), pids=str(pids)))
    file = run / "session_3" / "checkpoint.pt"
    steps = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
        before = steps[-1] if steps else 0
        deadline = time.monotonic() + 60
        while not file.exists() or checkpoint.load(file)["env_steps"] <= before:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
        steps.append(int(checkpoint.load(file)["env_steps"]))
        deadline = time.monotonic() + 20
        while any(psutil.pid_exists(int(path.name)) for path in pids.iterdir()):
            assert time.monotonic() < deadline, "actors outlive their learner"
            time.sleep(0.05)
        while list(Path("/dev/shm").glob(f"{PREFIX}-{process.pid}-*")):
            assert time.monotonic() < deadline, "shared memory stays behind"
            time.sleep(0.05)
    assert steps[1] > steps[0] >= 300, "it went on from where it was"
    episodes = [int(row["env_steps"]) for row in table(run / "session_3" / "episodes.csv")]
    assert episodes == sorted(episodes)
