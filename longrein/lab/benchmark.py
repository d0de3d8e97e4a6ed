"""The mode `benchmark`: some specs, in some environments, from some seeds; what is there already is not run again.

Knows the form of a benchmark's file and when to run what; benchmark_results knows what came of it. A file of specs may
hold benchmarks beside them:

    cartpole:
      benchmark:
        specs: [{file: ../ppo.yaml, name: ppo_cartpole}, {file: ../dqn.yaml}]
        envs: [CartPole-v1, {url: ws://host:5000/CartPole-v1, num_envs: 8}]
        seeds: 4
        env_steps: 200000
        set: {meta.eval.episodes: 50}
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from longrein.errors import Error, RunError, SpecError
from longrein.lab import baseline, benchmark_results, records, report
from longrein.lab import spec as specs
from longrein.lab.benchmark_results import Entry
from longrein.lab.experiment import open_envs, run_trial
from longrein.lab.processes import refuse_running
from longrein.lab.session import Progress
from longrein.lab.spec import Source, Spec

KEYS = ("specs", "envs", "seeds", "env_steps", "set")
DONE = ("solved", "budget spent")
"""How a session ends that counts; an interrupted one begins again."""
Told = Callable[[str, Progress], None]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark asks for, resolved."""

    name: str
    specs: tuple[tuple[Entry, Spec], ...]
    """Every spec in every environment; the Spec has the benchmark's env steps, and no target that ends it early."""
    seeds: tuple[int, ...]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of what was asked for."""
        text = json.dumps([[entry.fingerprint for entry, _ in self.specs], self.seeds])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What came of running a benchmark."""

    folder: Path
    missing: int
    """Sessions without a result, failures among them."""
    failed: int


def is_benchmark(source: Source) -> bool:
    """Whether an entry of a file of specs is a benchmark."""
    return "benchmark" in source.values


def load(path: Path, name: str | None = None, overrides: Mapping[str, Any] | None = None) -> Benchmark:
    """A benchmark of a file, or a benchmark of one spec of it, with as many seeds as the spec has sessions.

    overrides: by dotted key, for every spec. Raises SpecError.
    """
    sources = specs.read(path)
    if name is None and len(sources) == 1:
        name = next(iter(sources))
    if name is None or name not in sources:
        problem = f"{path} has no spec {name!r}" if name is not None else f"{path} has {len(sources)} specs: name one"
        raise SpecError("name", problem, hint=specs.nearest(name or "", sources))
    source = sources[name]
    if not is_benchmark(source):
        spec = specs.load(path, name, overrides)
        first = spec.meta.seed
        return of_specs(name, [(name, spec)], tuple(range(first, first + spec.meta.max_session)))
    return _resolve(path, source, overrides or {})


def of_specs(name: str, pairs: list[tuple[str, Spec]], seeds: tuple[int, ...]) -> Benchmark:
    """A benchmark of specs by their labels, each in its own environments. Raises SpecError for two that are alike."""
    found: list[tuple[Entry, Spec]] = []
    for label, spec in pairs:
        whole = _without_seeds(spec)
        env = " + ".join(records.env_label(asdict(one)) for one in spec.envs)
        entry = Entry(label, env, whole.fingerprint, spec.meta.env_steps, spec.meta.target, spec.meta.window,
                      whole.plain)  # fmt: skip
        if any((other.spec, other.env) == (label, env) for other, _ in found):
            raise SpecError("benchmark.specs", f"{label} in {env} is there twice", hint="give it once")
        found.append((entry, whole))
    return Benchmark(name, tuple(found), seeds)


def _without_seeds(spec: Spec) -> Spec:
    """An entry's spec. Its seeds and how many sessions it has are the benchmark's affair: with more it is the same."""
    meta = replace(spec.meta, seed=0, max_session=1, max_trial=1, target=None)
    return replace(spec, meta=meta, search={})


def _fingerprint(name: str, plain: Mapping[str, Any]) -> str:
    """Today's fingerprint of an entry, by a spec as a folder keeps it. Raises SpecError where it is a spec no more."""
    return _without_seeds(specs.from_plain(name, plain)).fingerprint


