"""What a user types around a spec: train, look at what is there, play it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import longrein
from longrein.errors import CheckpointError, RunError, SpecError
from longrein.lab import modes, overview, spec
from longrein.lab.records import list_runs, sessions_of

SPEC = """\
small:
  agent: {algorithm: {name: ppo, rollout_steps: 32}}
  env: {id: CartPole-v1, num_envs: 2}
  meta: {env_steps: 600, max_session: 2, eval: {episodes: 2}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two short sessions, made by the command."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "spec.yaml").write_text(SPEC)
    words = ["run", "spec.yaml", "small", "--data", "data", "--set", "meta.seed=5"]
    done = subprocess.run([sys.executable, "-m", "longrein.cli", *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("budget spent") == 2
    return folder / "data"


def test_a_trial_leaves_a_folder_for_each_session(trained: Path) -> None:
    (run,) = list_runs(trained)
    assert (run.spec, run.sessions, run.finished) == ("small", 2, 2)
    assert [folder.name for folder in sessions_of(run.folder)] == ["session_5", "session_6"]
    assert (run.folder / "trial.json").exists()


def test_what_was_learned_is_played_here_and_elsewhere(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = list_runs(trained)
    here = modes.enjoy(run.folder, episodes=2)
    assert "episode 2: return" in capsys.readouterr().out
    with longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0") as server:
        there = modes.enjoy(sessions_of(run.folder)[0], episodes=2, url=server.urls[0])
    assert here == there  # the same policy, the same seeds, over the link


def test_what_was_learned_is_filmed(trained: Path, tmp_path: Path) -> None:
    import imageio.v3

    (run,) = list_runs(trained)
    modes.enjoy(run.folder, episodes=1, record=tmp_path / "here")
    with longrein.Server(["CartPole-v1"], at="ws://127.0.0.1:0") as server:
        (total,) = modes.enjoy(run.folder, episodes=1, url=server.urls[0], record=tmp_path / "there")
    here, there = (imageio.v3.imread(tmp_path / name / "episode_1.mp4", plugin="FFMPEG") for name in ("here", "there"))
    assert here.shape == (int(total), 400, 600, 3), "a picture for each step, without the next episode's first"
    assert there.shape == here.shape
    assert abs(here.astype(float) - there).mean() < 1.0
    assert here.std() > 10, "something is seen"
    with pytest.raises(SpecError, match="shown or recorded, not both"):
        modes.enjoy(run.folder, render=True, record=tmp_path)


def test_a_dry_run_checks_all_and_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    asked = spec.load(tmp_path / "spec.yaml")
    modes.dry_run(asked, "train", tmp_path / "data")
    said = capsys.readouterr().out
    assert "gamma: 0.99" in said
    assert "action space Discrete(2)" in said
    assert "session 1: ppo on CartPole-v1, 600 env steps" in said
    assert f"nothing was run; train would write {tmp_path / 'data' / 'small'}_TIME" in said
    assert not (tmp_path / "data").exists()
    wrong = spec.load(tmp_path / "spec.yaml", None, {"agent.algorithm": {"name": "td3"}})
    with pytest.raises(SpecError, match="Discrete"):
        modes.dry_run(wrong, "train", tmp_path)
    with pytest.raises(SpecError, match="did you mean 'train'"):
        modes.dry_run(asked, "trian", tmp_path)


def test_dev_is_one_short_session_and_is_shown_where_there_is_a_screen(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    words = [sys.executable, "-m", "longrein.cli", "run", "spec.yaml", "small", "dev", "--set", "meta.env_steps=200"]
    screen = {**os.environ, "DISPLAY": ":99", "SDL_VIDEODRIVER": "dummy"}  # a screen that nobody sees
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=screen)
    assert done.returncode == 0, done.stderr
    assert "gamma: 0.99" in done.stdout, "the spec with every default"
    assert "entropy" in done.stdout, "what was measured"
    assert "episode 2: return" in done.stdout, "played in a window"
    (run,) = list_runs(tmp_path / "data")
    assert run.sessions == 1


def test_what_is_no_run_is_said(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(RunError, match="is no run of a spec"):
        modes.enjoy(tmp_path)
    assert list_runs(tmp_path) == []
    overview.show(overview.overviews(trained))


def test_a_session_that_dies_takes_no_other_with_it(tmp_path: Path) -> None:
    (tmp_path / "flaky.py").write_text(
        "import gymnasium, os\n\n\ndef make():\n"
        "    if not os.path.exists('made'):\n"
        "        open('made', 'w').close()\n"
        "        raise RuntimeError('the first')\n"
        "    return gymnasium.make('CartPole-v1')\n"
    )
    (tmp_path / "spec.yaml").write_text(SPEC.replace("id: CartPole-v1", "id: flaky.py:make"))
    words = ["run", "spec.yaml", "small", "--data", "data", "--processes", "1"]
    done = subprocess.run([sys.executable, "-m", "longrein.cli", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the first" in done.stderr
    (run,) = list_runs(tmp_path / "data")
    assert run.finished == 1
    assert "RuntimeError: the first" in (run.folder / "session_0" / "failure.txt").read_text()


def test_an_unknown_mode_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    with pytest.raises(SpecError, match="did you mean 'train'"):
        modes.run_mode(spec.load(tmp_path / "spec.yaml"), "trian", tmp_path)


def test_a_checkpoint_of_another_version_is_told(trained: Path, tmp_path: Path) -> None:
    (run,) = list_runs(trained)
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy)
    path = sessions_of(copy)[0] / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "format": 99}, path)
    with pytest.raises(CheckpointError, match=r"expected format \d, found 99") as raised:
        modes.enjoy(copy)
    assert "another version" in raised.value.hint


def test_mistakes_at_the_command_line_are_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    for words, says in [
        (["run", "spec.yaml", "smal"], "did you mean 'small'?"),
        (["run", "spec.yaml", "small", "serach"], "there is no mode 'serach'\n  hint: did you mean 'search'?"),
        (["enjoy", "nowhere"], "nowhere is no run of a spec"),
    ]:
        done = subprocess.run(
            [sys.executable, "-m", "longrein.cli", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.startswith("longrein: ")
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_the_live_line_says_how_a_sessions_processes_do() -> None:
    measured = {"actor_lag": 0.94, "queue": 0.5, "learner_waiting": 0.031, "actor_waiting": 0.4, "actors_replaced": 2.0}
    assert modes.told_of(measured) == ", lag 0.9, queue 50%, learner waits 3%, actors wait 40%, 2 replaced"
    assert modes.told_of({}) == ""
