"""Run mode `search`: trials drawn from a spec's search block, run by Ray Tune. Knows no algorithm and no session.

What a trial is, search_trial.py knows; what is left in the folder, search_table.py.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from longrein.errors import Error, RunError, SpecError
from longrein.lab import plots, ray_cluster, records, report, search_table
from longrein.lab.baseline import measure_missing
from longrein.lab.experiment import open_envs
from longrein.lab.processes import refuse_running
from longrein.lab.schedule import INTERRUPTED
from longrein.lab.search_space import Drawn, Space, clipped, decoded, encoded, space_of
from longrein.lab.search_table import Experiment, Row, Status
from longrein.lab.spec import Source, Spec, from_plain, overridden, resolve

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as TuneTrial

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's shared memory on this machine: reports are small, and Ray would take a third of the memory."""


@dataclass(frozen=True)
class Found:
    """What came of a search."""

    folder: Path
    experiment: Experiment

    @property
    def best_spec(self) -> Path | None:
        """The file of the best trial's spec; None when no trial finished."""
        return self.folder / "best.yaml" if self.experiment.best is not None else None


def search_space(spec: Spec) -> Space:
    """The spec's search block. Raises SpecError when it has none."""
    if not spec.search:
        raise SpecError(
            "search", f"{spec.name} has no search block, so there is nothing to search",
            hint="search: {agent.algorithm.lr: {loguniform: [1.0e-5, 1.0e-2]}}",
        )  # fmt: skip
    plain = without_search(spec)
    source = Source(spec.name, spec.name, plain, {})
    return space_of(spec.search, plain, source.error, lambda changes: resolve(overridden(source, changes)))


def without_search(spec: Spec) -> dict[str, Any]:
    """The spec's plain values without its search block."""
    return {name: part for name, part in spec.plain.items() if name != "search"}


def run_search(
    spec: Spec, data: Path, *, processes: int | None = None, address: str = "", console: Console | None = None
) -> Found:
    """Search, and leave a folder with table, graph and best spec. Ctrl-C ends it cleanly, and `resume_search` goes on.

    processes: processors of this machine for all trials together; all by default. address: of a Ray cluster instead.
    Raises SpecError, RunError.
    """
    space = search_space(spec)
    if address:
        _reach(address)
    settings = {"name": spec.name, "spec": spec.plain, "fingerprint": spec.fingerprint}
    folder = records.create_run(data, spec.name, settings)
    return _search(spec, space, folder.absolute(), processes, address, console or Console(stderr=True))


def resume_search(
    folder: Path, *, processes: int | None = None, address: str = "", console: Console | None = None
) -> Found:
    """Go on with a search that was interrupted or killed: finished trials stay, others go on from their checkpoints.

    Raises RunError when the folder is no search, or its search still runs.
    """
    search_table.read(folder)
    refuse_running(folder)
    spec = from_plain(*records.spec_of(folder))
    if address:
        _reach(address)
    records.record_process(folder)
    return _search(spec, search_space(spec), folder.absolute(), processes, address, console or Console(stderr=True))


def search_mode(spec: Spec, data: Path, processes: int | None = None, address: str = "") -> int:
    """Search and say what was found. The exit status: 0, 1 when no trial finished, 130 when it was interrupted."""
    return _say(run_search(spec, data, processes=processes, address=address))


def resume_mode(folder: Path, processes: int | None = None, address: str = "") -> int:
    """Go on with a search and say what was found. The exit status, as of `search_mode`."""
    return _say(resume_search(folder, processes=processes, address=address))


def _say(found: Found) -> int:
    rows, best = found.experiment.rows, found.experiment.best
    statuses = [row.status for row in rows]
    counts = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    print(f"{found.folder}: {', '.join(counts) or 'no trial began'}, of {found.experiment.planned}")
    if best is not None:
        print(f"best: trial {best.number}, {found.experiment.space.method.metric} {best.fitness:.4g}")
        for key, value in best.drawn.items():
            print(f"  {key}: {value}")
        print(f"train it: longrein run {found.best_spec} {found.experiment.name}")
    if rows:
        print(report.write(found.folder))
    if found.experiment.interrupted:
        print(f"go on with it: longrein run --resume {found.folder}")
        return INTERRUPTED
    return 0 if best is not None else 1