def _resolve(path: Path, source: Source, overrides: Mapping[str, Any]) -> Benchmark:
    _known(source, "", source.values, ("benchmark",))
    body = source.values["benchmark"]
    if not isinstance(body, Mapping):
        raise source.error("benchmark", "is not a mapping", hint="benchmark: {specs: [...], seeds: 4}")
    _known(source, "benchmark", body, KEYS)
    named, envs = body.get("specs"), body.get("envs", [None])
    for key, value in (("specs", named), ("envs", envs)):
        if not isinstance(value, list) or not value:
            raise source.error(f"benchmark.{key}", "is no list of at least one", hint="specs: [{file: ../ppo.yaml}]")
    changes = body.get("set", {})
    if not isinstance(changes, Mapping):
        raise source.error("benchmark.set", "is not a mapping", hint="set: {meta.eval.episodes: 50}")
    changes = {**changes, **({"meta.env_steps": body["env_steps"]} if "env_steps" in body else {}), **overrides}
    pairs = []
    for index, one in enumerate(named or ()):
        file, name = _named(source, f"benchmark.specs.{index}", one)
        for place, env in enumerate(envs):
            spec = specs.load(path.parent / file, name, changes)
            if env is not None:
                if len(spec.envs) > 1:
                    raise source.error("benchmark.envs", f"{spec.name} has several environments of its own",
                                       hint="leave envs out, and each spec runs in its own")  # fmt: skip
                own = {"meta.target": None}  # what solves one environment says nothing of another
                there = _env(source, f"benchmark.envs.{place}", env)
                if there.get("env.id") == spec.envs[0].id != "":
                    own, there["env.options"] = {}, dict(spec.envs[0].options) | there["env.options"]
                spec = specs.load(path.parent / file, name, {**own, **changes, **there})
            pairs.append((spec.name, spec))
    return of_specs(source.name, pairs, _seeds(source, body.get("seeds", 4)))


def _named(source: Source, key: str, one: Any) -> tuple[str, str | None]:
    """The file and the name of one of a benchmark's specs."""
    if isinstance(one, str):
        return one, None
    if not isinstance(one, Mapping) or not isinstance(one.get("file"), str):
        raise source.error(key, "names no file", hint="{file: ../ppo.yaml, name: ppo_cartpole}")
    _known(source, key, one, ("file", "name"))
    return one["file"], one.get("name")


def _env(source: Source, key: str, env: Any) -> dict[str, Any]:
    """What one of a benchmark's environments changes in a spec."""
    if env is None:
        return {}
    if isinstance(env, str):
        env = {"url": env} if "://" in env else {"id": env}
    if not isinstance(env, Mapping):
        raise source.error(key, "is neither an environment's id nor a mapping", hint="CartPole-v1, or {url: ws://...}")
    return {"env.id": "", "env.url": "", "env.options": {}, **{f"env.{name}": value for name, value in env.items()}}


def _known(source: Source, key: str, value: Mapping[str, Any], names: tuple[str, ...]) -> None:
    for name in value:
        if name not in names:
            raise source.error(f"{key}.{name}" if key else name, "there is no such key", specs.nearest(name, names))


def _seeds(source: Source, value: Any) -> tuple[int, ...]:
    seeds = range(value) if isinstance(value, int) and not isinstance(value, bool) else value
    right = isinstance(seeds, (list, range)) and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not right or not len(seeds) or len(set(seeds)) < len(seeds):
        raise source.error("benchmark.seeds", f"is {value!r}", hint="how many, or a list of different ones: [0, 1, 2]")
    return tuple(seeds)


# ------------------------------------------------------------------------------------------------------------- running


def run(benchmark: Benchmark, data: Path, *, processes: int | None = None, on_progress: Told | None = None) -> Outcome:
    """Run every session that has no result yet, and write tables, pictures and page into data/{name}_benchmark.

    Stopped at any moment and started again, it goes on: a session's result is kept as soon as its trial has ended, and
    sessions that ended in a trial that was killed are found in its folder. One that died is run again next time.
    on_progress: called with an entry's label and how far one of its sessions is. Raises SpecError; RunError,
    also when another process runs this benchmark into the same folder.
    """
    folder = data / f"{benchmark_results.slug(benchmark.name)}_benchmark"
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be made: {error}", hint="give another folder for run data") from error
    refuse_running(folder)
    records.record_process(folder)
    _adopt(folder, benchmark)
    records.write_json(folder / "benchmark.json", {
        "name": benchmark.name, "fingerprint": benchmark.fingerprint, "seeds": benchmark.seeds,
        "entries": [vars(entry) for entry, _ in benchmark.specs],
    })  # fmt: skip
    for entry, spec in benchmark.specs:
        _harvest(folder, entry)
        _measure_baseline(folder, entry, spec)
        for seeds in _in_a_row(_missing(folder, entry, benchmark.seeds), processes or os.cpu_count() or 1):
            part = replace(spec, meta=replace(spec.meta, seed=seeds[0], max_session=len(seeds)))
            tell = None if on_progress is None else partial(_tell, on_progress, entry.label)
            trial = run_trial(part, folder / "runs", processes=processes, on_progress=tell)
            _harvest(folder, entry)
            ended = {seed for seed, one in zip(seeds, trial.sessions, strict=True) if one and one.status in DONE}
            if trial.interrupted or ended | set(trial.failures) != set(seeds):
                return _finished(folder, benchmark)  # nothing more is begun
    return _finished(folder, benchmark)


