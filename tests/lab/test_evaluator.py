"""Evaluation in a process of its own: the serial session's scores, while training goes on, whatever is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from lab import far_envs
from lab.test_crew import assert_same, saved, settings, table

from longrein.errors import RunError
from longrein.lab.evaluator import PENDING, Evaluator
from longrein.lab.evaluator_process import EvaluatorRole
from longrein.lab.session import Progress, run_session
from longrein.lab.topology import Topology
from longrein.learn import algorithms

TURNS = Topology(actors=1, ahead=0)


pytestmark = pytest.mark.usefixtures("undrawn", "nothing_stays")


def evaluator_process() -> psutil.Process | None:
    found = [child for child in multiprocessing.active_children() if child.name == "evaluator"]
    return psutil.Process(found[0].pid) if found else None


def test_scores_are_those_of_one_process_and_training_goes_on_meanwhile(tmp_path: Path) -> None:
    asked = {"evaluation_every": 300, "max_env_steps": 1200}
    here = run_session(settings("dqn", **asked), tmp_path / "here", far_envs.walks)
    noted = tmp_path / "there" / "session_3" / "evaluation.csv"
    waited: list[int] = []

    def look(progress: Progress) -> None:
        if not noted.exists():
            waited.append(progress.env_steps)

    slow = partial(far_envs.slow_to_evaluate, 0.4)
    there = run_session(settings("dqn", topology=TURNS, **asked), tmp_path / "there", slow, look)
    assert table(here.folder / "evaluation.csv") == table(noted)
    assert len({row["env_steps"] for row in table(noted)}) == 4
    assert waited[-1] > 600, "it went on after the first was asked for"
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])


def test_a_killed_evaluator_is_replaced_and_the_evaluation_done_again(tmp_path: Path) -> None:
    asked = {"evaluation_every": 300, "max_env_steps": 1200}
    here = run_session(settings("dqn", **asked), tmp_path / "here", far_envs.walks)
    playing, stop = tmp_path / "playing", threading.Event()
    playing.mkdir()
    killed: list[int] = []

    def killer() -> None:
        while len(killed) < 2 and not stop.wait(0.01):
            found = evaluator_process()
            if found is not None and found.pid not in killed and (playing / str(found.pid)).exists():
                found.kill()
                killed.append(found.pid)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        slow = partial(far_envs.slow_to_evaluate, 0.3, str(playing))
        there = run_session(settings("dqn", topology=TURNS, **asked), tmp_path / "there", slow)
    finally:
        stop.set()
        thread.join()
    assert len(killed) == 2
    assert table(here.folder / "evaluation.csv") == table(there.folder / "evaluation.csv")
    assert_same(saved(here.folder)["state"], saved(there.folder)["state"])


def test_evaluations_that_wait_are_in_the_checkpoint(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(progress: Progress) -> None:
        if progress.env_steps >= 900:
            raise Killed

    asked = {"evaluation_every": 300, "max_env_steps": 1200}
    here = run_session(settings("dqn", **asked), tmp_path / "here", far_envs.walks)
    topology = Topology(actors=1, ahead=0)
    with pytest.raises(Killed):
        run_session(settings("dqn", topology=topology, **asked), tmp_path / "parts",
                    partial(far_envs.slow_to_evaluate, 5.0), die)  # fmt: skip
    assert saved(tmp_path / "parts" / "session_3")["resume"]["evaluations"]
    assert not (tmp_path / "parts" / "session_3" / "evaluation.csv").exists()
    parts = run_session(settings("dqn", topology=topology, **asked), tmp_path / "parts", far_envs.walks, resume=True)
    assert table(here.folder / "evaluation.csv") == table(parts.folder / "evaluation.csv")


def test_an_interrupted_session_does_not_wait_and_closes_what_it_opened(tmp_path: Path) -> None:
    playing, found = tmp_path / "playing", []
    playing.mkdir()

    def interrupt(progress: Progress) -> None:
        process = evaluator_process()
        if not found and process is not None and (playing / str(process.pid)).exists():
            found.append(process.pid)
            os.kill(os.getpid(), signal.SIGINT)

    asked = settings("dqn", topology=Topology(actors=2, inference="central"), evaluation_every=300, max_env_steps=10**7)
    result = run_session(asked, tmp_path, partial(far_envs.slow_to_evaluate, 3.0, str(playing)), interrupt)
    assert result.status == "interrupted"
    assert not (result.folder / "evaluation.csv").exists()
    assert (playing / f"closed {found[0]}").exists()


def test_without_an_evaluator_training_waits(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"evaluation_every": 300, "max_env_steps": 600}
    topology = Topology(actors=1, ahead=0, evaluator=False)
    here = run_session(settings("dqn", **asked), tmp_path / "here", far_envs.walks)
    seen = []
    there = run_session(settings("dqn", topology=topology, **asked), tmp_path / "there", far_envs.walks,
                        lambda _: seen.append(evaluator_process()))  # fmt: skip
    assert set(seen) == {None}
    assert table(here.folder / "evaluation.csv") == table(there.folder / "evaluation.csv")


def test_environments_that_never_work_end_the_session(tmp_path: Path) -> None:
    asked = {"evaluation_every": 300, "max_env_steps": 10**6}
    with pytest.raises(RunError, match="nobody evaluates here"):
        run_session(settings("dqn", topology=TURNS, **asked), tmp_path, far_envs.never_to_evaluate)


def test_no_more_than_a_few_evaluations_wait() -> None:
    _, build = algorithms.load("dqn")
    config = settings("dqn").config
    policy = build(config, far_envs.Walk.observation_space, far_envs.Walk.action_space, 0).policy
    role = EvaluatorRole(far_envs.walks, 2, (2**30, 2**30 + 1), "dqn", config)
    noted: list[int] = []
    with closing(Evaluator(role, policy, lambda env_steps, rows: noted.append(env_steps))) as evaluator:
        for env_steps in range(100, 600, 100):
            evaluator.ask(env_steps)
            assert len(evaluator.state_dict()) <= PENDING
        assert noted[:3] == [100, 200, 300]
        evaluator.wait()
    assert noted == [100, 200, 300, 400, 500]


def test_weights_that_workers_share_are_evaluated_too(tmp_path: Path) -> None:
    asked = {"evaluation_every": 300, "max_env_steps": 900}
    here = run_session(settings("a3c", **asked), tmp_path / "here", far_envs.walks)
    there = run_session(settings("a3c", topology=Topology(hogwild=1), **asked), tmp_path / "there", far_envs.walks)
    assert table(here.folder / "evaluation.csv") == table(there.folder / "evaluation.csv")