def _search(spec: Spec, space: Space, folder: Path, processes: int | None, address: str, console: Console) -> Found:
    watch = _Watch(folder, spec, space, console)
    watch.write([])
    _play_random(spec, folder)
    with _sigterm_as_sigint(), _ray(address, processes, space), watch.showing():
        trials = _tune(spec, space, folder, watch)
        found = Found(folder, watch.write(trials))
    records.record_end(folder)
    return found


# --------------------------------------------------------------------------------------------------------- Ray and Tune


def _play_random(spec: Spec, folder: Path) -> None:
    """Measure once what a random policy gets, for the fitness of every trial: trials look for it above them."""
    envs = [(records.env_label(asdict(env)), partial(open_envs, env)) for env in spec.envs]
    try:
        measure_missing(folder, envs)
    except Error as error:
        log.warning("%s: no random policy was played: %s", folder, error)


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Tune hears SIGINT only: the first makes it save its state and end its trials."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ray(address: str, processes: int | None, space: Space) -> Iterator[None]:
    """Ray, here or at an address. Raises SpecError when it is not installed, RunError when it cannot be reached."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # a trial's folder has its own tables and events
        "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a search killed hard forgets no more than that
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "TUNE_RESULT_BUFFER_LENGTH": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    try:
        import ray
        from ray import tune  # noqa: F401  # whether its own packages are there
    except ModuleNotFoundError as error:
        raise SpecError("search", f"needs the package {error.name!r}", hint="pip install 'longrein[search]'") from None
    for name in ("ray.tune", "ray.air", "ray.train", "optuna"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what ends a trial is told once, by us
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    here = {"num_cpus": processes, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    settings: dict[str, Any] = quiet if address else quiet | here
    try:
        ray.init(address or "local", **settings)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise RunError(f"{where} cannot be used: {error}", hint="ray status, on its first machine") from None
    try:
        most: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray's
        for name, asked in (("CPU", space.method.cpus), ("GPU", space.method.gpus)):
            if asked > most.get(name, 0.0):
                key = f"search.method.{name.lower()}s"
                raise SpecError(key, f"a trial asks for {asked:g}, and there are {most.get(name, 0.0):g}", hint="fewer")
        yield
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise SpecError for what is no address, RunError where no Ray answers: Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise SpecError("address", f"{address!r} is no HOST:PORT", hint="as `ray start --head` says it: 10.0.0.1:6379")
    ray_cluster.reach(address)


def _tune(spec: Spec, space: Space, folder: Path, watch: _Watch) -> list[TuneTrial]:
    """Every trial, after Tune has run them or was interrupted."""
    from ray import tune
    from ray.tune.execution.placement_groups import PlacementGroupFactory

    from longrein.lab.search_trial import Trial

    method = space.method
    config = {
        "spec": json.dumps(without_search(spec)), "space": space, "folder": str(folder), "working_folder": os.getcwd(),
        "drawn": {key: _domain(drawn) for key, drawn in space.drawn.items()},
    }  # fmt: skip
    resumed = any((folder / "ray" / "tune").glob("experiment_state-*.json"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tune.run(
            Trial,
            name="tune",
            config=config,
            resources_per_trial=PlacementGroupFactory([{"CPU": method.cpus, "GPU": method.gpus}]),
            num_samples=space.samples(spec.meta.max_trial),
            storage_path=str(folder / "ray"),
            search_alg=_searcher(space, spec.meta.seed),
            scheduler=_scheduler(space, spec),
            max_concurrent_trials=method.at_once or None,
            reuse_actors=True,
            raise_on_failed_trial=False,
            resume="AUTO" if resumed else None,
            callbacks=[_listener(watch)],
            trial_name_creator=_name,
            trial_dirname_creator=str,
            verbose=0,
        )
    return list(found.trials)


def _domain(drawn: Drawn) -> Any:
    from ray import tune

    values = drawn.values
    if drawn.kind == "grid":
        return tune.grid_search([encoded(value) for value in values])
    if drawn.kind == "choice":
        return tune.choice([encoded(value) for value in values])
    if drawn.kind == "normal":
        return tune.randn(*values)
    kinds = {
        "uniform": tune.uniform, "quniform": tune.uniform, "loguniform": tune.loguniform,
        "qloguniform": tune.loguniform, "randint": tune.randint,
    }  # fmt: skip
    return kinds[drawn.kind](*values[:2])  # `decoded` rounds to steps


def _searcher(space: Space, seed: int) -> Any:
    from ray.tune.search.basic_variant import BasicVariantGenerator

    method = space.method
    if method.name == "optuna" or (method.name == "asha" and method.sampler == "optuna"):
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(metric="fitness", mode="max", seed=seed)
    return BasicVariantGenerator(random_state=seed)


def _scheduler(space: Space, spec: Spec) -> Any:
    from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

    method, budget = space.method, spec.meta.env_steps
    if method.name == "asha":
        grace = method.grace or max(budget // 10, 1)
        return ASHAScheduler(
            "env_steps", "mean_return", "max", max_t=budget, grace_period=grace, reduction_factor=method.reduction,
            stop_last_trials=False,  # at its last env step a trial has its evaluation before it
        )  # fmt: skip
    if method.name == "pbt":
        mutations: dict[str, Any] = {"drawn": {key: _domain(drawn) for key, drawn in space.drawn.items()}}
        return PopulationBasedTraining(
            "env_steps", "mean_return", "max", perturbation_interval=method.perturb_every or max(budget // 10, 1),
            hyperparam_mutations=mutations, require_attrs=False, log_config=False,
            custom_explore_fn=lambda config: config | {"drawn": clipped(space, config["drawn"])},
        )  # fmt: skip
    return None


def _listener(watch: _Watch) -> Any:
    """Tune's callback, which tells the table what happens."""
    from ray.tune import Callback

    class Listener(Callback):
        def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
            watch.begun(trials)

        def on_trial_result(
            self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
        ) -> None:
            watch.told(trial, result)

        def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
            watch.ended(trials, trial)

        def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
            watch.ended(trials, trial)

    return Listener()


