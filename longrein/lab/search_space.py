"""The `search` block of a spec: which settings are drawn from what, and how. Knows no way of drawing, and no Ray.

search:
  agent.algorithm.lr: {loguniform: [1.0e-5, 1.0e-2]}     # a dotted key of the spec, and its distribution
  agent.net.hidden: {choice: [[32], [64, 64]]}
  method: {name: optuna, metric: area_under_curve}       # how to search; may be left out
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

from longrein.errors import SpecError

Mistake = Callable[[str, str, str], SpecError]
"""Makes the error of a mistake: dotted key, problem, hint."""
Try = Callable[[Mapping[str, Any]], object]
"""Resolves the spec with some values replaced; raises SpecError where they do not fit."""

ARGUMENTS = {
    "grid": (),
    "choice": (),
    "uniform": ("low", "high"),
    "quniform": ("low", "high", "step"),
    "loguniform": ("low", "high"),
    "qloguniform": ("low", "high", "step"),
    "normal": ("mean", "deviation"),
    "randint": ("low", "high"),
}
"""Distributions, and the numbers that each takes; grid and choice take a list of values."""

METHODS = ("random", "grid", "optuna", "asha", "pbt")

METRICS = (
    "area_under_curve",
    "final_return",
    "best_return",
    *(f"slm2018.{part}" for part in ("fitness", "strength", "speed", "stability", "consistency")),
    *(
        f"slm5.{part}"
        for part in ("strength", "max_strength", "final_strength", "sample_efficiency", "training_efficiency",
                     "stability", "consistency")
    ),
)  # fmt: skip
"""What a search may maximise: the numbers of a trial's fitness."""


@dataclass(frozen=True)
class Drawn:
    """What one setting is drawn from."""

    kind: str
    """Its name in ARGUMENTS."""
    values: tuple[Any, ...]
    """Of grid and choice the values, of all others the numbers."""

    @property
    def listed(self) -> bool:
        """Whether it is one of some values."""
        return self.kind in ("grid", "choice")

    @property
    def log(self) -> bool:
        """Whether it is drawn by its logarithm."""
        return self.kind in ("loguniform", "qloguniform")

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Values that it may have, the outermost among them: where these fit, all do."""
        if self.listed:
            return self.values
        if self.kind == "normal":
            return (self.values[0],)
        low, high = self.values[:2]
        if self.kind == "randint":
            return (low, high - 1)
        if len(self.values) == 3:
            return (low, high)
        return (low, high, low + 0.381966 * (high - low))  # one between, that a whole number would not be

    @property
    def plain(self) -> dict[str, list[Any]]:
        """As a file says it."""
        return {self.kind: list(self.values)}


@dataclass(frozen=True)
class Method:
    """How to search."""

    name: str = "random"
    """random, grid, optuna (TPE), asha (stops the worse half early) or pbt (the worse copy the better)."""
    metric: str = "area_under_curve"
    """Which number of a trial's fitness to maximise."""
    cpus: float = 1.0
    """Processors of each trial; so many of its sessions run at once."""
    gpus: float = 0.0
    """GPUs of each trial."""
    at_once: int = 0
    """Most trials at once; 0: as many as the processors allow."""
    sampler: str = "random"
    """Which way asha draws: random or optuna."""
    grace: int = 0
    """Env steps of a session before asha stops a trial; 0: a tenth of meta.env_steps."""
    reduction: int = 3
    """Of so many trials asha lets one go on, at each level."""
    perturb_every: int = 0
    """Env steps of a session between pbt's exchanges; 0: a tenth of meta.env_steps."""
    reports: int = 40
    """How often a trial says how far it is, over its env steps."""


