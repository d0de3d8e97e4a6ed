"""Values that change as training goes on: pure functions of environment steps, so that a resumed run follows on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linear:
    """A straight line from `start`, at env step 0, to `end`, at env step `steps`; constant from there on."""

    start: float
    """Value at env step 0."""
    end: float
    """Value from env step `steps` on."""
    steps: int
    """Env steps, over all environments together, that the way takes."""


Schedule = float | Linear


def value_at(schedule: Schedule, env_steps: int) -> float:
    """What a schedule says after `env_steps` environment steps, over all environments together."""
    if not isinstance(schedule, Linear):
        return schedule
    share = min(env_steps / schedule.steps, 1.0) if schedule.steps > 0 else 1.0
    return schedule.start + share * (schedule.end - schedule.start)
