"""The contract of an algorithm, and the table of them. An algorithm's module is imported when it is asked for.

A module of the table holds `Config`, a frozen dataclass with one documented default a field, and
`build(config, observation_space, action_space, seed) -> Algorithm`, where the spaces are those of one environment.
It may also say `TOLERATES_LAG = True`, where a batch may have been acted out by older weights, and
`SHARES_WEIGHTS = True`, where its Algorithm is a SharingWorker: `worker()` gives another one over the same weights.
Other packages add algorithms by entry points of the group `longrein.algorithms`: a name, and such a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from longrein.errors import SpecError
from longrein.learn.batch import Batch
from longrein.learn.schedules import Shape, shape_from

TABLE: Mapping[str, str] = {
    "random": "longrein.learn.algorithms.random",
    "reinforce": "longrein.learn.algorithms.reinforce",
    "a2c": "longrein.learn.algorithms.a2c",
    "a3c": "longrein.learn.algorithms.a3c",
    "ppo": "longrein.learn.algorithms.ppo",
    "appo": "longrein.learn.algorithms.appo",
    "sarsa": "longrein.learn.algorithms.sarsa",
    "dqn": "longrein.learn.algorithms.dqn",
    "pqn": "longrein.learn.algorithms.pqn",
    "async_q": "longrein.learn.algorithms.async_q",
    "acktr": "longrein.learn.algorithms.acktr",
    "sac": "longrein.learn.algorithms.sac",
    "td3": "longrein.learn.algorithms.td3",
    "crossq": "longrein.learn.algorithms.crossq",
    "impala": "longrein.learn.algorithms.impala",
    "acer": "longrein.learn.algorithms.acer",
}


class Policy(Protocol):
    """Maps observations to actions, B rows at a time."""

    def encode(self, observation: Any) -> NDArray[np.generic]:
        """Observations as a vector environment gives them -> [B, ...] as `act` and a Batch take them."""

    def act(
        self, observation: NDArray[np.generic], deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """Encoded observations [B, ...] -> actions to store [B, ...], and extras [B, ...] that the update needs."""

    def for_env(self, action: NDArray[np.generic]) -> NDArray[np.generic]:
        """Stored actions -> what the vector environment takes: shaped, clipped to its bounds."""


@runtime_checkable
class RecurrentPolicy(Policy, Protocol):
    """A policy that may remember: whoever acts with it keeps a row of state for each environment.

    The row is set to zeros after a step that ended the environment's episode, and after one that was not valid; the
    learner does the same inside a rollout, from `done` and `valid` alone.
    """

    def initial_state(self, num_envs: int) -> NDArray[np.float32] | None:
        """The state [B, S] in which B episodes begin: zeros. None: as it is configured, the policy is not recurrent."""

    def act(
        self,
        observation: NDArray[np.generic],
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """As Policy.act; state [B, S], zeros where it is left out.

        Extras hold `state`, as it was before acting, and `next_state`, which is no transition's business: the actor
        takes it out and hands it to the next step.
        """


def initial_state(policy: Policy, num_envs: int) -> NDArray[np.float32] | None:
    """The state in which `policy` begins B episodes; None for a policy that is not recurrent."""
    return policy.initial_state(num_envs) if isinstance(policy, RecurrentPolicy) else None


class Algorithm(Protocol):
    """A policy and its update rule."""

    @property
    def policy(self) -> Policy:
        """The policy as it is now; the same object for life, changed by `update`."""

    @property
    def rollout_steps(self) -> int:
        """Vector steps of one batch."""

    def update(self, batch: Batch) -> dict[str, float]:
        """Learn from a time-major batch; what was measured, the same names each time.

        Raises ValueError when no row is valid.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future, as tensors and plain values: weights, optimizer, counters, generators."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


Build = Callable[[Any, "gymnasium.Space[Any]", "gymnasium.Space[Any]", int], Algorithm]


@dataclass(frozen=True)
class Abilities:
    """What an algorithm can do when it runs in several processes."""

    tolerates_lag: bool
    """Whether it may learn from what older weights acted out."""
    shares_weights: bool
    """Whether several workers of it can write to the same weights."""


def load(name: str) -> tuple[type[Any], Build]:
    """An algorithm's Config and its `build`, by name. Raises SpecError for a name that nobody registered."""
    module = _module(name)
    return module.Config, module.build


def abilities(name: str) -> Abilities:
    """What an algorithm's module says of it. Raises SpecError for a name that nobody registered."""
    module = _module(name)
    return Abilities(getattr(module, "TOLERATES_LAG", False), getattr(module, "SHARES_WEIGHTS", False))


def module_name(name: str) -> str:
    """Where an algorithm's module is. Raises SpecError for a name that nobody registered."""
    return TABLE[name] if name in TABLE else str(_module(name).__name__)


def _module(name: str) -> Any:
    if name in TABLE:
        return import_module(TABLE[name])
    found = entry_points(group="longrein.algorithms", name=name)
    if not found:
        near = get_close_matches(name, TABLE, n=1)
        known = f"did you mean {near[0]!r}?" if near else "one of " + ", ".join(TABLE)
        raise SpecError("agent.algorithm.name", f"there is no algorithm {name!r}", hint=known)
    return next(iter(found)).load()


def config_from(config_class: type[Any], settings: Mapping[str, Any], base: Any = None) -> Any:
    """A Config from plain values, as a spec file or a checkpoint has them; fields left out keep their default.

    A section (`net`, `memory`) is a mapping of its own, and what is left out there is as in the Config's default.
    base: in place of the class's defaults.

    A schedule is a number, {"linear": [start, end, steps]} or {"start": ..., "end": ..., "steps": ...}, and so for
    the other shapes of longrein.learn.schedules.
    Raises SpecError for an unknown key.
    """
    known = [field.name for field in fields(config_class)]
    values = {}
    for key, value in settings.items():
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "one of " + ", ".join(known)
            raise SpecError(f"agent.algorithm.{key}", "there is no such setting", hint=hint)
        default = next(field for field in fields(config_class) if field.name == key).default
        nested = isinstance(value, Mapping) and is_dataclass(default) and not isinstance(default, Shape)
        values[key] = config_from(type(default), value, default) if nested else _value(value)
    return config_class(**values) if base is None else replace(base, **values)


def _value(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    shape = shape_from(value)
    return value if shape is None else shape