# ---------------------------------------------------------------------------------------------------- what is going on


class _Watch:
    """What Tune tells: on the screen at once, in the folder whenever a trial ends."""

    def __init__(self, folder: Path, spec: Spec, space: Space, console: Console) -> None:
        self._folder, self._spec, self._space, self._console = folder, spec, space, console
        self._planned = space.trials(spec.meta.max_trial)
        self._ended: set[int] = set()
        self._early: set[int] = set()
        self._first = True
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
        )
        self._progress = Progress(*columns, console=console)
        self._whole = self._progress.add_task("trials", total=self._planned, says="")
        self._tasks: dict[int, TaskID] = {}

    @contextmanager
    def showing(self) -> Iterator[None]:
        with self._progress:
            yield

    def begun(self, trials: Sequence[TuneTrial]) -> None:
        """Trials that ended before this process took the search up are ended."""
        if not self._first:
            return
        self._first = False
        if self._folder.joinpath("trials.csv").exists():
            for row in search_table.read(self._folder).rows:
                if row.status == "stopped early":
                    self._early.add(row.number)
        self._ended |= {_number(trial) for trial in trials if trial.status in ("TERMINATED", "ERROR")}
        self._progress.update(self._whole, completed=len(self._ended))

    def told(self, trial: TuneTrial, result: dict[str, Any]) -> None:
        """A trial says how far it is."""
        number = _number(trial)
        if number not in self._tasks:
            total = self._spec.meta.env_steps
            self._tasks[number] = self._progress.add_task(f"trial {number}", total=total, says="")
        says = f"mean return {result['mean_return']:.1f}, {_short(self._drawn(trial))}"
        self._progress.update(self._tasks[number], completed=result["env_steps"], says=says)

    def ended(self, trials: Sequence[TuneTrial], trial: TuneTrial) -> None:
        """A trial has come to its end, was stopped by the scheduler, or died."""
        number = _number(trial)
        self._ended.add(number)
        if number in self._tasks:
            self._progress.remove_task(self._tasks.pop(number))
        row = self._row(trial)
        worth = f"{self._space.method.metric} {row.fitness:.4g}, " if row.fitness is not None else ""
        self._progress.print(f"trial {number} {row.status}: {worth}{_short(row.drawn)}", markup=False, highlight=False)
        if row.status == "failed":
            text = _failure(trial)
            (self._folder / "failures").mkdir(exist_ok=True)
            records.write_text(self._folder / "failures" / f"trial_{number}.txt", text)
            self._progress.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
        best = self.write(trials).best
        if best is not None:
            says = f"best: trial {best.number}, {self._space.method.metric} {best.fitness:.4g}"
            self._progress.update(self._whole, says=says)
        self._progress.update(self._whole, completed=len(self._ended))

    def write(self, trials: Sequence[TuneTrial]) -> Experiment:
        """Table, best spec and graph, as the trials are now."""
        rows = tuple(self._row(trial) for trial in sorted(trials, key=_number))
        title = records.title_of(self._spec.plain)
        found = Experiment(self._spec.name, title, self._space, self._planned, rows)
        if rows or not (self._folder / "trials.csv").exists():
            search_table.write(self._folder, self._spec, found)
        if any(row.fitness is not None for row in rows):
            plots.experiment_graph(self._folder / "experiment.png", found)
            gc.collect()  # a picture is a ring of references, and one is drawn whenever a trial ends
        return found

    def _drawn(self, trial: TuneTrial) -> dict[str, Any]:
        return decoded(self._space, trial.config["drawn"])

    def _row(self, trial: TuneTrial) -> Row:
        said = trial.last_result or {}
        values = {name: _finite(said.get(name)) for name in ("fitness", "mean_return", "evaluation")}
        return Row(
            _number(trial), self._status(trial, said), int(said.get("env_steps") or 0), self._drawn(trial), **values,
            parts=said.get("parts") or {}, run=str(said.get("run") or ""),
        )  # fmt: skip

    def _status(self, trial: TuneTrial, said: dict[str, Any]) -> Status:
        number = _number(trial)
        if number in self._ended:
            if trial.status == "ERROR":
                return "failed"
            return "finished" if said.get("done") and "parts" in said else "stopped early"
        if trial.status == "RUNNING":
            return "running"
        return "waiting" if trial.status in ("PENDING", "PAUSED") else "interrupted"


def _name(trial: TuneTrial) -> str:
    """trial_N, from 0. A trial's id ends with its number, or is random, and then its tag begins with it, from 1."""
    _, counted, number = trial.trial_id.rpartition("_")
    return f"trial_{int(number) if counted else int(trial.experiment_tag.partition('_')[0]) - 1}"


def _number(trial: TuneTrial) -> int:
    return int(str(trial).rpartition("_")[2])


def _failure(trial: TuneTrial) -> str:
    """The traceback of a trial that died, without Ray's own lines."""
    path = trial.error_file
    text = Path(path).read_text(errors="replace") if path and Path(path).exists() else "it left no traceback"
    text = re.sub(r"\x1b\[\d+m", "", text)
    text = text.rpartition("longrein.errors.RunError: ")[2]
    return re.sub(r"ray::Trial\.\w+\(\) \(pid=.*\)", "Traceback (most recent call last):", text).strip() + "\n"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short(drawn: Mapping[str, Any]) -> str:
    """What was drawn, in a few words."""
    last = {key: key.rpartition(".")[2] for key in drawn}
    return ", ".join(f"{last[key]} {value:.4g}" if isinstance(value, float) else f"{last[key]} {value}"
                     for key, value in drawn.items())  # fmt: skip
