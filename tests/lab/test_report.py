"""Fitness made of files, and pages that are made of files alone and load nothing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from lab.written import SMALL, write_run, write_session

from longrein.errors import RunError
from longrein.lab import baseline, experiment, records, report, search_table, spec, trial_fitness
from longrein.lab.baseline import Baseline
from longrein.lab.fitness import Standard
from longrein.lab.search import search_space
from longrein.lab.search_table import Experiment, Row

RANDOM = Baseline(10.0, 3.0, 100, 2000)


def baselined(run: Path, env: str = "CartPole-v1") -> Path:
    records.write_json(run / "baseline.json", {env: vars(RANDOM)})
    return run


# ------------------------------------------------------------------------------------------------------------- fitness


def test_checkpoints_by_hand() -> None:
    # A budget of 2000 in 20 parts of 100; an episode of 40 env steps, so that part 1 ends after episodes at 40 and 80,
    # part 2 after 120, 160 and 200; the session ended at 240, in the middle of part 3.
    steps = np.array([40.0, 80, 120, 160, 200, 240])
    columns = {"env_steps": steps, "return": np.array([1.0, 3, 4, 5, 6, 9]), "updates": steps / 10}
    found = trial_fitness.checkpoints(columns, 2000)
    assert found["return"].tolist() == [2.0, 5.0, 9.0]
    assert found["env_steps"].tolist() == [100.0, 200.0, 240.0]
    assert found["updates"].tolist() == [10.0, 20.0, 24.0]


def test_a_part_without_an_end_of_an_episode_has_the_one_before() -> None:
    steps = np.array([150.0, 350.0])
    found = trial_fitness.checkpoints({"env_steps": steps, "return": np.array([1.0, 2.0]), "updates": steps}, 2000)
    assert found["return"].tolist() == [1.0, 1.0, 2.0], "parts 2, 3 and 4; in part 1 none ended"


def test_a_trial_that_solves_its_environment(tmp_path: Path) -> None:
    # 110 episodes of return 475 in 20 env steps each: strength 1, the first window begins at env step 20, so that speed
    # is 20,000 / 20; nothing falls.
    run = baselined(write_run(tmp_path))
    for seed in (0, 1):
        write_session(run, seed, [475.0] * 110)
    found = trial_fitness.appraise(run)
    assert found["slm2018"] == pytest.approx(
        {"strength": 1, "speed": 1000, "stability": 1, "consistency": 1, "fitness": np.sqrt((3 + 1000**2) / 4)}
    )
    assert found["slm5"]["strength"] == 465.0, "475 less the random policy's 10"
    assert found["slm5"]["stability"] == found["slm5"]["consistency"] == 1.0
    assert found["beside"]["steps_to_target"] == 200.0, "ten episodes, the window, of 20 env steps"
    assert found["beside"]["final_return"] == found["beside"]["iqm"] == found["beside"]["iqm_low"] == 475.0
    body = found["bodies"]["0.0.0"]
    assert body["standard"]["solved"] == 475.0
    assert set(body["sessions"]) == {0, 1}


def test_what_cannot_be_said_is_null(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert trial_fitness.appraise(run) == {"slm2018": None, "slm5": None, "beside": None, "bodies": {}}
    write_session(run, 0, [])
    write_session(run, 1, [1.0, 2.0])
    found = trial_fitness.write(run)
    assert found["slm5"] is None, "nobody played a random policy"
    assert found["slm2018"]["fitness"] == 0.0, "fewer than a hundred episodes"
    assert found["beside"]["steps_to_target"] is None
    assert found["beside"]["iqm_low"] is None, "one session says nothing of the others"
    assert not (run / "trial.json").exists(), "the trial has not ended"
    records.write_json(run / "trial.json", {"sessions": {}, "failures": {}})
    trial_fitness.write(run)
    noted = json.loads((run / "trial.json").read_text())
    assert noted["fitness"]["beside"] == found["beside"]
    assert noted["failures"] == {}


@pytest.mark.parametrize(
    ("env", "target", "random", "expected"),
    [
        ("CartPole-v1", None, None, Standard(22.0, 475.0, 20_000.0)),
        ("Acrobot-v1", None, -500.0, Standard(-500.0, -100.0, 5000.0)),  # Gymnasium's registry says -100
        ("Acrobot-v1", -80.0, -500.0, Standard(-500.0, -80.0, 5000.0)),
        ("Acrobot-v1", None, None, None),
        ("Acrobot-v1", -500.0, -500.0, None),  # solved by chance
        ("ws://host:1/x", None, 0.0, None),
    ],
)
def test_the_standard_of_an_environment(
    env: str, target: float | None, random: float | None, expected: Standard | None
) -> None:
    assert trial_fitness.standard_of(env, target, random, 5000.0) == expected


def test_fitness_of_several_bodies_is_their_mean(tmp_path: Path) -> None:
    run = baselined(write_run(tmp_path))
    folder = write_session(run, 0, [1.0, 2.0])
    lines = ["env_steps,seconds,env,length,return,truncated,body"]
    lines += [f"{20 * i + 20},1,0,20,{[10, 30][i % 2]},0,0.0.{i % 2}" for i in range(40)]
    (folder / "episodes.csv").write_text("\n".join(lines) + "\n")
    found = trial_fitness.appraise(run)
    assert [body["beside"]["final_return"] for body in found["bodies"].values()] == [10.0, 30.0]
    assert found["beside"]["final_return"] == 20.0
    assert found["slm5"]["strength"] == 10.0, "0 of the one and 20 of the other"


def test_a_random_policy_is_played_once(tmp_path: Path) -> None:
    opened = []

    def open_envs(count: int) -> object:
        opened.append(count)
        return experiment.open_envs(spec.EnvSpec(id="CartPole-v1"), count)

    (tmp_path / "a").mkdir()
    first = baseline.measure_missing(tmp_path / "a", [("CartPole-v1", open_envs)])  # type: ignore[list-item]
    assert baseline.measure_missing(tmp_path / "a", [("CartPole-v1", open_envs)]) == first  # type: ignore[list-item]
    assert len(opened) == 1
    measured = first["CartPole-v1"]
    assert measured.episodes == 100
    assert 15 < measured.mean < 30  # 22 or so
    assert measured.env_steps == pytest.approx(measured.mean * 100), "CartPole gives 1 a step"
    again = baseline.measure(partial(experiment.open_envs, spec.EnvSpec(id="CartPole-v1")))
    assert again == measured, "the same seeds each time"


# ---------------------------------------------------------------------------------------------------------------- page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two sessions, of which the second was killed, and a third died."""
    run = baselined(write_run(tmp_path))
    rng = np.random.default_rng(0)
    write_session(run, 0, rng.normal(20, 3, 60).tolist())
    write_session(run, 1, rng.normal(20, 3, 50).tolist(), finished=False)
    died = write_session(run, 2, [5.0], finished=False)
    (died / "failure.txt").write_text("Traceback ...\nValueError: </script><b>not bold</b>")
    return run


