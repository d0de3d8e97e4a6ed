"""A session that was stopped, however, goes on as if it had not been: to the bit, for every algorithm."""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from learn import probes
from typer.testing import CliRunner

from longrein import cli
from longrein.errors import CheckpointError, RunError
from longrein.lab import checkpoint, records
from longrein.lab import spec as specs
from longrein.lab.actor import Actor
from longrein.lab.arena import Alone, can_save
from longrein.lab.course import newest
from longrein.lab.experiment import open_world, run_trial, session_settings
from longrein.lab.session import Progress, SessionSettings, load_policy, result_of, run_session
from longrein.learn import algorithms

Open = Callable[[int], VectorEnv[Any, Any, Any]]


pytestmark = pytest.mark.usefixtures("undrawn")


class Walk(gymnasium.Env[Any, Any]):
    """A random walk that ends beyond 1; steps and ends are drawn."""

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)
    action_space: gymnasium.Space[Any] = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = self.np_random.uniform(-0.5, 0.5, 2).astype(np.float32)
        return self.at.copy(), {}

    def step(self, action: Any) -> probes.Step:
        push = float(np.asarray(action).reshape(-1)[0])
        self.at[0] += 0.1 * (np.clip(push, -1.0, 1.0) - 0.4) + self.np_random.normal(0.0, 0.1)
        over = bool(abs(self.at[0]) > 1.0)
        self.at[0] = np.clip(self.at[0], -2.0, 2.0)
        return self.at.copy(), float(self.at[0]), over, False, {}


class Push(Walk):
    """The same, pushed by a number."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)


class SavedWalk(Walk):
    """The same, and it can be saved."""

    def save_state(self) -> Any:
        return {"at": torch.from_numpy(self.at.copy()), "random": self.np_random.bit_generator.state}

    def load_state(self, state: Any) -> None:
        self.at = state["at"].numpy().copy()
        self.np_random.bit_generator.state = state["random"]


def copies(make: type[Walk], mode: AutoresetMode = AutoresetMode.SAME_STEP) -> Open:
    return lambda count: SyncVectorEnv([lambda: TimeLimit(make(), 20)] * count, autoreset_mode=mode)


CONTINUOUS = {"sac", "td3", "crossq"}


def settings(name: str, **changes: Any) -> SessionSettings:
    config_class, _ = algorithms.load(name)
    plain = {"net": {"hidden": [16, 16]}} | probes.SMALL[name]
    known = {key: value for key, value in plain.items() if key in config_class.__dataclass_fields__}
    config = algorithms.config_from(config_class, known)
    slow = name in CONTINUOUS or name == "reinforce"
    asked: dict[str, Any] = {"seed": 3, "num_envs": 3, "max_env_steps": 240 if slow else 900,
                             "checkpoint_every": 90 if slow else 300, "evaluation_episodes": 2,
                             "evaluation_every": 70 if slow else 250,
                             "window": 5}  # fmt: skip
    return SessionSettings("a walk", name, config, **asked | changes)


class Killed(BaseException):
    """As a kill would end it: nothing is tidied up on the way, or nothing of it counts."""


def die_at(env_steps: int) -> Callable[[Progress], None]:
    def look(progress: Progress) -> None:
        if progress.env_steps >= env_steps:
            raise Killed

    return look


def disturbed(asked: SessionSettings, run: Path, open_envs: Any, *ends: int) -> Any:
    """The session ended at each of these env steps, taken up each time, and finished."""
    for number, end in enumerate(ends):
        with pytest.raises(Killed):
            run_session(asked, run, open_envs, die_at(end), resume=number > 0)
    return run_session(asked, run, open_envs, resume=True)


def assert_same(one: Any, other: Any, path: str = "") -> None:
    """The same values in the same places, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        same = one.shape == other.shape and (one.equal(other) or one.numpy().tobytes() == other.numpy().tobytes())
        assert same, path
    elif isinstance(one, Mapping):
        assert list(one) == list(other), path
        for key in one:
            if key != "seconds":
                assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}.{index}")
    else:
        assert one == other or (one != one and other != other), f"{path}: {one} and {other}"


def assert_same_folder(one: Path, other: Path) -> None:
    """Two sessions' folders hold the same but for their seconds."""
    for name in ("episodes.csv", "metrics.csv", "evaluation.csv"):
        if (one / name).exists() or (other / name).exists():
            assert table(one / name) == table(other / name), name
    assert_same(checkpoint.load(one / "checkpoint.pt"), checkpoint.load(other / "checkpoint.pt"))


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


