"""A benchmark runs what is missing and nothing else, and its table and pictures are made of its data files alone."""

from __future__ import annotations

import csv
import json
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from lab import small
from lab.written import write_session

from longrein.errors import RunError, SpecError
from longrein.lab import benchmark, benchmark_results, experiment, fitness, records, report
from longrein.lab.session import SessionResult
from longrein.lab.spec import Spec

SPECS = """\
small:
  agent: {algorithm: {name: ppo, rollout_steps: 32}, net: {hidden: [16]}}
  env: {id: CartPole-v1, num_envs: 2}
  meta: {env_steps: 600, max_session: 2, target: 475, window: 10, eval: {episodes: 2}}
chance:
  agent: {algorithm: {name: random}}
  env: {id: CartPole-v1, num_envs: 2}
  meta: {env_steps: 600, window: 10, eval: {episodes: 2}}
"""
BENCHMARK = """\
both:
  benchmark:
    specs: [{file: specs.yaml, name: small}, {file: specs.yaml, name: chance}]
    seeds: 2
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "specs.yaml").write_text(SPECS)
    (tmp_path / "bench.yaml").write_text(BENCHMARK)
    return tmp_path


# ------------------------------------------------------------------------------------------------------------ the file


def test_a_benchmark_crosses_specs_and_environments(files: Path) -> None:
    (files / "bench.yaml").write_text(
        BENCHMARK + "    envs: [CartPole-v1, {id: Acrobot-v1, num_envs: 1}]\n    env_steps: 900\n"
        "    set: {meta.eval.episodes: 7}\n"
    )
    found = benchmark.load(files / "bench.yaml")
    assert [(entry.spec, entry.env) for entry, _ in found.specs] == [
        ("small", "CartPole-v1"), ("small", "Acrobot-v1"), ("chance", "CartPole-v1"), ("chance", "Acrobot-v1"),
    ]  # fmt: skip
    assert found.seeds == (0, 1)
    (own, spec), (other, elsewhere), *_ = found.specs
    assert (own.target, other.target) == (475.0, None), "what solves one environment says nothing of another"
    assert (spec.meta.target, spec.meta.env_steps, spec.meta.eval.episodes) == (None, 900, 7)
    assert (elsewhere.envs[0].id, elsewhere.envs[0].num_envs) == ("Acrobot-v1", 1)


def test_more_seeds_are_the_same_entries(files: Path) -> None:
    few = benchmark.load(files / "bench.yaml")
    (files / "bench.yaml").write_text(BENCHMARK.replace("seeds: 2", "seeds: [0, 1, 7]"))
    many = benchmark.load(files / "bench.yaml")
    assert [entry for entry, _ in few.specs] == [entry for entry, _ in many.specs]
    assert few.fingerprint != many.fingerprint
    one = benchmark.load(files / "specs.yaml", "small")
    assert (len(one.specs), one.seeds) == (1, (0, 1)), "any spec can be benchmarked, with its own sessions"
    assert one.specs[0][0] == few.specs[0][0]


@pytest.mark.parametrize(
    ("line", "key", "problem"),
    [
        ("specs: [{file: specs.yaml, nam: small}]", "benchmark.specs.0.nam", "no such key"),
        ("specs: [{name: small}]", "benchmark.specs.0", "names no file"),
        ("specs: []", "benchmark.specs", "no list of at least one"),
        ("specs: [{file: specs.yaml, name: smal}]", "name", "did you mean 'small'"),
        ("specs: [{file: specs.yaml}]", "name", "2 specs: name one"),
        ("specs: [{file: none.yaml}]", "file", "cannot be read"),
        ("specs: [{file: specs.yaml, name: small}]\n    sedes: 3", "benchmark.sedes", "did you mean 'seeds'"),
        ("specs: [{file: specs.yaml, name: small}]\n    seeds: 0", "benchmark.seeds", "is 0"),
        ("specs: [{file: specs.yaml, name: small}]\n    seeds: [1, 1]", "benchmark.seeds", "different ones"),
        ("specs: [{file: specs.yaml, name: small}]\n    envs: [3]", "benchmark.envs.0", "neither"),
        ("specs: [{file: specs.yaml, name: small}]\n    env_steps: many", "meta.env_steps", "'many'"),
        ("specs: [{file: specs.yaml, name: small}, {file: specs.yaml, name: small}]", "benchmark.specs", "twice"),
    ],
)
def test_a_wrong_benchmark_is_said(files: Path, line: str, key: str, problem: str) -> None:
    (files / "bench.yaml").write_text(f"wrong:\n  benchmark:\n    {line}\n")
    with pytest.raises(SpecError) as caught:
        benchmark.load(files / "bench.yaml", "wrong")
    assert caught.value.key == key
    assert problem in str(caught.value)


# ------------------------------------------------------------------------------------------------------- going on


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Trials that write their sessions at once, and which were run. Seed 1 of `chance` dies the first time."""
    ran: list[tuple[str, int]] = []

    def run_trial(spec: Spec, data: Path, **_: Any) -> experiment.TrialResult:
        about = {"name": spec.name, "spec": spec.plain, "fingerprint": spec.fingerprint}
        run = records.create_run(data, spec.name, about)
        results: list[SessionResult | None] = []
        failures = {}
        for seed in range(spec.meta.seed, spec.meta.seed + spec.meta.max_session):
            dies = (spec.name, seed) == ("chance", 1) and ("chance", 1) not in ran
            ran.append((spec.name, seed))
            folder = write_session(run, seed, [10.0 + seed] * 20 + [30.0 + seed] * 20, finished=not dies)
            if dies:
                failures[seed] = "ValueError: the first time"
                (folder / "failure.txt").write_text(failures[seed])
            results.append(None if dies else SessionResult("budget spent", 800, 2.0, 40, 30.0, (7.0, 9.0), 0, folder,
                                                           folder / "graph.png"))  # fmt: skip
        return experiment.TrialResult(run, tuple(results), failures)

    monkeypatch.setattr(benchmark, "run_trial", run_trial)
    return ran


