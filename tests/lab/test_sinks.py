"""What a spec asks for beside the run folder gets the same numbers, and nothing is imported that was not asked for."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from lab.written import write_run, write_session

from longrein.errors import SpecError
from longrein.lab import sinks, spec


def test_a_spec_names_its_sinks_and_they_change_no_fingerprint(tmp_path: Path) -> None:
    text = "one:\n  agent: {algorithm: {name: ppo}}\n  env: {id: CartPole-v1}\n  meta: {sinks: [SINK]}\n"
    (tmp_path / "with.yaml").write_text(text.replace("SINK", "mlflow"))
    (tmp_path / "without.yaml").write_text(text.replace("SINK", ""))
    found = [spec.load(tmp_path / name) for name in ("with.yaml", "without.yaml")]
    assert [one.meta.sinks for one in found] == [("mlflow",), ()]
    assert found[0].fingerprint == found[1].fingerprint
    (tmp_path / "with.yaml").write_text(text.replace("SINK", "wandbb"))
    with pytest.raises(SpecError, match=r"meta\.sinks\.0: is 'wandbb'"):
        spec.load(tmp_path / "with.yaml")


def test_a_package_that_is_not_there_is_said_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'longrein\[wandb\]'"):
        sinks.check(["wandb"])
    with pytest.raises(SpecError, match="there is no sink 'x'"):
        sinks.check(["x"])


def test_nothing_is_imported_that_was_not_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom lab.written import write_run, write_session\n"
        "write_session(write_run(Path(sys.argv[1])), 0, [1.0, 2.0])\n"
        "sys.exit(str({'wandb', 'mlflow'} & set(sys.modules) or ''))"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.stderr.strip() == "", done.stderr


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")
def test_mlflow_has_the_numbers_in_its_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = write_run(tmp_path, sinks=["mlflow"])
    write_session(run, 0, [1.0, 2.0, 3.0, 4.0])
    write_session(run, 1, [5.0, 6.0])
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    found = {one.data.tags["seed"]: one for one in client.search_runs([experiment.experiment_id])}
    assert {seed: one.info.status for seed, one in found.items()} == {"0": "FINISHED", "1": "FINISHED"}
    assert found["0"].data.params["agent.algorithm.name"] == "ppo"
    history = client.get_metric_history(found["0"].info.run_id, "training/return")
    assert [(one.step, one.value) for one in history] == [(20, 1.0), (40, 2.0), (60, 3.0), (80, 4.0)]
    assert found["0"].data.metrics["evaluation/return"] == 8.0
    assert found["1"].data.metrics["learning/value_loss"] == 5.0 / 40


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs the extra wandb")
def test_wandb_has_the_numbers_in_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = write_session(write_run(tmp_path, sinks=["wandb"]), 0, [1.0, 2.0, 3.0, 4.0])
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    words = (b"training/return", b"evaluation/return", b"learning/value_loss", b"rollout_steps")
    deadline = time.monotonic() + 20  # its own process writes the file, a moment after the run was finished
    while not all(word in log.read_bytes() for word in words):
        assert time.monotonic() < deadline, log.read_bytes()
        time.sleep(0.1)