# -------------------------------------------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("name", algorithms.TABLE)
def test_every_algorithm_goes_on_to_the_bit(tmp_path: Path, name: str) -> None:
    envs = copies(Push if name in CONTINUOUS else Walk)
    whole = run_session(settings(name), tmp_path / "whole", envs)
    ends = [settings(name).max_env_steps * part // 9 for part in (4, 7)]
    parts = disturbed(settings(name), tmp_path / "parts", envs, *ends)
    assert whole.env_steps == parts.env_steps >= settings(name).max_env_steps
    assert whole.evaluation == parts.evaluation
    assert whole.episodes == parts.episodes
    assert_same_folder(whole.folder, parts.folder)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_cut_is_the_same_in_every_autoreset_mode(tmp_path: Path, mode: AutoresetMode) -> None:
    asked = settings("dqn")
    whole = run_session(asked, tmp_path / "whole", copies(Walk, mode))
    parts = disturbed(asked, tmp_path / "parts", copies(Walk, mode), 400)
    assert_same_folder(whole.folder, parts.folder)


def test_a_recurrent_policy_goes_on_to_the_bit(tmp_path: Path) -> None:
    net = {"hidden": [8], "recurrent": "gru", "recurrent_size": 8}
    config = algorithms.config_from(algorithms.load("ppo")[0], {"net": net, "rollout_steps": 16, "epochs": 1})
    for make in (Walk, SavedWalk):
        asked = SessionSettings("a walk", "ppo", config, seed=1, num_envs=2, max_env_steps=400, checkpoint_every=100)
        whole = run_session(asked, tmp_path / make.__name__ / "whole", copies(make))
        parts = disturbed(asked, tmp_path / make.__name__ / "parts", copies(make), 250)
        assert_same_folder(whole.folder, parts.folder)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_environments_that_save_their_state_are_not_cut(tmp_path: Path, mode: AutoresetMode) -> None:
    envs = copies(SavedWalk, mode)
    assert can_save(envs(1))
    assert not can_save(copies(Walk)(1))
    never = run_session(settings("dqn", checkpoint_every=10**6), tmp_path / "never", envs)
    whole = run_session(settings("dqn"), tmp_path / "whole", envs)
    parts = disturbed(settings("dqn"), tmp_path / "parts", envs, 400, 650)
    assert_same_folder(whole.folder, parts.folder)
    assert table(never.folder / "episodes.csv") == table(whole.folder / "episodes.csv")


def test_a_wrapper_that_may_hold_state_is_not_trusted() -> None:
    envs = SyncVectorEnv([lambda: gymnasium.wrappers.RescaleObservation(SavedWalk(), -1.0, 1.0)])
    assert not can_save(envs)


def test_a_cut_is_truncated_and_no_episode() -> None:
    _, build = algorithms.load("random")
    envs = SyncVectorEnv([lambda: TimeLimit(Walk(), 4)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    policy = build(algorithms.load("random")[0](), Walk.observation_space, Walk.action_space, 0).policy
    arena = Alone(envs, Actor(envs, policy, seed=None, generator=torch.Generator().manual_seed(0)))
    arena.begin(5)
    first = list(arena.collect(6, cut=77))  # an episode of four steps in each, then two of the next
    last = first[-1][0]
    assert last.truncated.all()
    assert not last.terminated.any()
    assert last.valid.all()
    assert [(e.length, e.truncated) for e in arena.actor.finished()] == [(4, True), (4, True)]
    after = next(arena.collect(1, None))[0]
    assert np.array_equal(after.observation, envs.reset(seed=77)[0])
    assert not np.array_equal(last.next_observation, after.observation), "the true successor, not what the reset gave"


def test_a_session_that_was_ended_by_a_signal_goes_on_to_the_bit(tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.env_steps >= 400:
            os.kill(os.getpid(), signal.SIGINT)

    whole = run_session(settings("dqn"), tmp_path / "whole", copies(Walk))
    first = run_session(settings("dqn"), tmp_path / "parts", copies(Walk), interrupt)
    assert first.status == "interrupted"
    assert result_of(first.folder) is None
    assert (first.folder / "resume.pt").exists()
    assert checkpoint.load(first.folder / "checkpoint.pt")["env_steps"] == first.env_steps
    load_policy(first.folder, copies(Walk)(1))
    again = run_session(settings("dqn"), tmp_path / "parts", copies(Walk), interrupt, resume=True)
    assert again.status == "interrupted"
    last = run_session(settings("dqn"), tmp_path / "parts", copies(Walk), resume=True)
    assert_same_folder(whole.folder, last.folder)
    assert not (last.folder / "resume.pt").exists()
    assert result_of(last.folder) == last


def test_a_session_without_a_checkpoint_begins_again(tmp_path: Path) -> None:
    whole = run_session(settings("dqn"), tmp_path / "whole", copies(Walk))
    parts = disturbed(settings("dqn"), tmp_path / "parts", copies(Walk), 50)
    assert_same_folder(whole.folder, parts.folder)


def test_only_the_evaluation_is_left_when_training_had_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings("dqn", evaluation_every=0)
    whole = run_session(asked, tmp_path / "whole", copies(Walk))
    with monkeypatch.context() as patch:
        patch.setattr("longrein.lab.session.evaluate", lambda *_: die_at(0)(Progress(0, 0.0, 0, 0.0, 0)))
        with pytest.raises(Killed):
            run_session(asked, tmp_path / "parts", copies(Walk))
    seen: list[Progress] = []
    parts = run_session(asked, tmp_path / "parts", copies(Walk), seen.append, resume=True)
    assert seen == []
    assert parts.evaluation == whole.evaluation
    assert_same_folder(whole.folder, parts.folder)


# ------------------------------------------------------------------------------------------------------------ kill -9

SPEC = """
walk:
  agent: {algorithm: {name: NAME, SETTINGS}, net: {hidden: [16, 16]}}
  env: {id: "walking.py:make", num_envs: 2}
  meta: {env_steps: 1200, checkpoint_every: 150, window: 5, eval: {episodes: 2}}
"""
WALKING = """
import os, time
import gymnasium, numpy as np
class Walk(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.np_random.normal(size=2).astype(np.float32)
        return self.at.copy(), {}
    def step(self, action):
        time.sleep(float(os.environ.get("WALK_SECONDS", 0)))
        self.at = np.clip(self.at + self.np_random.normal(size=2) + action - 0.5, -9, 9).astype(np.float32)
        return self.at.copy(), float(self.at[0]), bool(self.np_random.random() < 0.1), False, {}
def make():
    return gymnasium.wrappers.TimeLimit(Walk(), 30)
"""


DRIVER = """
import sys
from pathlib import Path
from longrein.lab import experiment, session, spec, plots
plots.draw_session = lambda *_, **__: None
asked = spec.load("spec.yaml")
opens = [lambda count: experiment.open_world(asked.envs[0], count)]
session.run_session(experiment.session_settings(asked, 0), Path(sys.argv[1]), opens, resume=True)
"""


def killed_again_and_again(tmp_path: Path, name: str, options: str, kills: int) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC.replace("NAME", name).replace("SETTINGS", options))
    (tmp_path / "walking.py").write_text(WALKING)
    subprocess.run([sys.executable, "-c", DRIVER, "whole"], cwd=tmp_path, check=True, capture_output=True)
    draw = random.Random(7)
    command, episodes = [sys.executable, "-c", DRIVER, "parts"], tmp_path / "parts" / "session_0" / "episodes.csv"
    died = 0
    for _ in range(kills):
        slow = os.environ | {"WALK_SECONDS": "0.001"}
        running = subprocess.Popen(command, cwd=tmp_path, env=slow, stderr=subprocess.DEVNULL)
        began = written(episodes)
        while running.poll() is None and written(episodes) == began:
            time.sleep(0.02)  # rows come, or are cut back: it is at work by then
        time.sleep(draw.uniform(0.0, 0.8))
        died += running.poll() is None
        running.kill()
        running.wait()
    assert died >= kills // 2, "most kills came in the middle"
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert_same_folder(tmp_path / "whole" / "session_0", episodes.parent)


def written(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@pytest.mark.timeout(400)  # five processes that each load torch
def test_killed_twice_it_ends_with_the_weights_of_the_undisturbed_run(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, "ppo", "rollout_steps: 16, epochs: 1", 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "options"), [("dqn", "rollout_steps: 4"), ("ppo", "rollout_steps: 16")])
def test_killed_ten_times(tmp_path: Path, name: str, options: str) -> None:
    killed_again_and_again(tmp_path, name, options, 10)


def test_the_command_goes_on_with_what_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "walking.py").write_text(WALKING)
    text = SPEC.replace("NAME", "ppo").replace("SETTINGS", "rollout_steps: 16, epochs: 1")
    (tmp_path / "spec.yaml").write_text(text.replace("window: 5", "window: 5, max_session: 2"))
    spec = specs.load("spec.yaml")
    opens = [lambda count: open_world(spec.envs[0], count)]
    run = records.create_run(tmp_path / "data", "walk", {"name": "walk", "spec": spec.plain})
    kept = run_session(session_settings(spec, 0), run, opens)
    before = (kept.folder / "checkpoint.pt").stat().st_mtime_ns
    with pytest.raises(Killed):
        run_session(session_settings(spec, 1), run, opens, die_at(700))
    whole = run_session(session_settings(spec, 1), tmp_path / "whole", opens)
    said = CliRunner().invoke(cli.app, ["run", "--resume", str(run)])
    assert said.exit_code == 0, said.output
    assert (kept.folder / "checkpoint.pt").stat().st_mtime_ns == before
    assert_same_folder(whole.folder, run / "session_1")
    assert set(json.loads((run / "trial.json").read_text())["sessions"]) == {"0", "1"}


# ---------------------------------------------------------------------------------------------------------- bad input


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    spec = specs.from_plain("x", {"agent": {"algorithm": {"name": "ppo"}}, "env": {"id": "CartPole-v1"}})
    with pytest.raises(RunError, match="is no run of a spec"):
        run_trial(spec, tmp_path, resume=tmp_path)
    run = records.create_run(tmp_path, "x", {"name": "x", "spec": spec.plain})
    with pytest.raises(RunError, match="was made by another spec"):
        run_trial(replace(spec, meta=replace(spec.meta, env_steps=7)), tmp_path, resume=run)
    about = json.loads((run / "process.json").read_text())
    parent = psutil.Process().parent()
    assert parent is not None
    about |= {"pid": parent.pid, "started": parent.create_time()}
    (run / "process.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match="still runs"):
        run_trial(spec, tmp_path, resume=run)


def stopped(run: Path) -> Path:
    """A session's folder that was left in the middle, with a checkpoint."""
    with pytest.raises(Killed):
        run_session(settings("dqn"), run, copies(Walk), die_at(500))
    (run / "session_3" / "result.json").unlink()
    return run / "session_3"


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = stopped(tmp_path)
    with pytest.raises(CheckpointError, match=r"was made with num_envs .3., and .2. was asked for"):
        run_session(settings("dqn", num_envs=2), tmp_path, copies(Walk), resume=True)
    with pytest.raises(CheckpointError, match="observation_space"):
        run_session(settings("dqn"), tmp_path, lambda n: SyncVectorEnv([probes.OneReward] * n), resume=True)
    other = replace(settings("dqn"), config=replace(settings("dqn").config, gamma=0.5))
    with pytest.raises(CheckpointError, match="config"):
        run_session(other, tmp_path, copies(Walk), resume=True)
    assert newest(folder) is not None, "what is refused stays as it was"
    whole = run_session(settings("dqn"), tmp_path / "whole", copies(Walk))
    parts = run_session(settings("dqn"), tmp_path, copies(Walk), resume=True)
    assert_same_folder(whole.folder, parts.folder)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = stopped(tmp_path)
    whole = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save({k: v for k, v in whole.items() if k != "resume"}, folder / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="another version wrote it"):
        run_session(settings("dqn"), tmp_path, copies(Walk), resume=True)
    torch.save(whole | {"format": 99}, folder / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="expected format 1, found 99"):
        run_session(settings("dqn"), tmp_path, copies(Walk), resume=True)


def test_a_table_that_lost_rows_is_refused(tmp_path: Path) -> None:
    folder = stopped(tmp_path)
    lines = (folder / "episodes.csv").read_text().splitlines(keepends=True)
    (folder / "episodes.csv").write_text("".join(lines[:3]))
    with pytest.raises(RunError, match="has 2 whole rows, the checkpoint knows of"):
        run_session(settings("dqn"), tmp_path, copies(Walk), resume=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer says it, too
@pytest.mark.parametrize("what", ["checkpoint.pt", "episodes.csv"])
def test_a_full_disk_is_said_clearly_and_what_was_written_stays(tmp_path: Path, what: str) -> None:
    every = 600 if what == "checkpoint.pt" else 10**6
    asked = settings("ppo", max_env_steps=3_000, checkpoint_every=every)
    whole = run_session(asked, tmp_path / "whole", copies(Walk))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (whole.folder / what).stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))  # no file may grow beyond that
    try:
        with pytest.raises(RunError, match=r"cannot be written.*File too large"):
            run_session(asked, tmp_path / "parts", copies(Walk))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "parts" / "session_3"
    assert (folder / "episodes.csv").read_text().endswith("\n")
    assert len(records.read_table(folder / "episodes.csv")["return"]) > 0
    assert json.loads((folder / "result.json").read_text())["status"] == "failed"
    assert not list(folder.glob(".checkpoint*")), "no half file is left"
    parts = run_session(asked, tmp_path / "parts", copies(Walk), resume=True)
    assert_same_folder(whole.folder, parts.folder)