def test_only_what_is_missing_is_run(files: Path, trials: list[tuple[str, int]]) -> None:
    asked = benchmark.load(files / "bench.yaml")
    first = benchmark.run(asked, files / "data", processes=2)
    assert trials == [("small", 0), ("small", 1), ("chance", 0), ("chance", 1)]
    assert (first.missing, first.failed) == (1, 1)
    assert "the first time" in (first.folder / "report.html").read_text()
    trials_before = len(trials)
    second = benchmark.run(asked, files / "data", processes=2)
    assert trials[trials_before:] == [("chance", 1)]
    assert (second.missing, second.failed) == (0, 0)
    assert not list((second.folder / "runs").iterdir()), "run folders are removed when their results are kept"
    kept = json.loads(next(second.folder.glob("results/small/*/seed_1.json")).read_text())
    assert kept["episodes"]["return"] == [11] * 20 + [31] * 20
    assert kept["episodes"]["env_steps"][-1] == 800
    assert (kept["seconds"], kept["evaluation"]) == (2.0, [7.0, 9.0])
    assert kept["fingerprint"] == asked.specs[0][0].fingerprint
    assert kept["versions"]["torch"]


def test_what_a_killed_trial_left_is_found(files: Path, trials: list[tuple[str, int]]) -> None:
    asked = benchmark.load(files / "bench.yaml")
    _, spec = asked.specs[0]
    about = {"name": spec.name, "spec": spec.plain, "fingerprint": spec.fingerprint}
    killed = records.create_run(files / "data" / "both_benchmark" / "runs", "small", about)
    write_session(killed, 0, [5.0] * 20)
    write_session(killed, 1, [5.0] * 20, finished=False)
    benchmark.run(asked, files / "data")
    assert trials[0] == ("small", 1)
    assert ("small", 0) not in trials


