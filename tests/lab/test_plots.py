"""Curves against numbers worked by hand, and pictures of much, of little and of nothing, from files alone."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
from lab.written import write_run, write_session

from longrein.errors import RunError
from longrein.lab import curves, plots, records
from longrein.lab.curves import Line

PNG = b"\x89PNG"


def test_moving_mean_by_hand() -> None:
    # 1; (1+3)/2; (3+5)/2; (5+9)/2
    assert curves.moving_mean(np.array([1.0, 3.0, 5.0, 9.0]), 2).tolist() == [1.0, 2.0, 4.0, 7.0]
    assert curves.moving_mean(np.array([]), 2).tolist() == []


def test_a_band_is_mean_and_extremes_on_common_env_steps() -> None:
    # At 0 the second line has not begun; at 10: (1 + 3) / 2; beyond its end a line keeps its last value.
    lines = [
        Line("a", np.array([0.0, 10.0]), np.array([0.0, 1.0])),
        Line("b", np.array([10.0, 20.0]), np.array([3.0, 5.0])),
    ]
    band = curves.mean_band("", lines)
    at = {float(step): index for index, step in enumerate(band.env_steps)}
    assert np.isnan(band.middle[at[0.0]])
    assert (band.middle[-1], band.low[-1], band.high[-1]) == (3.0, 1.0, 5.0)
    middle = curves.on_grid(lines, np.array([0.0, 10.0, 15.0]))
    assert middle[:, 1:].tolist() == [[1.0, 1.0], [3.0, 4.0]]


@pytest.mark.parametrize(
    ("columns", "loss", "exploration"),
    [
        (("policy_loss", "value_loss", "entropy"), "value_loss", "entropy"),
        (("loss", "td_error", "exploration"), "loss", "exploration"),
        (("critic_loss", "policy_loss", "entropy", "alpha"), "critic_loss", "entropy"),
        (("q_loss", "entropy"), "q_loss", "entropy"),
        (("critic_loss", "exploration_noise"), "critic_loss", "exploration_noise"),
        (("reward",), None, None),
    ],
)
def test_what_stands_for_learning_and_exploring(columns: tuple[str, ...], loss: str, exploration: str) -> None:
    metrics = {"env_steps": np.array([1.0, 2.0])} | {name: np.array([np.nan, 1.0]) for name in columns}
    for names, expected in ((curves.LOSSES, loss), (curves.EXPLORATION, exploration)):
        lines = curves.first_of(metrics, names)
        assert [line.label for line in lines] == ([expected] if expected else [])
        assert all(line.env_steps.tolist() == [2.0] for line in lines), "what is NaN was not measured"


def test_bodies_and_agents_have_lines_of_their_own() -> None:
    table = {"env_steps": np.array([1.0, 2.0, 3.0]), "return": np.array([5.0, 6.0, 7.0]),
             "body": np.array(["0.0.0", "0.1.0", "0.0.0"])}  # fmt: skip
    first, second = curves.by_body(table, "return")
    assert (first.label, first.values.tolist(), second.values.tolist()) == ("body 0.0.0", [5.0, 7.0], [6.0])
    metrics = {
        "env_steps": np.array([1.0, 1.0]),
        "agent": np.array([0.0, 1.0]),
        "env": np.zeros(2),
        "loss": np.array([3.0, 4.0]),
    }
    assert [line.label for line in curves.first_of(metrics, curves.LOSSES)] == ["loss, agent 0", "loss, agent 1"]


def test_pictures_of_much_of_little_and_of_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    plots.draw_trial(run)  # no session yet
    write_session(run, 0, [float(value) for value in range(60)])
    write_session(run, 1, [3.0], finished=False)
    empty = write_session(run, 2, [], finished=False)
    plots.draw_trial(run)
    for folder in records.sessions_of(run):
        assert plots.draw_session(folder).read_bytes().startswith(PNG)
    assert (run / "graph.png").stat().st_size > (empty / "graph.png").stat().st_size / 2
    assert not list(run.rglob(".*")), "nothing is left beside"
    shown = curves.read_session(run / "session_0")
    assert [(label, returns.tolist()) for label, returns in shown.evaluation] == [("", [7.0, 9.0])]
    assert (shown.target, shown.window, shown.env_steps) == (50.0, 10, 1200.0)
    assert "60 episodes" in shown.facts


def test_a_picture_needs_no_settings(tmp_path: Path) -> None:
    folder = write_session(tmp_path, 4, [1.0, 2.0])
    assert plots.draw_session(folder, title="by hand").read_bytes().startswith(PNG)


# ------------------------------------------------------------------------------------------------------------- reading


def test_a_column_of_names_and_an_empty_cell(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,body,b\n1,0.0.0,\n2,0.1.0,3\n4,0.")
    table = records.read_columns(tmp_path / "t.csv")
    assert table["a"].tolist() == [1.0, 2.0]
    assert table["body"].tolist() == ["0.0.0", "0.1.0"]
    assert np.isnan(table["b"][0])
    assert records.read_columns(tmp_path / "none.csv") == {}


def test_a_line_of_another_length_is_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(RunError, match=r"t\.csv:3: expected 2 values, got 1"):
        records.read_columns(tmp_path / "t.csv")
    (tmp_path / "t.json").write_text("[1]")
    with pytest.raises(RunError, match="holds no JSON object"):
        records.read_json(tmp_path / "t.json")
    with pytest.raises(RunError, match="no session's folder"):
        records.seed_in(tmp_path)


# -------------------------------------------------------------------------------------------------------------- memory


def test_ten_thousand_episodes_do_not_grow_memory(tmp_path: Path) -> None:
    from longrein.lab.actor import Episode

    run = write_run(tmp_path)
    held: list[int] = []
    with records.SessionRecords(run, 0) as session:
        tracemalloc.start()
        for index in range(0, 10_000, 20):
            steps = range(index * 20, (index + 20) * 20, 20)
            session.add_episodes([Episode(0, step, 20, float(step % 200), False) for step in steps])
            session.add_metrics(steps[-1], {"value_loss": 1.0 + index % 7, "entropy": 0.5})
            if index in (2_000, 9_980):
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    # A list of 8,000 episodes more would be over a megabyte.
    assert held[1] - held[0] < 300_000, held
    tracemalloc.stop()
    sizes = []
    for _ in range(6):
        assert plots.draw_session(session.folder).stat().st_size > 10_000
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss)
    # What is loaded once, is loaded; the pixels of four pictures would be 15 megabytes.
    assert sizes[-1] - sizes[1] < 10_000_000, sizes
    assert len(records.read_columns(session.folder / "episodes.csv")["return"]) == 10_000
