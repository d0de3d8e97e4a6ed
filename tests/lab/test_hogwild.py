"""Hogwild workers: one alone as one process to the bit, several whole when some are killed, nothing left at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from lab import far_envs
from lab.test_crew import assert_same, saved, settings, table

from longrein.errors import CheckpointError, RunError, SpecError
from longrein.lab import checkpoint, records, topology
from longrein.lab import spec as specs
from longrein.lab.experiment import open_envs, session_settings
from longrein.lab.session import Progress, run_session
from longrein.lab.topology import Topology
from longrein.learn.natural import NaturalGradient

ALONE, TWO = Topology(hogwild=1), Topology(hogwild=2)
SHARING = ("a3c", "acer", "async_q")


pytestmark = pytest.mark.usefixtures("undrawn", "nothing_stays")


class Killed(BaseException):
    pass


def die(progress: Progress) -> None:
    if progress.env_steps >= 500:
        raise Killed


# --------------------------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("name", SHARING)
def test_one_worker_is_as_one_process(tmp_path: Path, name: str) -> None:
    here = run_session(settings(name), tmp_path / "here", far_envs.walks)
    asked = settings(name, topology=ALONE)
    there = run_session(asked, tmp_path / "there", far_envs.walks)
    assert (here.status, here.env_steps, here.episodes) == (there.status, there.env_steps, there.episodes)
    assert here.evaluation == there.evaluation
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])
    assert table(here.folder / "episodes.csv") == table(there.folder / "episodes.csv")
    rows, serial = (records.read_table(one.folder / "metrics.csv") for one in (there, here))
    assert_same(*({key: one[key] for key in serial if key != "seconds"} for one in (rows, serial)))
    assert set(rows["actor_lag"]) == {0.0}


def test_a_worker_killed_while_it_opens_its_environments_is_as_if_it_had_not_been(tmp_path: Path) -> None:
    here = run_session(settings("a3c"), tmp_path / "here", far_envs.walks)
    opens = partial(far_envs.killed_once, str(tmp_path))
    there = run_session(settings("a3c", topology=ALONE), tmp_path / "there", opens)
    assert (tmp_path / "killed").exists()
    assert there.restarts == 0
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("a3c", {}), ("a3c", {"statistics": "own"}), ("a3c", {"natural": NaturalGradient()}), ("acer", {}),
        ("async_q", {"epsilon": None, "statistics": "own"}),
    ],
)  # fmt: skip
def test_one_worker_resumes_to_the_bit(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    asked = settings(name, topology=ALONE, evaluation_every=200)
    asked = replace(asked, config=replace(asked.config, **changes))
    whole = run_session(asked, tmp_path / "whole", far_envs.walks)
    with pytest.raises(Killed):
        run_session(asked, tmp_path / "parts", far_envs.walks, die)
    parts = run_session(asked, tmp_path / "parts", far_envs.walks, resume=True)
    assert_same(saved(whole.folder)["state"], saved(parts.folder)["state"])
    for name_ in ("episodes.csv", "evaluation.csv"):
        assert table(whole.folder / name_) == table(parts.folder / name_)


# ------------------------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("name", SHARING)
def test_workers_learn_at_once_and_their_lag_is_measured(tmp_path: Path, name: str) -> None:
    asked = settings(name, max_env_steps=4000, checkpoint_every=1000, topology=TWO)
    told: list[Progress] = []
    result = run_session(asked, tmp_path, far_envs.walks, told.append)
    assert result.status == "budget spent"
    assert told[-1].processes.keys() >= {"actor_lag", "actor_waiting"}
    rows = records.read_table(result.folder / "metrics.csv")
    bins = np.array([rows[f"lag_{low}"] for low in (0, 1, 2, 4, 8, 16)])
    assert np.allclose(bins.sum(0), 1.0)
    assert max(rows["actor_lag"]) > 0, "none wrote between another's copy and its write"
    for share in ("actor_learning", "actor_waiting"):
        assert 0.0 <= min(rows[share]) <= max(rows[share]) <= 1.0
    assert min(rows["actor_steps_per_second"]) > 0
    episodes = table(result.folder / "episodes.csv")
    assert {e["env"] for e in episodes} == {"0", "1", "2", "3"}
    ended = [int(e["env_steps"]) for e in episodes]
    assert ended == sorted(ended)
    assert ended[-1] <= result.env_steps
    last = saved(result.folder)
    assert last["state"]["env_steps"] == result.env_steps
    # Each update was reported once; ACER writes several times in one.
    assert (
        (last["state"]["updates"] > last["version"])
        if name == "acer"
        else (last["state"]["updates"] == last["version"])
    )
    assert sum(int(e["length"]) for e in episodes) <= result.env_steps


def test_workers_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    asked = settings("acer", topology=TWO)
    with pytest.raises(Killed):
        run_session(asked, tmp_path, far_envs.walks, die)
    folder = tmp_path / "session_3"
    before = saved(folder)
    assert [own is not None for own in before["resume"]["actors"][0][0]["own"]] == [False, True]
    assert 300 <= before["env_steps"] < 900
    result = run_session(asked, tmp_path, far_envs.walks, resume=True)
    after = saved(folder)
    assert result.status == "budget spent"
    assert after["state"]["env_steps"] == result.env_steps >= 900
    assert after["state"]["updates"] > before["state"]["updates"]
    with pytest.raises(CheckpointError, match="topology"):
        run_session(settings("acer", topology=Topology(hogwild=4)), tmp_path, far_envs.walks, resume=True)


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["a3c", "acer"])
def test_killed_workers_are_replaced_and_nothing_is_counted_twice(tmp_path: Path, name: str) -> None:
    killed: list[int] = []
    pids = tmp_path / "pids"
    pids.mkdir()

    def kill(progress: Progress) -> None:
        alive = [int(path.name) for path in pids.iterdir() if int(path.name) not in killed]
        if progress.env_steps >= 1000 * (len(killed) + 1) and len(killed) < 3 and len(alive) == 2:
            killed.append(alive[len(killed) % 2])
            os.kill(killed[-1], signal.SIGKILL)

    asked = settings(name, max_env_steps=5000, checkpoint_every=1000, evaluation_episodes=0, topology=TWO)
    result = run_session(asked, tmp_path, partial(far_envs.noted, str(pids)), kill)
    assert result.status == "budget spent"
    assert len(killed) == 3
    rows = records.read_table(result.folder / "metrics.csv")
    assert rows["actors_replaced"][-1] == 3
    episodes = table(result.folder / "episodes.csv")
    assert all((row["length"], float(row["return"])) == ("100", 100.0) for row in episodes), "no half, no double steps"
    last = saved(result.folder)
    assert result.episodes * 100 <= result.env_steps == last["state"]["env_steps"]
    # A rollout is 20 steps of 2 environments. What was counted was reported, but for at most the one update that each
    # killed worker was in.
    turns = result.env_steps // (20 * 2)
    assert 0 <= turns - last["version"] <= len(killed)
    assert name == "acer" or last["version"] <= last["state"]["updates"] <= turns


@pytest.mark.parametrize(
    ("open_envs", "said"),
    [(far_envs.broken, "there is no such game here"), (far_envs.doomed, "it never works")],
)
def test_a_worker_that_cannot_work_ends_the_session(tmp_path: Path, open_envs: Any, said: str) -> None:
    with pytest.raises(RunError, match=said):
        run_session(settings("a3c", topology=TWO), tmp_path, open_envs)


def test_a_worker_that_is_never_ready_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrein.lab.role_process.READY_SECONDS", 0.5)
    with pytest.raises(RunError, match="worker 0 was not ready"):
        run_session(settings("a3c", topology=ALONE), tmp_path, far_envs.asleep)


def test_an_interrupted_session_ends_its_workers(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.env_steps > 300:
            os.kill(os.getpid(), signal.SIGINT)

    result = run_session(settings("a3c", max_env_steps=10**7, topology=TWO), tmp_path, far_envs.counts, interrupt)
    assert result.status == "interrupted"


def test_what_hogwild_does_not_go_with_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match=r"hogwild: ppo has no rule"):
        topology.check(TWO, "ppo", 4, 1)
    with pytest.raises(SpecError, match=r"hogwild: .*2 bodies"):
        topology.check(TWO, "a3c", 4, 2)
    with pytest.raises(SpecError, match=r"hogwild: 2 cannot share 3"):
        topology.check(TWO, "a3c", 3, 1)
    with pytest.raises(SpecError, match=r"engine: hogwild workers share memory"):
        topology.check(Topology(hogwild=2, engine="ray"), "a3c", 4, 1)
    with pytest.raises(SpecError, match=r"inference: hogwild workers act"):
        Topology(hogwild=2, inference="central")
    asked = settings("acer", topology=TWO)
    object.__setattr__(asked.config, "optimizer", "nadam")
    with pytest.raises(SpecError, match=r"acer.optimizer: 'nadam' has no statistics"):
        run_session(asked, tmp_path / "a", far_envs.walks)
    monkeypatch.setattr("longrein.lab.role_process.ROLE_BYTES", 2**60)
    with pytest.raises(RunError, match="fewer workers"):
        run_session(settings("a3c", topology=TWO), tmp_path / "b", far_envs.walks)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHARING)
def test_two_workers_learn_cartpole(tmp_path: Path, name: str) -> None:
    spec = specs.load(Path(__file__).parents[2] / "spec" / f"{name}.yaml", f"{name}_cartpole_hogwild")
    result = run_session(session_settings(spec, 1000), tmp_path, partial(open_envs, spec.envs[0]))
    assert result.solved
    assert np.mean(result.evaluation) >= 475


SESSION = """
import sys
from pathlib import Path
from functools import partial
sys.path.insert(0, {tests!r})
from lab import far_envs, test_crew
from longrein.lab.session import run_session
from longrein.lab.topology import Topology

if __name__ == "__main__":
    asked = test_crew.settings("a3c", max_env_steps=10**9, evaluation_episodes=0, topology=Topology(hogwild=2))
    run_session(asked, Path({run!r}), partial(far_envs.noted, {pids!r}), resume=True)
"""


def test_a_killed_session_leaves_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    pids, run = tmp_path / "pids", tmp_path / "run"
    pids.mkdir()
    script = tmp_path / "trains.py"
    script.write_text(SESSION.format(tests=str(Path(__file__).parents[1]), run=str(run), pids=str(pids)))
    file = run / "session_3" / "checkpoint.pt"
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    assert len(list(pids.iterdir())) == 2
    while any(psutil.pid_exists(int(path.name)) for path in pids.iterdir()):
        assert time.monotonic() < deadline, "workers outlive their session"
        time.sleep(0.05)
    assert list(Path("/dev/shm").glob(f"torch_{process.pid}_*")) == []
    before = checkpoint.load(file)["env_steps"]
    asked = settings("a3c", max_env_steps=before + 500, evaluation_episodes=0, topology=TWO)
    result = run_session(asked, run, far_envs.counts, resume=True)
    assert result.env_steps >= before + 500, "it went on from where it was"
