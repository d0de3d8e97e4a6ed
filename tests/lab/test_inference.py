"""Central inference: as one process to the bit, replaced when it is killed, gone at the end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from lab import far_envs
from lab.small import until
from lab.test_crew import assert_same, saved, settings, table

from longrein.errors import RoleDied, RunError, SpecError
from longrein.lab import records
from longrein.lab.channel import PREFIX
from longrein.lab.inference import BINS, Asking, Batching, Desk, forms
from longrein.lab.session import Progress, run_session
from longrein.lab.topology import Topology
from longrein.learn import algorithms

TURNS = Topology(actors=2, inference="central", ahead=0)


pytestmark = pytest.mark.usefixtures("undrawn", "nothing_stays")


# --------------------------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize(("name", "actors"), [("ppo", 2), ("dqn", 4)])
def test_actors_in_turns_are_as_one_process(tmp_path: Path, name: str, actors: int) -> None:
    topology = Topology(actors=actors, inference="central", ahead=0)
    here = run_session(settings(name), tmp_path / "here", far_envs.walks)
    there = run_session(settings(name, topology=topology), tmp_path / "there", far_envs.walks)
    assert (here.status, here.env_steps, here.episodes) == (there.status, there.env_steps, there.episodes)
    assert here.evaluation == there.evaluation
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert table(here.folder / "episodes.csv") == table(there.folder / "episodes.csv")
    rows = records.read_table(there.folder / "metrics.csv")
    assert set(rows["actor_lag"]) == {0.0}
    assert set(rows["inference_batch"]) == {4.0}
    assert set(rows["inference_batch_4"]) == {1.0}


def test_a_policy_that_remembers_is_asked_with_its_state(tmp_path: Path) -> None:
    config_class, _ = algorithms.load("ppo")
    config = {"net": {"hidden": [16], "recurrent": "gru"}, "rollout_steps": 32, "minibatch_size": 64, "epochs": 2}
    asked = replace(settings("ppo", max_env_steps=600), config=algorithms.config_from(config_class, config))
    here = run_session(asked, tmp_path / "here", far_envs.walks)
    there = run_session(replace(asked, topology=TURNS), tmp_path / "there", far_envs.walks)
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])


def test_a_session_in_turns_resumes_to_the_bit(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(progress: Progress) -> None:
        if progress.env_steps >= 500:
            raise Killed

    asked = settings("dqn", topology=TURNS)
    here = run_session(settings("dqn"), tmp_path / "here", far_envs.walks)
    with pytest.raises(Killed):
        run_session(asked, tmp_path / "parts", far_envs.walks, die)
    parts = run_session(asked, tmp_path / "parts", far_envs.walks, resume=True)
    assert_same(saved(here.folder)["state"], saved(parts.folder)["state"])
    assert table(here.folder / "episodes.csv") == table(parts.folder / "episodes.csv")


# --------------------------------------------------------------------------------------------------------------- faults


def inference_process() -> psutil.Process:
    found = [child for child in multiprocessing.active_children() if child.name == "inference"]
    return psutil.Process(found[0].pid)


def test_killed_inference_is_replaced_and_the_weights_are_the_same_to_the_bit(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.env_steps >= 250 * (len(killed) + 1) and len(killed) < 2:
            killed.append(inference_process().pid)
            os.kill(killed[-1], signal.SIGKILL)

    here = run_session(settings("dqn"), tmp_path / "here", far_envs.walks)
    there = run_session(settings("dqn", topology=TURNS), tmp_path / "there", far_envs.walks, kill)
    assert len(set(killed)) == 2
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert table(here.folder / "episodes.csv") == table(there.folder / "episodes.csv")
    assert records.read_table(there.folder / "metrics.csv")["inference_replaced"][-1] == 2


def test_inference_killed_at_any_moment_loses_nothing(tmp_path: Path) -> None:
    stop, killed = threading.Event(), []

    def killer() -> None:
        while not stop.wait(0.5) and len(killed) < 4:
            with suppress(IndexError, psutil.NoSuchProcess):
                inference_process().kill()
                killed.append(1)

    asked = {"max_env_steps": 1500, "num_envs": 2, "evaluation_episodes": 0, "checkpoint_every": 10**6}
    here = run_session(settings("dqn", **asked), tmp_path / "here", far_envs.counts)
    thread = threading.Thread(target=killer)
    thread.start()
    try:
        there = run_session(settings("dqn", topology=TURNS, **asked), tmp_path / "there", far_envs.counts)
    finally:
        stop.set()
        thread.join()
    assert killed
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert all((row["length"], float(row["return"])) == ("100", 100.0) for row in table(there.folder / "episodes.csv"))


def test_an_actor_that_is_killed_delays_nobody(tmp_path: Path) -> None:
    killed: list[int] = []
    pids = tmp_path / "pids"
    pids.mkdir()

    def kill(progress: Progress) -> None:
        alive = [int(path.name) for path in pids.iterdir() if int(path.name) not in killed]
        if progress.env_steps >= 800 * (len(killed) + 1) and len(killed) < 2 and len(alive) == 2:
            killed.append(alive[len(killed) % 2])
            os.kill(killed[-1], signal.SIGKILL)

    topology = Topology(actors=2, inference="central", ahead=1)
    asked = settings("impala", max_env_steps=5000, evaluation_episodes=0, topology=topology)
    result = run_session(asked, tmp_path, partial(far_envs.noted, str(pids)), kill)
    assert result.status == "budget spent"
    assert len(killed) == 2
    rows = records.read_table(result.folder / "metrics.csv")
    assert rows["actors_replaced"][-1] == 2
    assert rows["inference_replaced"][-1] == 0
    assert all((row["length"], float(row["return"])) == ("100", 100.0) for row in table(result.folder / "episodes.csv"))


def test_inference_that_always_dies_ends_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrein.lab.inference_keeper.live", dies)
    with pytest.raises(RoleDied, match="inference died with exit code 7"):
        run_session(settings("dqn", topology=TURNS), tmp_path, far_envs.walks)
    until(lambda: not [below for child in psutil.Process().children() for below in child.children()], 10.0)


def test_inference_that_is_never_ready_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrein.lab.role_process.READY_SECONDS", 0.5)
    monkeypatch.setattr("longrein.lab.inference_keeper.live", sleeps)
    with pytest.raises(RunError, match=r"inference was not ready within 0\.5 s"):
        run_session(settings("dqn", topology=TURNS), tmp_path, far_envs.walks)


def sleeps(pipe: Any, role: bytes, bells: Any) -> None:
    time.sleep(60)


def dies(pipe: Any, role: bytes, bells: Any) -> None:
    """An inference process that breaks down at its first batch."""
    build = pipe.recv()
    _, make = algorithms.load("dqn")
    pipe.send(forms(make(settings("dqn").config, build.observation_space, build.action_space, 0).policy,
                    build.observation_space, 2))  # fmt: skip
    pipe.recv()
    os._exit(7)


def test_a_policy_that_raises_ends_the_session_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrein.lab.inference_keeper.live", raises)
    with pytest.raises(RunError, match="it does not like these weights"):
        run_session(settings("dqn", topology=TURNS), tmp_path, far_envs.walks)


def raises(pipe: Any, role: bytes, bells: Any) -> None:
    pipe.recv()
    pipe.send(RunError("it does not like these weights"))
    os._exit(0)


# ------------------------------------------------------------------------------------------------------- side by side


def test_actors_that_run_ahead_are_answered_when_they_ask(tmp_path: Path) -> None:
    topology = Topology(actors=2, inference="central", ahead=2, inference_batch=2, inference_wait_ms=2.0)
    result = run_session(settings("impala", max_env_steps=3000, topology=topology), tmp_path, far_envs.walks)
    assert result.status == "budget spent"
    rows = records.read_table(result.folder / "metrics.csv")
    assert 2.0 <= min(rows["inference_batch"]) <= max(rows["inference_batch"]) <= 4.0
    bins = np.array([rows[f"inference_batch_{low}"] for low in BINS])
    assert np.allclose(bins.sum(0), 1.0)
    assert 0.0 < min(rows["inference_share"]) <= max(rows["inference_share"]) <= 1.0
    assert min(rows["inference_requests_per_second"]) > 0
    assert min(rows["inference_wait_ms"]) >= 0
    assert max(rows["actor_lag"]) > 0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"inference_batch": 0, "inference": "central"}, "inference_batch: must be at least 1"),
        ({"inference_wait_ms": -1.0, "inference": "central"}, "inference_wait_ms: must not be negative"),
        ({"inference_batch": 4}, "inference_batch: goes with central inference"),
        ({"inference_batch": 5, "inference": "central"}, "inference_batch: 5 rows of 4 environments"),
        ({"engine": "ray", "inference": "central"}, "engine: Ray actors choose with a copy"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        run_session(settings("dqn", topology=Topology(actors=2, **asked)), tmp_path, far_envs.walks)


# --------------------------------------------------------------------------------------------------- without processes


def test_when_a_batch_is_due() -> None:
    all_of_them, half, hasty = Batching(2, 8, None), Batching(2, 4, None), Batching(2, 8, 0.5)
    assert all_of_them.left([], acting=4, now=10.0) is None
    assert all_of_them.left([9.0, 8.0, 9.5], acting=4, now=10.0) is None
    assert all_of_them.left([9.0, 8.0, 9.5], acting=3, now=10.0) == 0.0, "the fourth waits for room, or is dead"
    assert half.left([9.0], acting=4, now=10.0) is None
    assert half.left([9.0, 9.5], acting=4, now=10.0) == 0.0
    assert hasty.left([9.9, 9.75], acting=4, now=10.0) == 0.25
    assert hasty.left([9.9, 9.25], acting=4, now=10.0) == 0.0


def test_who_waited_longest_is_answered_first_in_the_order_of_actors() -> None:
    assert Batching(2, 8, None).chosen([0, 1, 3], [3.0, 2.0, 1.0]) == [0, 1, 3]
    assert Batching(2, 4, None).chosen([0, 1, 3], [3.0, 2.0, 1.0]) == [1, 3]
    assert Batching(2, 5, None).chosen([0, 1, 3], [3.0, 2.0, 1.0]) == [1, 3], "a request is not parted"
    assert Batching(2, 1, None).chosen([0, 1, 3], [3.0, 2.0, 1.0]) == [3], "nor too large"


@pytest.fixture
def desk() -> Iterator[tuple[Desk, Any]]:
    _, build = algorithms.load("ppo")
    spaces = far_envs.Walk.observation_space, far_envs.Walk.action_space
    policy = build(settings("ppo").config, *spaces, 0).policy
    made = Desk(2, *forms(policy, spaces[0], 3))
    made.begin(torch.Generator().manual_seed(5).get_state().numpy().tobytes())
    yield made, policy
    made.close()


def test_a_batch_is_the_same_as_one_policy_would_choose_and_counts_once_committed(desk: tuple[Desk, Any]) -> None:
    at, policy = desk
    observations = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
    for actor in range(2):
        at.ask(actor, {"observation": observations[actor]})
    assert at.waiting() == [0, 1]
    action, extras = policy.act(observations.reshape(6, 2), generator=torch.Generator().manual_seed(5))
    before = at.draws
    for _ in range(2):  # as by one that died before the batch counted, and by one after it
        at._head["committed"][...] = 0
        assert at.draws == before
        assert at.waiting() == [0, 1]
        generator = torch.Generator()
        generator.set_state(torch.frombuffer(bytearray(at.draws), dtype=torch.uint8))
        at.answer(at.waiting(), policy, 7, generator)
        for actor in range(2):
            arrays, version = at.answer_to(actor)
            part = slice(3 * actor, 3 * actor + 3)
            assert np.array_equal(arrays["action"], action[part])
            assert np.array_equal(arrays["extras.log_prob"], extras["log_prob"][part])
            assert version == 7
    assert at.waiting() == []
    assert at.draws == generator.get_state().numpy().tobytes() != before


def test_who_asks_gets_the_oldest_version_that_answered_and_an_end(desk: tuple[Desk, Any]) -> None:
    at, policy = desk
    versions = iter([4, 3, 5])
    rung: list[int] = []
    generator = torch.Generator().manual_seed(0)
    asking = Asking(policy, at, 1, lambda: rung.append(1),
                    lambda: at.answer(at.waiting(), policy, next(versions), generator))  # fmt: skip
    for _ in range(3):
        asking.act(np.zeros((3, 2), np.float32))
    assert asking.rest() == 3
    assert not at.acting[1]
    assert len(rung) == 4
    with pytest.raises(RunError, match=r"observation is float32 \[2, 2\], and was float32 \[3, 2\]"):
        asking.act(np.zeros((2, 2), np.float32))
    ended = Asking(policy, at, 1, at.shut, lambda: None)
    with pytest.raises(EOFError):
        ended.act(np.zeros((3, 2), np.float32))


# ----------------------------------------------------------------------------------------------------------- at the end

LEARNER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from lab import far_envs, test_crew
from longrein.lab.session import run_session
from longrein.lab.topology import Topology

if __name__ == "__main__":
    asked = test_crew.settings("dqn", max_env_steps=10**9, evaluation_every=300,
                               topology=Topology(actors=2, inference="central"))
    run_session(asked, Path({run!r}), far_envs.counts)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_killed_learner_leaves_no_process_and_no_memory(tmp_path: Path) -> None:
    script = tmp_path / "trains.py"
    script.write_text(LEARNER.format(tests=str(Path(__file__).parents[1]), run=str(tmp_path / "run")))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    until((tmp_path / "run" / "session_3" / "evaluation.csv").exists)
    staff = psutil.Process(process.pid).children(recursive=True)
    assert len(staff) >= 4, "two actors, inference, an evaluator"
    process.kill()
    process.wait()
    until(lambda: not any(one.is_running() for one in staff), 20.0)
    until(lambda: not list(Path("/dev/shm").glob(f"{PREFIX}-{process.pid}-*")), 10.0)