@dataclass(frozen=True)
class Space:
    """A search block, checked."""

    drawn: Mapping[str, Drawn]
    """By dotted key of the spec."""
    method: Method

    @property
    def grid_points(self) -> int:
        """Combinations of the values of all grids."""
        points = 1
        for drawn in self.drawn.values():
            points *= len(drawn.values) if drawn.kind == "grid" else 1
        return points

    @property
    def only_grids(self) -> bool:
        """Whether nothing is drawn at random."""
        return all(drawn.kind == "grid" for drawn in self.drawn.values())

    def samples(self, max_trial: int) -> int:
        """How often each combination of the grids is tried, so that there are at most max_trial trials."""
        return 1 if self.only_grids else max(1, max_trial // self.grid_points)

    def trials(self, max_trial: int) -> int:
        """How many trials there will be."""
        return self.samples(max_trial) * self.grid_points


def space_of(block: Mapping[str, Any], plain: Mapping[str, Any], mistake: Mistake, attempt: Try) -> Space:
    """A search block checked: every key against the spec, every distribution, and that its values fit their keys.

    plain: the spec with every default. Raises SpecError.
    """
    method = _method(block.get("method"), plain, mistake)
    drawn: dict[str, Drawn] = {}
    for key, value in block.items():
        if key == "method":
            continue
        _is_key(key, plain, mistake)
        drawn[key] = _drawn(f"search.{key}", value, mistake)
    if not drawn:
        raise mistake("search", "draws nothing", "agent.algorithm.lr: {loguniform: [1.0e-5, 1.0e-2]}")
    space = Space(drawn, method)
    _fits(space, int(plain["meta"]["max_trial"]), mistake)
    for key, one in drawn.items():
        for extreme in one.extremes:
            try:
                attempt({key: extreme})
            except SpecError as error:
                problem = f"{extreme!r} does not fit: {error.key}: {error.problem}"
                raise mistake(f"search.{key}", problem, error.hint) from None
    return space


def _drawn(at: str, value: Any, mistake: Mistake) -> Drawn:
    example = "as in {loguniform: [1.0e-5, 1.0e-2]} or {choice: [32, 64]}"
    if not isinstance(value, Mapping):
        raise mistake(at, f"is {value!r}, no distribution", example)
    if len(value) != 1:
        raise mistake(at, f"has {len(value)} distributions", f"one, {example}")
    ((kind, given),) = value.items()
    if kind not in ARGUMENTS:
        raise mistake(f"{at}.{kind}", "there is no such distribution", _nearest(str(kind), ARGUMENTS))
    names = ARGUMENTS[kind]
    if not names:
        return Drawn(kind, _values(at, kind, given, mistake))
    if isinstance(given, Mapping):
        for name in given:
            if name not in names:
                raise mistake(f"{at}.{kind}.{name}", "there is no such argument", _nearest(str(name), names))
        given = [given[name] for name in names if name in given]
    says = f"{kind}: [{', '.join(names)}]"
    if not isinstance(given, list | tuple) or len(given) != len(names):
        got = f"{len(given)} numbers" if isinstance(given, list | tuple) else repr(given)
        raise mistake(f"{at}.{kind}", f"takes {len(names)} numbers, got {got}", says)
    for number in given:
        if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
            raise mistake(f"{at}.{kind}", f"{number!r} is no number", says)
    _in_order(f"{at}.{kind}", kind, tuple(given), mistake)
    return Drawn(kind, tuple(given))


def _in_order(at: str, kind: str, numbers: tuple[float, ...], mistake: Mistake) -> None:
    if kind == "normal":
        if numbers[1] <= 0:
            raise mistake(at, f"its deviation must be above 0, got {numbers[1]}", "normal: [mean, deviation]")
        return
    low, high = numbers[:2]
    if kind == "randint" and not all(isinstance(number, int) for number in numbers):
        raise mistake(at, f"takes whole numbers, got {list(numbers)}", "randint: [0, 10], the last one left out")
    if low >= high:
        raise mistake(at, f"{low} is not below {high}", f"{kind}: [{', '.join(ARGUMENTS[kind])}]")
    if kind in ("loguniform", "qloguniform") and low <= 0:
        raise mistake(at, f"has no logarithm at {low}", "its low must be above 0")
    if len(numbers) == 3:
        if numbers[2] <= 0:
            raise mistake(at, f"its step must be above 0, got {numbers[2]}", "")
        if numbers[2] > high - low:
            raise mistake(at, f"its step {numbers[2]} is wider than {low} to {high}", "a smaller step")


def _values(at: str, kind: str, given: Any, mistake: Mistake) -> tuple[Any, ...]:
    if not isinstance(given, list | tuple):
        raise mistake(f"{at}.{kind}", f"takes a list of values, got {given!r}", f"{kind}: [32, 64]")
    if not given:
        raise mistake(f"{at}.{kind}", "is an empty list", f"{kind}: [32, 64]")
    texts = [encoded(value) for value in given]
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise mistake(f"{at}.{kind}", f"has {given[index]!r} twice", "leave one out")
    return tuple(given)


def _is_key(key: Any, plain: Mapping[str, Any], mistake: Mistake) -> None:
    """Follow a dotted key down the spec. Raises SpecError where it leads nowhere, or to a whole section."""
    at = f"search.{key}"
    if not isinstance(key, str) or "." not in key:
        names = ("method", *(name for name in plain if name != "search"))
        hint = f"write {key}.KEY: ..." if key in plain else _nearest(str(key), names)
        raise mistake(at, "is no dotted key of the spec", hint)
    here: Any = {name: part for name, part in plain.items() if name != "search"}
    for part in key.split("."):
        if here is _ANYTHING:
            break
        if isinstance(here, Mapping):
            below = [str(name) for name in here]
        else:
            below = [str(index) for index in range(len(here))] if isinstance(here, list) else []
        if part not in below:
            known = _nearest(part, below) if below else f"{key.rpartition('.')[0]} has no keys below it"
            raise mistake(at, f"the spec has no key {part!r} there", known)
        here = here[int(part)] if isinstance(here, list) else here[part]
        here = _ANYTHING if part == "options" else here
    if key in ("meta.max_trial", "meta.max_session", "meta.env_steps") or key.endswith(".algorithm.name"):
        raise mistake(at, "cannot be searched", "trials are compared over the same env steps of the same algorithm")


_ANYTHING = object()  # below env.options: which there are, their maker knows


def _method(given: Any, plain: Mapping[str, Any], mistake: Mistake) -> Method:
    if given is None:
        return Method()
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise mistake("search.method", f"is {given!r}, not a mapping", "method: {name: optuna}")
    known = {one.name: one for one in fields(Method)}
    for name, value in given.items():
        at = f"search.method.{name}"
        if name not in known:
            raise mistake(at, "there is no such key", _nearest(str(name), known))
        for field_name, names in (("name", METHODS), ("metric", METRICS), ("sampler", ("random", "optuna"))):
            if name == field_name and value not in names:
                raise mistake(at, f"is {value!r}", _nearest(str(value), names))
        if name in ("name", "metric", "sampler"):
            continue
        whole = name not in ("cpus", "gpus")
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise mistake(at, f"is {value!r}", f"it takes a {'whole ' if whole else ''}number")
        least = {"cpus": 0.01, "reduction": 2, "reports": 1}.get(name, 0)
        if value < least:
            raise mistake(at, f"must be at least {least}, got {value}", "")
        if name in ("grace", "perturb_every") and value > plain["meta"]["env_steps"]:
            raise mistake(at, f"{value} is beyond meta.env_steps, {plain['meta']['env_steps']}", "fewer env steps")
    method = Method(**given)
    for name, owner in (("sampler", "asha"), ("grace", "asha"), ("reduction", "asha"), ("perturb_every", "pbt")):
        if name in given and method.name != owner:
            raise mistake(f"search.method.{name}", f"is of {owner}, and the method is {method.name}", f"name: {owner}")
    return method


def _fits(space: Space, max_trial: int, mistake: Mistake) -> None:
    """Whether the method can draw what is to be drawn."""
    method = space.method
    by_optuna = method.name == "optuna" or (method.name == "asha" and method.sampler == "optuna")
    for key, drawn in space.drawn.items():
        if method.name == "grid" and drawn.kind != "grid":
            raise mistake(f"search.{key}", f"grid cannot try all of {drawn.kind}", "grid: [...], or another method")
        if by_optuna and drawn.kind in ("grid", "normal"):
            instead = "choice: [...]" if drawn.kind == "grid" else "uniform: [...]"
            raise mistake(f"search.{key}", f"optuna does not draw from {drawn.kind}", f"{instead}, or method: random")
        if method.name == "pbt" and drawn.kind == "grid":
            raise mistake(f"search.{key}", "pbt draws anew, and a grid is tried once", "choice: [...]")
        if method.name == "pbt" and not key.startswith("agent.algorithm."):
            hint = "settings of one agent's algorithm; for others method: random"
            raise mistake(f"search.{key}", "cannot change while a trial goes on, as pbt would have it", hint)
    if space.grid_points > max_trial:
        says = f"its grids have {space.grid_points} points, and meta.max_trial is {max_trial}"
        raise mistake("search", says, f"max_trial: {space.grid_points}")
    if method.name == "pbt" and max_trial < 2:
        raise mistake("search.method.name", "pbt needs a population", "meta.max_trial: 4, or more")


def encoded(value: Any) -> str:
    """A value of a list as text, which every searcher takes as a category."""
    return json.dumps(value, sort_keys=True, default=str)


def decoded(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a searcher drew, as plain values of the spec."""
    values: dict[str, Any] = {}
    for key, drawn in space.drawn.items():
        value = config[key]
        if drawn.listed:
            values[key] = json.loads(value)
            continue
        value = float(value)
        if len(drawn.values) == 3:  # rounded here too: Optuna leaves the steps of a logarithmic range out
            low, high, step = drawn.values
            value = min(max(round(value / step) * step, low), high)
            value = round(value, 12)  # 3 * 0.1 is not 0.3
        whole = all(isinstance(number, int) for number in drawn.values)
        values[key] = int(value) if whole and drawn.kind in ("randint", "quniform", "qloguniform") else value
    return values


def clipped(space: Space, config: Mapping[str, Any]) -> dict[str, Any]:
    """What pbt made of drawn values, each within its range again."""
    values = dict(config)
    for key, drawn in space.drawn.items():
        if not drawn.listed and drawn.kind != "normal":
            low, high = drawn.values[:2]
            values[key] = min(max(values[key], low), high - 1 if drawn.kind == "randint" else high)
    return values


def _nearest(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    near = get_close_matches(name, list(names), n=1)
    return f"did you mean {near[0]!r}?" if near else "one of " + ", ".join(names)
