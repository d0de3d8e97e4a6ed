"""Searching: what a search block may say, and whole searches with real trials on Ray."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from longrein.errors import RunError, SpecError
from longrein.lab import search, search_table
from longrein.lab import spec as specs
from longrein.lab.search_space import Drawn, Method, Space, decoded, encoded
from longrein.lab.search_table import Experiment, Row

SPEC = """\
small:
  agent: {algorithm: {name: ppo, rollout_steps: 32}, net: {hidden: [16]}}
  env: {id: CartPole-v1, num_envs: 2}
  meta: {env_steps: 600, max_trial: 4, eval: {episodes: 2}}
  search:
"""


def load(tmp_path: Path, *lines: str, values: dict[str, Any] | None = None) -> specs.Spec:
    """The small spec with a search block of these lines."""
    (tmp_path / "spec.yaml").write_text(SPEC + "".join(f"    {line}\n" for line in lines))
    return specs.load(tmp_path / "spec.yaml", None, values)


LR = "agent.algorithm.lr: {loguniform: [1e-5, 1e-2]}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("agent.algorithm.lr: {loguniform: [1e-5, 1e-2]}", Drawn("loguniform", (1e-5, 1e-2))),
        ("agent.algorithm.lr: {loguniform: {high: 1e-2, low: 1e-5}}", Drawn("loguniform", (1e-5, 1e-2))),
        ("agent.algorithm.lr: {uniform: [0, 1]}", Drawn("uniform", (0, 1))),
        ("agent.algorithm.gamma: {quniform: [0.9, 1, 0.01]}", Drawn("quniform", (0.9, 1, 0.01))),
        ("agent.algorithm.minibatch_size: {qloguniform: [32, 512, 32]}", Drawn("qloguniform", (32, 512, 32))),
        ("agent.algorithm.clip: {normal: [0.2, 0.05]}", Drawn("normal", (0.2, 0.05))),
        ("agent.algorithm.epochs: {randint: [1, 5]}", Drawn("randint", (1, 5))),
        ("agent.net.hidden: {choice: [[16], [16, 16]]}", Drawn("choice", ([16], [16, 16]))),
        ("agent.net.activation: {grid: [tanh, relu]}", Drawn("grid", ("tanh", "relu"))),
        ("env.options.length: {grid: [3, 5]}", Drawn("grid", (3, 5))),
        ("meta.seed: {randint: [0, 100]}", Drawn("randint", (0, 100))),
    ],
)
def test_distributions_are_read(tmp_path: Path, text: str, expected: Drawn) -> None:
    (drawn,) = search.search_space(load(tmp_path, text)).drawn.values()
    assert drawn == expected


MISTAKES = [
    # what a block says, the dotted key of the mistake, its problem, the hint
    (["agent.algorithm.lrr: {uniform: [0, 1]}"], "search.agent.algorithm.lrr", "the spec has no key 'lrr'", "'lr'"),
    (["agnet.algorithm.lr: {uniform: [0, 1]}"], "search.agnet.algorithm.lr", "no key 'agnet'", "'agent'"),
    (["agent.0.algorithm.lr: {uniform: [0, 1]}"], "search.agent.0.algorithm.lr", "no key '0'", "one of"),
    (["agent: {algorithm: {lr: {uniform: [0, 1]}}}"], "search.agent", "no dotted key", "write agent.KEY"),
    (["lr: {uniform: [0, 1]}"], "search.lr", "is no dotted key of the spec", "one of method"),
    (["meta.max_trial: {grid: [1, 2]}"], "search.meta.max_trial", "cannot be searched", "same env steps"),
    (["agent.algorithm.name: {choice: [ppo, a2c]}"], "search.agent.algorithm.name", "cannot be searched", "same"),
    (["agent.algorithm.lr: 0.1"], "search.agent.algorithm.lr", "is 0.1, no distribution", "as in {loguniform"),
    (["agent.algorithm.lr: {}"], "search.agent.algorithm.lr", "has 0 distributions", "one, as in"),
    (["agent.algorithm.lr: {uniform: [0, 1], choice: [1]}"], "search.agent.algorithm.lr", "has 2", "one, as in"),
    (["agent.algorithm.lr: {logunifrom: [0.1, 1]}"], "search.agent.algorithm.lr.logunifrom", "no such d", "loguniform"),
    (["agent.algorithm.lr: {uniform: [1]}"], "search.agent.algorithm.lr.uniform", "takes 2 numbers, got 1", "low"),
    (["agent.algorithm.lr: {uniform: 1}"], "search.agent.algorithm.lr.uniform", "takes 2 numbers, got 1", "low, high"),
    (["agent.algorithm.lr: {uniform: {low: 0, hi: 1}}"], "search.agent.algorithm.lr.uniform.hi", "no such arg", "high"),
    (["agent.algorithm.lr: {uniform: [0, one]}"], "search.agent.algorithm.lr.uniform", "'one' is no number", "uniform"),
    (["agent.algorithm.lr: {uniform: [1, 0]}"], "search.agent.algorithm.lr.uniform", "1 is not below 0", "low, high"),
    (["agent.algorithm.lr: {loguniform: [0, 1]}"], "search.agent.algorithm.lr.loguniform", "no logarithm", "above 0"),
    (["agent.algorithm.lr: {quniform: [0, 1, 0]}"], "search.agent.algorithm.lr.quniform", "above 0, got 0", ""),
    (["agent.algorithm.lr: {quniform: [0, 1, 3]}"], "search.agent.algorithm.lr.quniform", "wider than 0", "smaller"),
    (["agent.algorithm.lr: {normal: [0, 0]}"], "search.agent.algorithm.lr.normal", "must be above 0", "normal"),
    (["agent.algorithm.epochs: {randint: [0.5, 2]}"], "search.agent.algorithm.epochs.randint", "whole numbers", "left"),
    (["agent.algorithm.lr: {choice: []}"], "search.agent.algorithm.lr.choice", "is an empty list", "choice: [32, 64]"),
    (["agent.algorithm.lr: {choice: 0.1}"], "search.agent.algorithm.lr.choice", "takes a list of values", "choice"),
    (["agent.algorithm.lr: {grid: [0.1, 0.1]}"], "search.agent.algorithm.lr.grid", "has 0.1 twice", "leave one out"),
    (["agent.algorithm.lr: {choice: [fast]}"], "search.agent.algorithm.lr", "'fast' does not fit", "one of a number"),
    (["agent.algorithm.epochs: {uniform: [1.5, 4]}"], "search.agent.algorithm.epochs", "1.5 does not fit", "whole"),
    (["agent.algorithm.epochs: {uniform: [1, 4]}"], "search.agent.algorithm.epochs", "2.145898 does not fit", "whole"),
    (["agent.net.activation: {choice: [tanh, relo]}"], "search.agent.net.activation", "'relo' does not fit", "relu"),
    (["method: optuna"], "search", "draws nothing", "agent.algorithm.lr"),
    ([LR, "method: {name: bayes}"], "search.method.name", "is 'bayes'", "one of random"),
    ([LR, "method: {metric: strength}"], "search.method.metric", "is 'strength'", "slm"),
    ([LR, "method: {nmae: asha}"], "search.method.nmae", "no such key", "'name'"),
    ([LR, "method: [asha]"], "search.method", "not a mapping", "method: {name: optuna}"),
    ([LR, "method: {cpus: many}"], "search.method.cpus", "is 'many'", "it takes a number"),
    ([LR, "method: {name: asha, reduction: 1}"], "search.method.reduction", "at least 2, got 1", ""),
    ([LR, "method: {name: asha, grace: 601}"], "search.method.grace", "beyond meta.env_steps, 600", "fewer"),
    ([LR, "method: {name: optuna, grace: 10}"], "search.method.grace", "is of asha", "name: asha"),
    ([LR, "method: grid"], "search.agent.algorithm.lr", "grid cannot try all of loguniform", "another method"),
    (["agent.algorithm.clip: {normal: [0.2, 0.1]}", "method: optuna"], "search.agent.algorithm.clip", "normal", "uni"),
    (["agent.algorithm.epochs: {grid: [1, 2]}", "method: optuna"], "search.agent.algorithm.epochs", "grid", "choice"),
    (["env.num_envs: {choice: [1, 2]}", "method: pbt"], "search.env.num_envs", "cannot change while", "algorithm"),
    (["agent.algorithm.epochs: {grid: [1, 2]}", "method: pbt"], "search.agent.algorithm.epochs", "anew", "choice"),
    (["agent.algorithm.epochs: {grid: [1, 2, 3, 4, 5]}"], "search", "have 5 points, and meta.max_trial is 4", ": 5"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "key", "problem", "hint"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_are_told_with_line_and_key(
    tmp_path: Path, lines: list[str], key: str, problem: str, hint: str
) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, *lines)
    assert caught.value.key == key
    assert problem in caught.value.problem
    assert hint in caught.value.hint
    line = 5 if key == "search" else 5 + len(lines) if key.startswith("search.method") and len(lines) > 1 else 6
    assert caught.value.file == f"{tmp_path / 'spec.yaml'}:{line}"


def test_trials_are_never_more_than_asked_for() -> None:
    lr = Drawn("loguniform", (1e-5, 1e-2))
    grid = Drawn("grid", (1, 2, 3))
    assert Space({"a.b": lr}, Method()).trials(8) == 8
    assert Space({"a.b": grid}, Method()).trials(8) == 3  # a grid is tried once
    assert Space({"a.b": grid, "a.c": lr}, Method()).trials(8) == 6  # each of its points twice


@pytest.mark.parametrize(
    ("drawn", "said", "value"),
    [
        (Drawn("quniform", (0.1, 0.9, 0.1)), 0.3333, 0.3),  # 3 * 0.1 is 0.30000000000000004
        (Drawn("qloguniform", (32, 512, 32)), 100.0, 96),  # 100 / 32 = 3.1, and 3 * 32 = 96
        (Drawn("qloguniform", (40, 512, 32)), 41.0, 40),  # 32 would be below the range
        (Drawn("randint", (1, 5)), 3, 3),
        (Drawn("uniform", (0, 1)), 0.25, 0.25),
        (Drawn("choice", ([16], [16, 16])), encoded([16]), [16]),
    ],
)
def test_what_is_drawn_becomes_a_plain_value(drawn: Drawn, said: Any, value: Any) -> None:
    found = decoded(Space({"a.b": drawn}, Method()), {"a.b": said})["a.b"]
    assert found == value
    assert type(found) is type(value)


def test_a_search_without_a_block_says_how_to_write_one(tmp_path: Path) -> None:
    spec = specs.from_plain("plain", {"agent": {"algorithm": {"name": "random"}}, "env": {"id": "CartPole-v1"}})
    with pytest.raises(SpecError, match="nothing to search") as caught:
        search.run_search(spec, tmp_path)
    assert "loguniform" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def experiment(rows: list[Row]) -> Experiment:
    drawn = {"agent.algorithm.lr": Drawn("loguniform", (1e-5, 1e-2)), "agent.net.hidden": Drawn("choice", ([8], [16]))}
    return Experiment("small", "ppo on CartPole-v1", Space(drawn, Method()), 4, tuple(rows))


def row(number: int, status: Any, lr: float, fitness: float | None) -> Row:
    drawn = {"agent.algorithm.lr": lr, "agent.net.hidden": [16]}
    parts = {"area_under_curve": fitness, "slm2018.strength": fitness / 2} if fitness and status == "finished" else {}
    return Row(number, status, 600, drawn, fitness, fitness, None, parts, f"trial_{number}")


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = load(tmp_path, LR, "agent.net.hidden: {choice: [[8], [16]]}")
    rows = [row(0, "finished", 1e-3, 30.0), row(1, "stopped early", 1e-4, 40.0), row(2, "failed", 1e-2, None)]
    found = experiment([*rows, row(3, "finished", 1e-5, 20.5)])
    search_table.write(tmp_path, spec, found)
    assert search_table.read(tmp_path) == found
    assert found.best == rows[0]  # what was stopped early is never the best: it was not tried to its end
    assert not found.interrupted


def test_the_best_spec_is_the_spec_with_what_was_drawn(tmp_path: Path) -> None:
    spec = load(tmp_path, LR, "agent.net.hidden: {choice: [[8], [16]]}")
    search_table.write(tmp_path, spec, experiment([row(0, "finished", 1.5e-3, 30.0)]))
    best = specs.load(tmp_path / "best.yaml")
    assert (best.name, best.search) == ("small", {})
    assert best.agents[0].config.lr == 1.5e-3
    assert best.meta == spec.meta


def test_what_is_no_search_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no search"):
        search.resume_search(tmp_path)


# ------------------------------------------------------------------------------------------------------ whole searches

GRADED = '''
"""An environment whose every step is worth its grade; a grade below 0 cannot be made."""

import time

import gymnasium


class Graded(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, grade, sleep):
        self.grade, self.sleep, self.t = grade, sleep, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        time.sleep(self.sleep)
        self.t += 1
        return self.observation_space.sample() * 0, float(self.grade), False, self.t == 10, {}


def make(grade=0, sleep=0.0):
    if grade < 0:
        raise RuntimeError("no such grade")
    return Graded(grade, sleep)
'''

GRADED_SPEC = """\
graded:
  agent: {algorithm: {name: random}}
  env: {id: "graded.py:make", num_envs: 1, options: {grade: 0, sleep: 0.0}}
  meta: {env_steps: 400, max_trial: 4, eval: {episodes: 1}}
  search:
    env.options.grade: {grid: [1, -1, 3, 2]}
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder with the graded environment."""
    command = [sys.executable, "-m", "longrein.cli", "run", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def only_run(folder: Path) -> Path:
    (found,) = (folder / "data").glob("*_*/experiment.json")
    return found.parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "graded.py").write_text(GRADED)
    (tmp_path / "spec.yaml").write_text(GRADED_SPEC)
    return tmp_path


def children_of_ray() -> list[psutil.Process]:
    """Processes that a search may leave behind."""
    names = ("raylet", "gcs_server", "ray::")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or [""]
        if any(name in line[0] for name in names):
            found.append(process)
    return found


@pytest.mark.timeout(300)
def test_a_search_ends_with_table_graph_and_best_spec_though_a_trial_dies(folder: Path) -> None:
    done = run(folder, "spec.yaml", "graded", "search", "--processes", "2")
    assert done.returncode == 0, done.stderr
    found = search_table.read(only_run(folder))
    by_grade = {row.drawn["env.options.grade"]: row for row in found.rows}
    assert {grade: row.status for grade, row in by_grade.items()} == {
        1: "finished", -1: "failed", 3: "finished", 2: "finished",
    }  # fmt: skip
    # an episode is ten steps, so a return is ten times the grade; until the first ends, 10 of the 400 steps, it is 0
    assert by_grade[3].fitness == pytest.approx(30 * 390 / 400)
    assert by_grade[3].parts["final_return"] == by_grade[3].mean_return == by_grade[3].evaluation == 30.0
    assert "RuntimeError: no such grade" in done.stderr
    failure = only_run(folder) / "failures" / f"trial_{by_grade[-1].number}.txt"
    assert failure.read_text().startswith("session 0 died:\nTraceback")
    assert (only_run(folder) / "experiment.png").stat().st_size > 10_000
    assert (only_run(folder) / by_grade[3].run / "session_0" / "result.json").exists()
    best = specs.load(only_run(folder) / "best.yaml", "graded")
    assert best.envs[0].options["grade"] == 3
    assert f"longrein run {only_run(folder)}/best.yaml graded" in done.stdout
    again = run(folder, str(only_run(folder) / "best.yaml"), "graded")
    assert again.returncode == 0, again.stderr
    assert "mean return 30.0" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_asha_stops_what_is_worse_at_the_same_env_steps(folder: Path) -> None:
    text = GRADED_SPEC.replace("[1, -1, 3, 2]", "[3, 2, 1, 0]").replace("400", "4000").replace("0.0}", "0.001}")
    method = "    method: {name: asha, grace: 1000, at_once: 1}\n"  # one after the other: the first is the best
    (folder / "spec.yaml").write_text(text + method)
    done = run(folder, "spec.yaml", "graded", "search", "--processes", "1")
    assert done.returncode == 0, done.stderr
    found = search_table.read(only_run(folder))
    assert [row.status for row in found.rows] == ["finished"] + 3 * ["stopped early"]
    assert found.best == found.rows[0]
    for row in found.rows[1:]:
        assert 1000 <= row.env_steps < 4000
        (session,) = only_run(folder).glob(f"trial_{row.number}_*/session_0")
        assert json.loads((session / "result.json").read_text())["status"] == "interrupted"  # a whole folder even so


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", ["optuna", "{name: asha, sampler: optuna, metric: final_return}"])
def test_optuna_draws(folder: Path, method: str) -> None:
    lines = ["env.options.grade: {uniform: [0, 3]}", "meta.seed: {choice: [0, 1]}", f"method: {method}"]
    head = GRADED_SPEC.partition("    env.options.grade")[0]
    (folder / "spec.yaml").write_text(head + "".join(f"    {line}\n" for line in lines))
    done = run(folder, "spec.yaml", "graded", "search", "--processes", "2")
    assert done.returncode == 0, done.stderr
    rows = search_table.read(only_run(folder)).rows
    assert len({row.drawn["env.options.grade"] for row in rows}) == 4
    assert all(0 <= row.drawn["env.options.grade"] <= 3 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pbt_copies_the_better_trial(folder: Path) -> None:
    text = GRADED_SPEC.replace("name: random", "name: ppo, rollout_steps: 32, minibatch_size: 32, epochs: 1")
    text = text.replace("400, max_trial: 4", "3000, max_trial: 2").replace("0.0}", "0.001}")
    text = text.partition("    env.options.grade")[0] + (
        "    agent.algorithm.lr: {loguniform: [1e-4, 1e-3]}\n    method: {name: pbt, perturb_every: 1000}\n"
    )
    (folder / "spec.yaml").write_text(text)
    done = run(folder, "spec.yaml", "graded", "search", "--processes", "2")
    assert done.returncode == 0, done.stderr
    rows = search_table.read(only_run(folder)).rows
    assert [row.status for row in rows] == ["finished", "finished"]
    assert all(1e-4 <= row.drawn["agent.algorithm.lr"] <= 1e-3 for row in rows)
    copied = [n for n in (0, 1) if len(list(only_run(folder).glob(f"trial_{n}_*"))) > 1]
    assert copied  # at least one of the two went on from the other's weights
    for row in rows:  # and did all its env steps, those of the other included
        result = json.loads((only_run(folder) / row.run / "session_0" / "result.json").read_text())
        assert result["status"] == "budget spent"
        about = json.loads((only_run(folder) / row.run / "settings.json").read_text())
        assert about["settings"]["spec"]["agent"]["algorithm"]["lr"] == row.drawn["agent.algorithm.lr"]


def ended_by(folder: Path, words: list[str], number: int, when: Callable[[], bool]) -> int:
    """Start a search in a process group of its own, signal it when that is so, and wait; the exit status."""
    command = [sys.executable, "-m", "longrein.cli", "run", *words]
    with (folder / "output.txt").open("a") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 400
        while not when():
            assert process.poll() is None, (folder / "output.txt").read_text()
            assert time.monotonic() < deadline, (folder / "output.txt").read_text()
            time.sleep(0.2)
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)  # as a terminal does
        return process.wait(200)
    finally:
        process.kill()


def statuses(folder: Path) -> list[str]:
    tables = list((folder / "data").glob("*_*/trials.csv"))
    return [row.status for row in search_table.read(tables[0].parent).rows] if tables else []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_and_an_interrupted_search_go_on(folder: Path) -> None:
    before = {process.pid for process in children_of_ray()}
    text = GRADED_SPEC.replace("[1, -1, 3, 2]", "[0, 1, 2, 3]").replace("400", "3000").replace("0.0}", "0.002}")
    (folder / "spec.yaml").write_text(text)
    words = ["spec.yaml", "graded", "search", "--processes", "1"]

    def trains(number: int) -> bool:
        return any(
            len(path.read_text()) > 500 for path in (folder / "data").glob(f"*_*/trial_{number}_*/*/episodes.csv")
        )

    status = ended_by(folder, words, signal.SIGKILL, lambda: "finished" in statuses(folder) and trains(1))
    assert status == -signal.SIGKILL
    kept = search_table.read(only_run(folder)).rows[0]
    resume = ["--resume", str(only_run(folder)), "--processes", "1"]

    def third_trains() -> bool:  # whichever Tune takes first
        return statuses(folder).count("finished") == 2 and (trains(2) or trains(3))

    status = ended_by(folder, resume, signal.SIGINT, third_trains)
    assert status == 130
    assert f"go on with it: longrein run --resume {only_run(folder)}" in (folder / "output.txt").read_text()
    assert "Traceback" not in (folder / "output.txt").read_text()
    (session,) = only_run(folder).glob("trial_[23]_*/session_0")
    assert json.loads((session / "result.json").read_text())["status"] == "interrupted"
    done = run(folder, *resume)
    assert done.returncode == 0, done.stderr
    found = search_table.read(only_run(folder))
    assert [row.status for row in found.rows] == 4 * ["finished"]
    assert found.rows[0] == kept  # not begun again
    assert found.best is not None
    assert found.best.drawn == {"env.options.grade": 3}
    assert len(list(only_run(folder).glob("trial_*"))) == 4  # what was cut off went on in its own folder
    deadline = time.monotonic() + 30  # what was killed hard ends by itself
    while (left := [p for p in children_of_ray() if p.pid not in before]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_uses_a_cluster_that_runs(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "spec.yaml").write_text(GRADED_SPEC.replace("[1, -1, 3, 2]", "[1, 2]"))
    words = ["spec.yaml", "graded", "search", "--address", address]
    done = run(folder, *words)
    assert done.returncode == 1
    assert f"the Ray cluster at {address} cannot be reached" in done.stderr
    assert not (folder / "data").exists()
    start = ["start", "--head", "--port", address.rpartition(":")[2], "--num-cpus", "1", "--include-dashboard", "false"]
    ray = [str(Path(sys.executable).with_name("ray")), *start, "--disable-usage-stats", "--block"]
    with subprocess.Popen(ray, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as cluster:
        try:
            time.sleep(20)
            done = run(folder, *words, "--data", "there")
            assert done.returncode == 0, done.stderr
            assert cluster.poll() is None  # it is not ours to end
        finally:
            cluster.send_signal(signal.SIGTERM)
    (table,) = (folder / "there").glob("*/trials.csv")
    assert [row.status for row in search_table.read(table.parent).rows] == ["finished", "finished"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_over_fifty_trials(folder: Path) -> None:
    grades = ", ".join(map(str, range(50)))
    text = GRADED_SPEC.replace("[1, -1, 3, 2]", f"[{grades}]").replace("max_trial: 4", "max_trial: 50")
    (folder / "spec.yaml").write_text(text)
    words = [sys.executable, "-m", "longrein.cli", "run", "spec.yaml", "graded", "search", "--processes", "1"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    driver, trial = {}, {}
    try:
        while process.poll() is None:
            ended = statuses(folder).count("finished") if list((folder / "data").glob("*_*/trials.csv")) else 0
            here = psutil.Process(process.pid)
            try:
                driver[ended] = here.memory_info().rss
                actors = [one for one in here.children(recursive=True) if one.cmdline()[0].startswith("ray::Trial")]
                if actors:
                    trial[ended] = max(one.memory_info().rss for one in actors)
            except (psutil.NoSuchProcess, IndexError):
                pass
            time.sleep(0.5)
    finally:
        process.kill()
    assert process.returncode == 0
    for name, sizes in (("driver", driver), ("trial", trial)):
        early = np.median([size for ended, size in sizes.items() if 5 <= ended < 15])
        late = np.median([size for ended, size in sizes.items() if 40 <= ended < 50])
        print(f"{name}: {early / 2**20:.0f} MiB at trial 10, {late / 2**20:.0f} MiB at trial 45")
        assert late - early < 30 * 2**20, name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_search_finds_a_better_learning_rate_than_a_bad_one(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "spec" / "search.yaml"
    data = ["--data", str(tmp_path / "data")]
    done = run(tmp_path, str(file), "ppo_cartpole_search", "search", *data)
    assert done.returncode == 0, done.stderr
    best = search_table.read(only_run(tmp_path)).best
    assert best is not None
    done = run(tmp_path, str(file), "ppo_cartpole_search", "train", *data)
    assert done.returncode == 0, done.stderr
    (bad,) = (path for path in (tmp_path / "data").glob("*_*/trial.json"))
    area = json.loads(bad.read_text())["fitness"]["beside"]["area_under_curve"]
    assert best.fitness is not None
    assert best.fitness > 3 * area
