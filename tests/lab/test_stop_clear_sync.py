"""Ending, removing and copying runs: real processes, real folders, and what each of them refuses."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import psutil
import pytest
from lab import small

from longrein.errors import RunError, SpecError
from longrein.lab import clearing, overview, processes
from longrein.lab.records import create_run, record_end, record_process, write_json
from longrein.lab.sync import Destination, run_files

SETTINGS = {"name": "made", "spec": {"meta": {"max_session": 1}}}


def made_run(data: Path, status: str = "budget spent", name: str = "made") -> Path:
    """A run folder as an ended process leaves it, without the training."""
    run = create_run(data, name, {**SETTINGS, "name": name})
    session = run / "session_0"
    session.mkdir()
    (session / "episodes.csv").write_text("env_steps,return\n10,1.5\n")
    if status:
        write_json(session / "result.json", {"status": status, "env_steps": 100, "training_mean": 12.5})
    about = json.loads((run / "process.json").read_text())
    write_json(run / "process.json", {**about, "pid": 2**22 + 1})  # beyond any process id
    return run


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with any run."""
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("budget spent", "finished"),
        ("solved", "finished"),
        ("interrupted", "interrupted"),
        ("failed", "failed"),
        ("", "interrupted"),
    ],
)
def test_a_run_says_how_it_stands(tmp_path: Path, status: str, expected: str) -> None:
    assert overview.overview(made_run(tmp_path, status)).status == expected


