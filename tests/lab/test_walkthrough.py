"""The walk-through: its notebook is its page, and it runs from an empty folder to the end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

GUIDES = Path(__file__).parents[2] / "docs" / "guides"
PAGE, NOTEBOOK = GUIDES / "walkthrough.md", GUIDES / "walkthrough.ipynb"


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_the_notebook_is_the_page() -> None:
    remake = f"jupytext --to ipynb {PAGE.name}"
    assert cells(NOTEBOOK) == cells(PAGE), f"in docs/guides: {remake}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_from_an_empty_folder_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:  # the same steps with next to no training
        cell.source = cell.source.replace("env_steps: 40000", "env_steps: 400").replace("seeds: 3", "seeds: 2")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "\n".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "did you mean 'gamma'?" in said
    assert "nothing was run" in said
    assert said.count("mean return") >= 4
    assert len(list((tmp_path / "films").glob("*.mp4"))) == 2
    published = tmp_path / "published" / "comparison_benchmark"
    assert "CartPole-v1" in (published / "table.md").read_text()
    page = (published / "report.html").read_text()
    assert "ppo" in page
    assert "dqn" in page
    assert (tmp_path / "published" / "specs.yaml").exists()
