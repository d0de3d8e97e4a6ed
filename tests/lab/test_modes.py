"""What a user types around a spec: train, look at what is there, play it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import longrein
from longrein.errors import RunError, SpecError
from longrein.lab import modes, spec
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


def test_what_is_no_run_is_said(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(RunError, match="is no run of a spec"):
        modes.enjoy(tmp_path)
    assert list_runs(tmp_path) == []
    modes.show_runs(trained)


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


def test_several_agents_are_not_there_yet(tmp_path: Path) -> None:
    agent = "[{algorithm: {name: ppo}}, {algorithm: {name: ppo}}]"
    (tmp_path / "spec.yaml").write_text(SPEC.replace("{algorithm: {name: ppo, rollout_steps: 32}}", agent))
    with pytest.raises(SpecError, match="not there yet"):
        modes.run_mode(spec.load(tmp_path / "spec.yaml"), "train", tmp_path)