def test_an_interrupted_benchmark_begins_nothing_more(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_trial(spec: Spec, data: Path, **_: Any) -> experiment.TrialResult:
        run = records.create_run(data, spec.name, {"name": spec.name, "spec": spec.plain})
        return experiment.TrialResult(run, (None,) * spec.meta.max_session, {})

    monkeypatch.setattr(benchmark, "run_trial", run_trial)
    outcome = benchmark.run(benchmark.load(files / "bench.yaml"), files / "data")
    assert (outcome.missing, outcome.failed) == (4, 0)
    assert not (outcome.folder / "results" / "chance").exists()
    assert "0 of 2" in (outcome.folder / "table.md").read_text()


def test_it_begins_nothing_more_when_the_sessions_ended_before_they_heard(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_trial(spec: Spec, data: Path, **options: Any) -> experiment.TrialResult:
        return replace(experiment.run_trial(spec, data, **options), interrupted=True)

    monkeypatch.setattr(benchmark, "run_trial", run_trial)
    outcome = benchmark.run(benchmark.load(files / "bench.yaml"), files / "data", processes=2)
    assert outcome.missing == 2
    assert not (outcome.folder / "results" / "chance").exists()


def test_two_do_not_run_it_into_one_folder(files: Path, trials: list[tuple[str, int]]) -> None:
    asked = benchmark.load(files / "bench.yaml")
    folder = benchmark.run(asked, files / "data").folder
    other = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        begun = psutil.Process(other.pid).create_time()
        about = {"pid": other.pid, "host": platform.node(), "started": begun}
        (folder / "process.json").write_text(json.dumps(about))
        before = len(trials)
        with pytest.raises(RunError, match=f"still runs, in process {other.pid}"):
            benchmark.run(asked, files / "data")
        assert len(trials) == before
    finally:
        other.kill()
        other.wait()
    assert benchmark.run(asked, files / "data").missing == 0  # its process is gone


def test_sigterm_to_the_benchmark_alone_ends_its_sessions(files: Path) -> None:
    (files / "specs.yaml").write_text(SPECS.replace("env_steps: 600", "env_steps: 100000000"))
    words = small.command("run", "bench.yaml", "both", "benchmark", "--processes", "1", "--data", "data")
    process = subprocess.Popen(words, cwd=files, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        metrics = files / "data" / "both_benchmark" / "runs"
        small.until(lambda: any(path.stat().st_size > 200 for path in metrics.glob("*/session_0/metrics.csv")))
        process.terminate()
        asked = time.monotonic()
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert time.monotonic() - asked < 25, "a session that does not hear of it is waited for half a minute"
    assert not list((files / "data").rglob("seed_*"))


def test_another_spec_of_the_same_name_is_run_anew(files: Path, trials: list[tuple[str, int]]) -> None:
    benchmark.run(benchmark.load(files / "bench.yaml"), files / "data")
    del trials[:]
    changed = benchmark.load(files / "bench.yaml", overrides={"agent.algorithm.rollout_steps": 64})
    benchmark.run(changed, files / "data")
    assert trials[:2] == [("small", 0), ("small", 1)]


def as_before(folder: Path, fingerprint: str, **clip: Any) -> Path:
    """Make the results of `small` those of a version without PPO's setting `clip`, or with another one."""
    about = json.loads((folder / "benchmark.json").read_text())
    old = about["entries"][0]
    del old["plain"]["agent"]["algorithm"]["clip"]
    old["plain"]["agent"]["algorithm"] |= clip
    before = benchmark_results.Entry(**old).folder(folder)
    old["fingerprint"] = fingerprint
    (folder / "benchmark.json").write_text(json.dumps(about))
    after = benchmark_results.Entry(**old).folder(folder)
    before.rename(after)
    return after


def test_results_from_before_a_setting_existed_are_taken_over(files: Path, trials: list[tuple[str, int]]) -> None:
    asked = benchmark.load(files / "bench.yaml")
    folder = benchmark.run(asked, files / "data").folder
    old = as_before(folder, "0123456789abcdef")
    assert benchmark.run(asked, files / "data").missing == 0
    assert trials[4:] == [("chance", 1)]  # which had died
    assert not old.exists()
    kept = json.loads((asked.specs[0][0].folder(folder) / "seed_1.json").read_text())
    assert kept["fingerprint"] == asked.specs[0][0].fingerprint
    assert kept["episodes"]["return"] == [11] * 20 + [31] * 20


@pytest.mark.parametrize("setting", [{"clip": 0.3}, {"clap": 0.2}], ids=["another value", "a setting no more"])
def test_other_results_are_not(files: Path, trials: list[tuple[str, int]], setting: dict[str, float]) -> None:
    asked = benchmark.load(files / "bench.yaml")
    folder = benchmark.run(asked, files / "data").folder
    del trials[:]
    old = as_before(folder, "0123456789abcdef", **setting)
    benchmark.run(asked, files / "data")
    assert trials[:2] == [("small", 0), ("small", 1)]
    assert old.exists()


def test_table_and_pictures_are_made_of_the_data_files(files: Path, trials: list[tuple[str, int]]) -> None:
    asked = benchmark.load(files / "bench.yaml")
    benchmark.run(asked, files / "data")
    folder = benchmark.run(asked, files / "data").folder
    made = [folder / name for name in ("table.md", "table.csv", "curves.png", "aggregate.png", "report.html")]
    before = {path: path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    report.write(folder)
    assert all(path.read_bytes() == before[path] for path in made if path.suffix != ".html")
    assert "small" in made[-1].read_text()
    with (folder / "table.csv").open() as file:
        small, chance = csv.DictReader(file)
    # Means over the last ten of 40 episodes: 30 of seed 0 and 31 of seed 1.
    assert (float(small["last"]), float(small["last_low"]), float(small["last_high"])) == (30.5, 30.0, 31.0)
    assert (small["best"], small["evaluation"], small["steps_per_second"]) == ("30.5", "8.0", "400.0")
    assert (small["solved"], small["steps_to_solved"], chance["seeds"]) == ("0", "", "2")
    assert "| small | CartPole-v1 | 2 of 2 | 30.5 (30.0 to 31.0) |" in (folder / "table.md").read_text()


def test_scores_lie_between_chance_and_solved(files: Path, trials: list[tuple[str, int]]) -> None:
    folder = benchmark.run(benchmark.load(files / "bench.yaml"), files / "data").folder
    found = benchmark_results.read(folder)
    random = found.baselines["CartPole-v1"].mean
    best, _ = benchmark_results.aggregates(found)
    assert best.iqm == pytest.approx((30.5 - random) / (475 - random))
    assert best.interval is not None
    assert best.interval[0] <= best.iqm <= best.interval[1]
    (panel,) = benchmark_results.panels(found)
    assert panel.solved == 475.0
    assert panel.bands[0].middle[-1] == 30.5


def test_the_band_of_a_benchmark() -> None:
    middle, low, high = fitness.iqm_band(np.array([[1.0, 0.0], [1.0, 2.0], [1.0, 4.0], [1.0, 100.0]]))
    assert middle.tolist() == [1.0, 3.0]
    assert (low[0], high[0]) == (1.0, 1.0)
    assert low[1] < 3.0 < high[1]
    assert [part.tolist() for part in fitness.iqm_band(np.array([[5.0]]))] == [[5.0]] * 3
    assert fitness.iqm_interval([[1.0, 2.0], [3.0]]) is None
    lines = np.random.default_rng(0).normal(size=(7, 5))
    lines[3, 1] = np.nan
    found = fitness.iqm_band(lines)[0]
    assert np.isnan(found).tolist() == [False, True, False, False, False]
    assert found[0] == pytest.approx(fitness.iqm(lines[:, 0]))


def test_what_is_no_benchmark_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no benchmark"):
        benchmark_results.read(tmp_path)


# ------------------------------------------------------------------------------------------------------------ for real


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_killed_and_started_again_it_goes_on(files: Path) -> None:
    words = [sys.executable, "-m", "longrein.cli", "run", "bench.yaml", "both", "benchmark", "--processes", "1"]
    process = subprocess.Popen([*words, "--data", "data"], cwd=files, start_new_session=True)
    results = files / "data" / "both_benchmark" / "results"
    deadline = time.monotonic() + 200
    while not list(results.glob("small/*/seed_0.json")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in results.rglob("seed_*.json")}
    assert kept
    done = subprocess.run([*words, "--data", "data"], cwd=files, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "what was there is not run again"
    assert len(list(results.rglob("seed_*.json"))) == 4
    assert "| chance | CartPole-v1 | 2 of 2 |" in done.stdout