def test_all_is_drawn_again_from_files_alone(run: Path) -> None:
    assert report.write(run) == run / "report.html"
    made = [run / "report.html", run / "graph.png", *run.glob("session_*/graph.png")]
    assert len(made) == 5
    before = {path: path.read_bytes() for path in made}
    for path in made:
        path.unlink()
    report.write(run)
    assert all(path.read_bytes() == before[path] for path in made if path.suffix == ".png")
    assert _without_time(made[0].read_text()) == _without_time(before[made[0]].decode())


def _without_time(page: str) -> str:
    return re.sub(r"; \d{4}-\d\d-\d\d \d\d:\d\d\.", "", page)


def test_a_page_says_what_is_known(run: Path) -> None:
    page = report.write(run).read_text()
    for text in ("ppo on CartPole-v1", "Fitness: slm2018", "Fitness: slm5", "budget spent", "goes on, or was killed",
                 "Session 2 died", "rollout_steps: 32", "10.0, measured over 100 episodes", "torch"):  # fmt: skip
        assert text in page, text
    assert "ValueError: &lt;/script&gt;&lt;b&gt;not bold" in page


def test_a_page_loads_nothing(run: Path) -> None:
    page = report.write(run).read_text()
    body = page[page.rindex("</style>") :].rsplit("</script>\n</head>")[-1]  # behind plotly's own code
    assert "http://" not in body
    assert "https://" not in body
    assert not re.search(r"<(link|img|iframe|script[^>]*\bsrc)", body)
    assert "default-src 'none'" in page


def test_a_session_has_a_page_of_its_own(run: Path) -> None:
    page = report.write(run / "session_0").read_text()
    assert "small, session 0" in page
    assert "session 1" not in page


def test_a_name_cannot_end_a_script(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    folder = write_session(run, 0, [1.0, 2.0])
    text = (folder / "metrics.csv").read_text().replace("value_loss", "loss")
    (folder / "metrics.csv").write_text(text)
    (folder / "episodes.csv").write_text("env_steps,seconds,return,body\n1,1,5,0.0.0</script><script>alert(1)\n")
    assert "</script><script>alert" not in report.write(folder).read_text()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run"):
        report.write(tmp_path)


def test_the_command_makes_a_page(run: Path) -> None:
    words = [sys.executable, "-m", "longrein.cli", "report", str(run), str(run.parent)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (1, str(run / "report.html")), done.stderr
    assert f"{run.parent} is no run" in done.stderr


def test_a_search_has_its_trials_the_best_first(tmp_path: Path) -> None:
    drawn = {
        "search": {"agent.algorithm.lr": {"loguniform": [1e-5, 1e-2]}, "agent.net.hidden": {"choice": [[8], [16]]}}
    }
    made = spec.from_plain("small", {**SMALL, **drawn})
    folder = records.create_run(tmp_path, "small", {"name": "small", "spec": made.plain})
    rows = tuple(
        Row(number, "finished", 4000, {"agent.algorithm.lr": lr, "agent.net.hidden": [8]}, fitness, 20.0, 21.0,
            {"area_under_curve": fitness}, f"trial_{number}")
        for number, (lr, fitness) in enumerate([(1e-4, 11.25), (1e-3, 33.5), (1e-2, 22.75)])
    )  # fmt: skip
    rows += (Row(3, "failed", 10, {"agent.algorithm.lr": 0.5, "agent.net.hidden": [16]}),)
    experiment = Experiment("small", "ppo on CartPole-v1", search_space(made), 4, rows)
    search_table.write(folder, made, experiment)
    (folder / "failures").mkdir()
    (folder / "failures" / "trial_3.txt").write_text("ValueError: too fast")
    page = report.write(folder).read_text()
    body = page[page.rindex("</head>") :]
    assert body.index(">33.5<") < body.index(">22.8<") < body.index(">11.2<") < body.index(">failed<")
    assert "trial 3 died" in body
    assert "ValueError: too fast" in body
    assert "The best spec" in body
    assert (folder / "experiment.png").read_bytes().startswith(b"\x89PNG")