def test_a_run_whose_process_lives_is_running(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    record_process(run)
    assert overview.overview(run).status == "running"
    assert processes.running(tmp_path) == [run]
    record_end(run)
    assert overview.overview(run).status == "finished", "done, though its process, this one, lives on"
    assert processes.running(tmp_path) == []


def test_runs_as_json(tmp_path: Path) -> None:
    run = made_run(tmp_path / "data")
    write_json(run / "trial.json", {"fitness": {"slm2018": {"fitness": 0.25}, "slm5": None}})
    (tmp_path / "data" / "other").mkdir()
    (tmp_path / "data" / "other" / "settings.json").write_text("{}")
    (tmp_path / "data" / "torn").mkdir()
    (tmp_path / "data" / "torn" / "settings.json").write_text("{")
    done = small.longrein(tmp_path, "runs", "--json")
    (found,) = json.loads(done.stdout)
    assert (found["spec"], found["status"], found["asked"], found["finished"]) == ("made", "finished", 1, 1)
    assert (found["env_steps"], found["mean_return"], found["fitness"]) == (100, 12.5, {"slm2018": 0.25})
    assert run.name in small.longrein(tmp_path, "runs").stdout


def test_a_search_and_a_benchmark_are_runs_too(tmp_path: Path) -> None:
    search = made_run(tmp_path, name="wide")
    best = {"mean_return": 30.0, "fitness": 21.5}
    method = {"metric": "area_under_curve"}
    about = {"planned": 4, "method": method, "trials": {"finished": 2, "failed": 1}, "best": best}
    write_json(search / "experiment.json", about)
    seen = overview.overview(search)
    assert (seen.kind, seen.status, seen.finished, seen.asked) == ("search", "failed", 2, 4)
    assert (seen.mean_return, seen.fitness) == (30.0, {"area_under_curve": 21.5})
    folder = tmp_path / "both_benchmark"
    (folder / "ppo").mkdir(parents=True)
    write_json(folder / "benchmark.json", {"name": "both", "entries": [{}, {}], "seeds": [0, 1]})
    (folder / "ppo" / "seed_0.json").write_text("{}")
    record_process(folder)
    assert overview.run_named(tmp_path, "both_benchmark") == folder
    seen = overview.overview(folder)
    assert (seen.kind, seen.status, seen.finished, seen.asked) == ("benchmark", "running", 1, 4)
    with pytest.raises(RunError, match="is running"):
        clearing.candidates(tmp_path, ["both_benchmark"])
    record_end(folder)
    clearing.remove(tmp_path, folder)
    assert [run.kind for run in overview.overviews(tmp_path)] == ["search"]


def test_a_name_that_is_no_run_offers_the_nearest(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    assert overview.run_named(tmp_path, run.name) == run
    with pytest.raises(RunError, match=f"did you mean {run.name}"):
        overview.run_named(tmp_path, "made")
    with pytest.raises(RunError, match="there is no run 'nothing'"):
        overview.run_named(tmp_path, "nothing")


# ---------------------------------------------------------------------------------------------------------------- stop


def test_stop_ends_a_running_experiment_cleanly(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(small.SPEC)
    words = ["run", "spec.yaml", "long", "--set", "meta.max_session=2", "--processes", "1"]
    process = subprocess.Popen(
        # As a script's `longrein run &`: SIGINT is ignored from the start.
        ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *small.command(*words)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        small.until(lambda: any((tmp_path / "data").glob("*/session_*/metrics.csv")))
        (run,) = (tmp_path / "data").iterdir()
        assert overview.overview(run).status == "running"
        with pytest.raises(RunError, match="is running"):
            clearing.candidates(tmp_path / "data", [run.name])
        done = small.longrein(tmp_path, "stop", run.name)
        assert done.returncode == 0, done.stderr
        assert f"{Path('data') / run.name}: ended" in done.stdout
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert json.loads((run / "session_0" / "result.json").read_text())["status"] == "interrupted"
    assert (run / "session_0" / "checkpoint.pt").exists()
    assert not (run / "session_1").exists(), "what waited was not begun"
    assert overview.overview(run).status == "interrupted"
    assert processes.stop([run]) == [processes.Stopped(run, True, "has ended before")]
    assert processes.running(tmp_path / "data") == []


def test_a_process_with_the_same_id_is_sent_nothing(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = made_run(tmp_path)
    started = psutil.Process(sleeper.pid).create_time()
    write_json(run / "process.json", {"pid": sleeper.pid, "host": platform.node(), "started": started - 1000.0})
    (told,) = processes.stop([run], wait=1.0)
    assert told.ended
    assert re.search(rf"process {sleeper.pid} is another one, started .*, and was sent nothing", told.says)
    assert sleeper.poll() is None
    assert overview.overview(run).status == "finished"


def test_another_machines_process_is_left_alone(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = made_run(tmp_path, "")
    started = psutil.Process(sleeper.pid).create_time()
    write_json(run / "process.json", {"pid": sleeper.pid, "host": "elsewhere.example", "started": started})
    (told,) = processes.stop([run], wait=1.0)
    assert not told.ended
    assert told.says == "runs on elsewhere.example; stop it there"
    assert sleeper.poll() is None
    assert overview.overview(run).status == "elsewhere"
    with pytest.raises(RunError, match="may be running on another machine"):
        clearing.candidates(tmp_path, [run.name])


def test_what_does_not_end_in_time_is_told(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    deaf = subprocess.Popen(["sh", "-c", 'trap "" INT; echo; exec sleep 100'], stdout=subprocess.PIPE)
    try:
        assert deaf.stdout is not None
        deaf.stdout.readline()
        started = psutil.Process(deaf.pid).create_time()
        write_json(run / "process.json", {"pid": deaf.pid, "host": platform.node(), "started": started})
        (told,) = processes.stop([run], wait=0.5)
        assert (told.ended, told.says) == (False, f"process {deaf.pid} was asked to end 0.5 s ago, and still runs")
    finally:
        deaf.send_signal(signal.SIGKILL)
        deaf.communicate()


def test_a_damaged_process_file_is_told(tmp_path: Path) -> None:
    run = made_run(tmp_path)
    (run / "process.json").write_text("{}")
    with pytest.raises(RunError, match=r"process.json names no process"):
        processes.stop([run])


# --------------------------------------------------------------------------------------------------------------- clear


def test_clear_asks_and_removes_what_fits(tmp_path: Path) -> None:
    data = tmp_path / "data"
    good, cut = made_run(data, name="good"), made_run(data, "interrupted", name="cut")
    asked = small.longrein(tmp_path, "clear", "--unfinished", stdin="n\n")
    assert "remove 1 of the runs" in asked.stdout
    assert cut.exists()
    done = small.longrein(tmp_path, "clear", "--unfinished", "--yes")
    assert done.returncode == 0, done.stderr
    assert not cut.exists()
    assert good.exists()
    assert [path.name for path in data.iterdir()] == [good.name], "nothing hidden is left"


def test_runs_fit_by_age_and_state(tmp_path: Path) -> None:
    old, new = made_run(tmp_path, name="old"), made_run(tmp_path, "failed", name="new")
    long_ago = time.time() - 10 * 86_400
    for path in [*old.rglob("*"), old]:
        os.utime(path, (long_ago, long_ago))
    names = lambda **asked: [one.run.spec for one in clearing.candidates(tmp_path, **asked)]  # noqa: E731
    assert sorted(names()) == ["new", "old"]
    assert names(older_than=clearing.seconds_of("7d")) == ["old"]
    assert names(older_than=clearing.seconds_of("2w")) == []
    assert names(unfinished=True) == ["new"]
    assert names(names=[str(new)], older_than=clearing.seconds_of("1h")) == []
    with pytest.raises(SpecError, match="'soon' is no time span"):
        clearing.seconds_of("soon")


def test_clear_never_leaves_the_data_folder(tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other"
    outside = made_run(other)
    data.mkdir()
    (data / "link").symlink_to(outside)
    (data / "mine").mkdir()
    run = made_run(data)
    (run / "precious").symlink_to(outside)
    for name, says in [
        ("link", "is a link to"),
        (str(outside), "is not a folder of"),
        (f"../other/{outside.name}", "is not a folder of"),
        ("..", "is not a folder of"),
        (".", "is not a folder of"),
        ("mine", "is no run"),
        ("nowhere", "there is no run"),
    ]:
        with pytest.raises(RunError, match=says):
            clearing.candidates(data, [name])
        with pytest.raises(RunError):
            clearing.remove(data, data / name)
    (found,) = clearing.candidates(data)  # the link is left out
    clearing.remove(data, found.run.folder)
    assert not run.exists()
    assert (outside / "session_0" / "result.json").exists(), "a link inside a run was followed"


def test_clear_without_saying_what_is_refused(tmp_path: Path) -> None:
    made_run(tmp_path / "data")
    done = small.longrein(tmp_path, "clear", "--yes")
    assert done.returncode == 1
    assert "names no run" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- sync


@pytest.mark.parametrize("scheme", ["file", "memory", "plain"])
def test_what_is_new_or_changed_is_copied(tmp_path: Path, scheme: str) -> None:
    data = tmp_path / "data"
    run = made_run(data)
    to = {"file": f"file://{tmp_path}/copy", "memory": f"memory://{tmp_path.name}", "plain": str(tmp_path / "copy")}
    files, root = fsspec.core.url_to_fs(to[scheme])
    read = lambda name: files.cat_file(f"{root}/{run.name}/{name}").decode()  # noqa: E731
    first = Destination(data, to[scheme]).sync()
    assert first.copied == len(list(run_files(data))) == 4
    assert read("session_0/episodes.csv") == "env_steps,return\n10,1.5\n"
    assert Destination(data, to[scheme]).sync() == type(first)(0, 0, 4), "a new process knows what was copied"
    with (run / "session_0" / "episodes.csv").open("a") as table:
        table.write("20,2.5\n30,3")  # a line that is being written
    (run / "session_0" / ".checkpoint.pt.77").write_bytes(b"half")
    again = Destination(data, to[scheme]).sync()
    assert (again.copied, again.skipped) == (1, 3)
    assert read("session_0/episodes.csv") == "env_steps,return\n10,1.5\n20,2.5\n"
    assert not files.exists(f"{root}/{run.name}/session_0/.checkpoint.pt.77")
    files.rm(f"{root}/{run.name}/settings.json")
    assert Destination(data, to[scheme]).sync().copied == 1, "what was lost at the other end is copied again"
    assert not [path for path in files.find(root) if ".part" in path]


def test_a_copy_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    made_run(data)
    made_run(data, name="second")
    there = Destination(data, f"file://{tmp_path}/copy")
    whole, copied = there._copy, []

    def fails(file: object, name: str, length: int) -> None:
        if len(copied) == 5:
            raise OSError(28, "No space left on device")
        copied.append(name)
        whole(file, name, length)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(there, "_copy", fails)
    with pytest.raises(RunError, match=r"could not be copied to file://.*No space left on device"):
        there.sync()
    (note,) = data.glob(".sync.*")
    note.write_text(note.read_text() + '["cut')  # as a kill leaves it
    done = Destination(data, f"file://{tmp_path}/copy").sync()
    assert (done.copied, done.skipped) == (3, 5)


def test_a_removed_run_stays_at_the_other_end(tmp_path: Path) -> None:
    data = tmp_path / "data"
    run = made_run(data)
    there = Destination(data, str(tmp_path / "copy"))
    there.sync()
    clearing.remove(data, run)
    assert there.sync().copied == 0
    assert (tmp_path / "copy" / run.name / "settings.json").exists()


def test_watching_copies_what_comes_later(tmp_path: Path) -> None:
    data = tmp_path / "data"
    made_run(data)
    process = subprocess.Popen(
        small.command("sync", "copy", "--watch", "0.2"),
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        small.until(lambda: len(list((tmp_path / "copy").glob("*/settings.json"))) == 1)
        made_run(data, name="later")
        small.until(lambda: len(list((tmp_path / "copy").glob("*/settings.json"))) == 2)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "4 files copied" in said


@pytest.mark.parametrize(
    ("to", "says"),
    [
        ("nope://bucket/runs", "nope://bucket/runs cannot be used: Protocol not known: nope"),
        ("data/copy", "lies within"),
        ("blocked/copy", "could not be copied to"),
    ],
)
def test_a_destination_that_cannot_be_used_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "data")
    (tmp_path / "blocked").write_text("a file, where a folder should be")
    with pytest.raises(RunError, match=says):
        Destination(tmp_path / "data", to).sync()


def test_there_must_be_something_to_copy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no folder"):
        Destination(tmp_path / "data", str(tmp_path))
