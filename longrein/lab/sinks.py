"""Where metrics go beside a run's own files, when a spec asks for it: Weights & Biases, MLflow. Knows no table.

Both stay on this machine unless they are told otherwise by their own variables: W&B is offline without WANDB_MODE, and
MLflow writes below the run's parent without MLFLOW_TRACKING_URI. A package is imported when a spec asks for it.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from longrein.errors import SpecError

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}
"""The package that each sink needs, and the extra of the same name that installs it."""
_BATCH = 200  # values that MLflow is given at once: a file store opens a file for each


@dataclass(frozen=True)
class Origin:
    """Which session the metrics are of."""

    folder: Path
    """The session's."""
    name: str
    """The spec's."""
    spec: Mapping[str, Any]
    """The resolved spec as plain values."""
    seed: int


class Sink(Protocol):
    """Takes values one after another, until it is closed."""

    def add(self, name: str, value: float, env_steps: int) -> None:
        """Take a value. NaN and infinities are left out."""

    def close(self) -> None:
        """Hand on what is left."""


def check(names: Sequence[str]) -> None:
    """Raise SpecError when a sink is unknown, or its package is not installed."""
    for name in names:
        if name not in PACKAGES:
            raise SpecError("meta.sinks", f"there is no sink {name!r}", hint="one of " + ", ".join(PACKAGES))
        if find_spec(PACKAGES[name]) is None:
            raise SpecError("meta.sinks", f"{name} needs the package {PACKAGES[name]!r}",
                            hint=f"pip install 'longrein[{name}]'")  # fmt: skip


def open_sinks(names: Sequence[str], origin: Origin) -> list[Sink]:
    """The sinks that a spec asks for. Raises SpecError as `check`."""
    check(names)
    makers: dict[str, Callable[[Origin], Sink]] = {"wandb": _Wandb, "mlflow": _Mlflow}
    return [makers[name](origin) for name in names]


class _Wandb:
    """An offline run of Weights & Biases in the session's folder; `wandb sync` sends it."""

    def __init__(self, origin: Origin) -> None:
        import wandb

        self._row: dict[str, float] = {}
        # The same id for a session that is resumed: its parts are one run when they are sent.
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "longrein"), group=origin.folder.parent.name,
            name=f"{origin.folder.parent.name}-{origin.seed}", id=_id_of(origin), resume="allow",
            dir=str(origin.folder), config={"seed": origin.seed, **origin.spec},
            mode=None if "WANDB_MODE" in os.environ else "offline", reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, disable_git=True),
        )  # fmt: skip
        self._run.define_metric("env_steps")
        self._run.define_metric("*", step_metric="env_steps")

    def add(self, name: str, value: float, env_steps: int) -> None:
        if self._row and self._row["env_steps"] != env_steps:
            self._flush()
        if math.isfinite(value):
            self._row |= {"env_steps": env_steps, name: value}

    def close(self) -> None:
        self._flush()
        self._run.finish()

    def _flush(self) -> None:
        if self._row:
            self._run.log(self._row)
            self._row = {}


class _Mlflow:
    """A run of MLflow: in mlruns beside the run's folder, or where MLFLOW_TRACKING_URI says."""

    def __init__(self, origin: Origin) -> None:
        # MLflow asks for a database instead of its file store; files are what a run folder is made of.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        store = origin.folder.parent.parent / "mlruns"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or store.absolute().as_uri())
        self._waiting: list[Any] = []
        with _alone(store.with_name(".mlruns.lock")):
            found = self._client.get_experiment_by_name(origin.name)
            experiment = found.experiment_id if found else self._client.create_experiment(origin.name)
        tags = {"longrein.run": origin.folder.parent.name, "longrein.id": _id_of(origin), "seed": str(origin.seed)}
        before = self._client.search_runs([experiment], f"tags.`longrein.id` = '{tags['longrein.id']}'")
        if before:  # a session that is resumed
            self._id = before[0].info.run_id
            return
        name = f"{origin.folder.parent.name}-{origin.seed}"
        self._id = self._client.create_run(experiment, tags=tags, run_name=name).info.run_id
        for key, value in _flat(origin.spec):
            self._client.log_param(self._id, key, value[:500])

    def add(self, name: str, value: float, env_steps: int) -> None:
        from mlflow.entities import Metric

        if math.isfinite(value):
            self._waiting.append(Metric(name, value, int(time.time() * 1000), env_steps))
        if len(self._waiting) >= _BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._client.set_terminated(self._id)

    def _flush(self) -> None:
        if self._waiting:
            self._client.log_batch(self._id, metrics=self._waiting)
            self._waiting = []


def _id_of(origin: Origin) -> str:
    return f"{origin.folder.parent.name}-{origin.seed}".replace("/", "-")


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as text."""
    for key, value in values.items():
        path = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, path)
        else:
            yield path, str(value)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time: a file store makes two experiments of one name when two ask at once."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