def _tell(on_progress: Told, label: str, seed: int, progress: Progress) -> None:
    on_progress(f"{label}, seed {seed}", progress)


def _finished(folder: Path, benchmark: Benchmark) -> Outcome:
    report.write(folder)
    records.record_end(folder)
    missing = sum(len(_missing(folder, entry, benchmark.seeds)) for entry, _ in benchmark.specs)
    return Outcome(folder, missing, len(benchmark_results.read(folder).failures))


def _adopt(folder: Path, benchmark: Benchmark) -> None:
    """Take over results of the same settings, from before some of them existed: those are at their defaults."""
    for old in records.read_json(folder / "benchmark.json").get("entries", []):
        before = Entry(**old)
        try:
            today = _fingerprint(before.spec, before.plain)
        except SpecError:
            continue  # it has settings that are gone
        for entry, _ in benchmark.specs:
            same = (before.spec, before.env, today) == (entry.spec, entry.env, entry.fingerprint)
            if same and before.fingerprint != today:
                _rename(before.folder(folder), entry.folder(folder), entry.fingerprint)


def _rename(before: Path, after: Path, fingerprint: str) -> None:
    if after.exists() or not before.exists():
        return
    for path in before.glob("seed_*.json"):  # first, so that what is cut off here begins anew
        records.write_text(path, json.dumps(records.read_json(path) | {"fingerprint": fingerprint}) + "\n")
    before.rename(after)


def _missing(folder: Path, entry: Entry, seeds: tuple[int, ...]) -> list[int]:
    place = entry.folder(folder)
    return [seed for seed in seeds if not (place / f"seed_{seed}.json").exists()]


def _in_a_row(seeds: list[int], most: int) -> list[list[int]]:
    """Seeds that follow each other, together, as a trial has them; at most so many, so that little is lost."""
    groups: list[list[int]] = []
    for seed in sorted(seeds):
        if groups and seed == groups[-1][-1] + 1 and len(groups[-1]) < most:
            groups[-1].append(seed)
        else:
            groups.append([seed])
    return groups


def _measure_baseline(folder: Path, entry: Entry, spec: Spec) -> None:
    if len(spec.envs) > 1:
        return
    try:
        baseline.measure_missing(folder, [(entry.env, partial(open_envs, spec.envs[0]))])
    except Error:
        pass  # the sessions will say what is wrong with the environment; only its scores are missed


def _harvest(folder: Path, entry: Entry) -> None:
    """Keep what sessions of this entry have left in run folders, and remove those."""
    place = entry.folder(folder)
    for run in sorted((folder / "runs").glob("*/settings.json")):
        about = records.read_about(run.parent)
        if _fingerprint(about.name, about.spec) != entry.fingerprint:
            continue
        place.mkdir(parents=True, exist_ok=True)
        for session in records.sessions_of(run.parent):
            _keep(session, about, entry, place)
        shutil.rmtree(run.parent)


def _keep(session: Path, about: records.About, entry: Entry, place: Path) -> None:
    seed, result = records.seed_in(session), records.read_result(session)
    failed, said = place / f"seed_{seed}.failed", session / "failure.txt"
    if result.get("status") not in DONE:
        if said.exists():
            records.write_text(failed, said.read_text())
        return
    episodes = records.read_columns(session / "episodes.csv")
    names = ("env_steps", "seconds", "length", "return")
    kept = {
        "spec": entry.spec, "env": entry.env, "seed": seed, "fingerprint": entry.fingerprint,
        "status": result["status"], "env_steps": result["env_steps"], "seconds": result["seconds"],
        "evaluation": result["evaluation"], "started": about.started, "versions": about.versions,
        "machine": about.machine,
        "episodes": {name: _whole(episodes.get(name, [])) for name in names},
    }  # fmt: skip
    records.write_text(place / f"seed_{seed}.json", json.dumps(records.as_plain(kept)) + "\n")
    failed.unlink(missing_ok=True)


def _whole(values: Any) -> list[float]:
    """Numbers, those that are whole as such: half as long a file."""
    return [int(value) if float(value).is_integer() else float(value) for value in values]
