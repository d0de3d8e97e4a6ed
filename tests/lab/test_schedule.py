"""Schedules: several specs in a row and side by side, a failure that ends no other, and taking one up again."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from lab import small

from longrein.errors import RunError, SpecError
from longrein.lab import schedule
from longrein.lab.overview import overviews

MODES = ("train", "dev")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(small.SPEC)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.json"
    path.write_text(text)
    return path


def test_one_after_another_and_what_is_finished_is_not_run_again(folder: Path) -> None:
    write(folder, '{"spec.yaml": {"broken": "train", "quick": "train"}}')
    first = small.longrein(folder, "schedule", "plan.json")
    assert first.returncode == 1, first.stderr
    assert "spec.yaml broken train: failed" in first.stdout
    assert "spec.yaml quick train: finished" in first.stdout
    assert "1 failed, 1 finished" in first.stdout
    assert "gone.py" in first.stderr  # the failure's own words
    write(folder, '{"spec.yaml": {"quick": "train"}}')
    second = small.longrein(folder, "schedule", "plan.json")
    assert second.returncode == 0, second.stderr
    assert second.stdout == "spec.yaml quick train: was finished before\n1 finished\n"
    status = {run.spec: run.status for run in overviews(folder / "data")}
    assert status == {"broken": "failed", "quick": "finished"}


def test_side_by_side_they_run_at_once_and_each_writes_its_own_output(folder: Path) -> None:
    path = write(folder, '{"spec.yaml": {"quick": "train", "long": "dev", "broken": "train"}}')
    entries = schedule.read(path, MODES)
    # Each waits for the other's mark: one after another they would wait in vain.
    meet = "touch {0}; for i in $(seq 100); do [ -e {1} ] && exit 0; sleep 0.1; done; echo alone; exit 1"
    scripts = {"quick": meet.format("a", "b"), "long": meet.format("b", "a"), "broken": "echo gone.py >&2; exit 3"}
    shell = lambda entry: ["sh", "-c", f"cd {folder}; {scripts[entry.name]}"]  # noqa: E731
    done = schedule.run_schedule(entries, folder / "data", folder / "state", shell, side_by_side=2)
    assert [entry.state for entry in done] == ["finished", "finished", "failed"]
    assert (done[2].exit_status, Path(done[2].log).read_text()) == (3, "gone.py\n")
    kept = json.loads((folder / "state" / "state.json").read_text())["entries"]
    assert [one["state"] for one in kept] == ["finished", "finished", "failed"]


def test_ctrl_c_ends_what_runs_and_starts_nothing_more(folder: Path) -> None:
    write(folder, '{"spec.yaml": {"long": "train", "quick": "train"}}')
    process = subprocess.Popen(
        small.command("schedule", "plan.json"),
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True,
    )  # fmt: skip
    try:
        small.until(lambda: any((folder / "data").glob("long_*/session_0/metrics.csv")))
        done = small.longrein(folder, "stop")
        assert done.returncode == 0, done.stdout + done.stderr
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == schedule.INTERRUPTED
    assert "1 interrupted, 1 waiting" in said
    (run,) = overviews(folder / "data")
    assert (run.spec, run.status) == ("long", "interrupted")
    assert json.loads((run.folder / "session_0" / "result.json").read_text())["status"] == "interrupted"


def test_a_changed_spec_is_run_again(folder: Path, tmp_path: Path) -> None:
    path = write(folder, '{"spec.yaml": {"quick": "train"}}')
    (entry,) = schedule.read(path, MODES)
    state = schedule.state_folder(folder / "data", path)
    ok = ["true"]
    (done,) = schedule.run_schedule([entry], folder / "data", state, lambda _: ok)
    assert done.state == "finished"
    data = folder / "data"
    assert schedule.with_state([entry], data, state) == [done]
    assert schedule.with_state([entry], data, state, again=True) == [entry]
    (folder / "spec.yaml").write_text(small.SPEC.replace("env_steps: 200,", "env_steps: 300,"))
    (changed,) = schedule.with_state(schedule.read(path, MODES), data, state)
    assert changed.state == "waiting"


def test_an_interrupted_run_is_gone_on_with(folder: Path) -> None:
    path = write(folder, '{"spec.yaml": {"quick": "train", "long": "dev"}}')
    data = folder / "data"
    state = schedule.state_folder(data, path)
    run = data / "quick_run"
    run.mkdir(parents=True)
    (run / "settings.json").write_text("{}")
    about = {"host": platform.node(), "started": time.time()}
    script = (
        f"import json, os; from pathlib import Path; Path({str(run / 'process.json')!r}).write_text("
        f"json.dumps({about!r} | {{'pid': os.getpid()}})); raise SystemExit(130)"
    )
    entries = schedule.read(path, MODES)
    schedule.run_schedule(entries, data, state, lambda _: [sys.executable, "-c", script])
    train, dev = schedule.with_state(schedule.read(path, MODES), data, state)
    assert schedule.run_command(train, data, None)[3:] == ["run", "--resume", str(run)]
    assert "--resume" not in schedule.run_command(dev, data, None), "a short session begins anew"
    train, _ = schedule.with_state(schedule.read(path, MODES), data, state, again=True)
    assert "--resume" not in schedule.run_command(train, data, 2)
    assert schedule.run_command(train, data, 2)[-2:] == ["--processes", "2"]
    kept = json.loads((state / "state.json").read_text())  # as a killed schedule leaves it, while its run goes on
    kept["entries"][0] |= {"state": "running", "run": "", "pid": os.getpid()}
    (state / "state.json").write_text(json.dumps(kept))
    me = psutil.Process()
    (run / "process.json").write_text(json.dumps({**about, "pid": me.pid, "started": me.create_time()}))
    with pytest.raises(RunError, match="quick_run still goes on"):
        schedule.with_state(schedule.read(path, MODES), data, state)


def test_failures_end_it_where_that_is_asked_for(folder: Path) -> None:
    path = write(folder, '{"spec.yaml": {"quick": "train", "long": "train", "broken": "train"}}')
    entries = schedule.read(path, MODES)
    states = {"quick": ["true"], "long": ["false"], "broken": ["sh", "-c", "kill -INT $$"]}
    run = lambda **options: [  # noqa: E731
        one.state
        for one in schedule.run_schedule(
            entries, folder / "data", folder / "state", lambda entry: states[entry.name], **options
        )
    ]
    assert run() == ["finished", "failed", "interrupted"]
    assert run(stop_on_failure=True) == ["finished", "failed", "waiting"]


def test_the_same_schedule_runs_once_at_a_time(folder: Path) -> None:
    state = folder / "data" / "schedules" / "plan"
    state.mkdir(parents=True)
    other = subprocess.Popen(["sleep", "60"])
    try:
        about = {"pid": other.pid, "host": platform.node(), "started": psutil.Process(other.pid).create_time()}
        (state / "process.json").write_text(json.dumps(about))
        with pytest.raises(RunError, match="runs already, as process"):
            schedule.run_schedule([], folder / "data", state, lambda _: ["true"])
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        (
            '{"spec.yaml": {"quikc": "train"}}',
            r"plan.json:1: quikc: .*spec.yaml has no such spec",
            "did you mean 'quick'",
        ),
        ('{"spec.yaml": {"quick": "trian"}}', "plan.json:1: quick: there is no mode 'trian'", "did you mean 'train'"),
        ('{\n"spek.yaml": {"quick": "train"}}', "plan.json:2: spek.yaml: there is no such spec file", "looked in"),
        ('{"spec.yaml": "train"}', "spec.yaml: is str", ""),
        ('{"spec.yaml": {"quick": 7}}', "there is no mode 7", "one of train, dev"),
        ("{}", "names no spec", "dqn_cartpole"),
        ("[1]", "does not map names to specs", ""),
        ('{"spec.yaml": {"quick": "train", "quick": "dev"}}', "plan.json:1: spec.yaml.quick: is there twice", ""),
    ],
)
def test_a_wrong_schedule_is_told_before_anything_runs(folder: Path, text: str, says: str, hint: str) -> None:
    with pytest.raises(SpecError, match=says) as raised:
        schedule.read(write(folder, text), MODES)
    assert hint in raised.value.hint


def test_a_damaged_state_is_told(folder: Path) -> None:
    (folder / "state.json").write_text('{"entries": [{"file": 1}]}')
    with pytest.raises(RunError, match="is no schedule's state"):
        schedule.with_state([], folder, folder)


def test_the_schedule_that_ships_is_right() -> None:
    root = Path(__file__).parents[2]
    assert schedule.read(root / "config" / "experiments.json", MODES)
