"""Values that change as training goes on: pure functions of environment steps, so that a resumed run follows on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from longrein.errors import SpecError


@dataclass(frozen=True, slots=True)
class Linear:
    """A straight line from `start`, at env step 0, to `end`, at env step `steps`; constant from there on."""

    start: float
    """Value at env step 0."""
    end: float
    """Value from env step `steps` on."""
    steps: int
    """Env steps, over all environments together, that the way takes."""

    def at(self, env_steps: int) -> float:
        """The value after so many env steps."""
        share = min(env_steps / self.steps, 1.0) if self.steps > 0 else 1.0
        return self.start + share * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Exponential:
    """From `start`, at env step 0, towards `end`: half of what is left goes in every `half_life` env steps."""

    start: float
    """Value at env step 0."""
    end: float
    """Value that it comes ever nearer to."""
    half_life: float
    """Env steps, over all environments together, in which the distance to `end` halves."""

    def __post_init__(self) -> None:
        _refuse_no_time(self, "half_life")

    def at(self, env_steps: int) -> float:
        """The value after so many env steps."""
        return self.end + (self.start - self.end) * math.exp2(-env_steps / self.half_life)


@dataclass(frozen=True, slots=True)
class Periodic:
    """A wave from `start` to `end` and back in each `period`, whose height halves in every `half_life` env steps."""

    start: float
    """Value at env step 0, and the most that a crest reaches."""
    end: float
    """Value of every trough."""
    half_life: float
    """Env steps, over all environments together, in which the crests' height over `end` halves."""
    period: float
    """Env steps, over all environments together, from crest to crest."""

    def __post_init__(self) -> None:
        _refuse_no_time(self, "half_life", "period")

    def at(self, env_steps: int) -> float:
        """The value after so many env steps."""
        wave = 0.5 * (1.0 + math.cos(2.0 * math.pi * env_steps / self.period))
        return self.end + (self.start - self.end) * math.exp2(-env_steps / self.half_life) * wave


Shape = Linear | Exponential | Periodic
SHAPES: Mapping[str, type[Shape]] = {"linear": Linear, "exponential": Exponential, "periodic": Periodic}
Schedule = float | Linear | Exponential | Periodic


def shape_from(value: Any) -> Shape | None:
    """A schedule from its plain form, {"linear": [start, end, steps]} or {"start": ...} with all its fields.

    None for anything else, and for a form with a wrong number of numbers or something that is none. Raises SpecError
    where a half-life or a period is not over 0.
    """
    if not isinstance(value, Mapping):
        return None
    for name, shape in SHAPES.items():
        known = [field.name for field in fields(shape)]
        numbers = value.get(name) if value.keys() == {name} else None
        if value.keys() == set(known):
            numbers = [value[one] for one in known]
        if isinstance(numbers, list | tuple) and len(numbers) == len(known) and all(map(_is_number, numbers)):
            return shape(*numbers)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain_shape(shape: Shape) -> dict[str, list[float]]:
    """The plain form of a schedule: {"linear": [start, end, steps]}."""
    name = next(name for name, kind in SHAPES.items() if isinstance(shape, kind))
    return {name: [getattr(shape, field.name) for field in fields(shape)]}


def value_at(schedule: Schedule, env_steps: int) -> float:
    """What a schedule says after `env_steps` environment steps, over all environments together."""
    return schedule if isinstance(schedule, int | float) else schedule.at(env_steps)


def least(schedule: Schedule) -> float:
    """The lowest value that a schedule comes near to."""
    return min(schedule.start, schedule.end) if isinstance(schedule, Shape) else schedule


def refuse_negative(section: str, config: Any) -> None:
    """Raise SpecError, with the section's name, where one of a Config's schedules goes below 0: none has a meaning."""
    for name, hint in get_type_hints(type(config)).items():
        schedule = getattr(config, name) if Linear in get_args(hint) else None
        if schedule is not None and least(schedule) < 0:
            raise SpecError(f"{section}.{name}", f"must never be negative, got {schedule}")


def _refuse_no_time(shape: Shape, *names: str) -> None:
    for name in names:
        if getattr(shape, name) <= 0:
            raise SpecError(name, f"a schedule's {name} must be over 0, got {getattr(shape, name)}")


def gradient_steps_due(env_steps: int, start: int, per_env_step: float, made: int) -> int:
    """Gradient steps to make now: so many for each env step from `start` on, less those made.

    By env steps over all environments together, so that their number, or the length of a batch, changes nothing.
    """
    return max(int((env_steps - start) * per_env_step) - made, 0)
