"""An environment with everybody who acts in it, stepped as one. Knows vector environments and games, no learner.

At a cut the episodes that are under way end, and the environments begin again with a seed that the caller names: what
follows is then the same in a run that went on, and in one that was taken up from a checkpoint.
Environments that can save their state are not cut. They offer a pair of methods, on the vector environment itself or on
each environment of a Gymnasium SyncVectorEnv:
    save_state() -> tensors and plain values; all that decides what comes next, random generators included
    load_state(state) -> None; called after a reset
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import gymnasium
import torch
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from longrein.lab.actor import Actor
from longrein.lab.games import Games, Table
from longrein.lab.station import Scene
from longrein.learn.batch import Transition


class Arena(Scene, Protocol):
    """What a session steps itself."""

    @property
    def actors(self) -> Sequence[Actor]:
        """Who acts here."""

    @property
    def saves(self) -> bool:
        """Whether the environments can save their state, so that they need no cut."""

    def collect(self, steps: int, cut: int | None) -> Iterator[Sequence[Transition]]:
        """The next vector steps, a transition of each actor; after the last a cut with that seed, if one is given."""

    def close(self) -> None:
        """Close the environments."""


class Alone:
    """One actor in a vector environment."""

    def __init__(self, envs: VectorEnv[Any, Any, Any], actor: Actor) -> None:
        self.envs = envs
        self.actor = actor
        self.actors: Sequence[Actor] = (actor,)
        self.saves = can_save(envs)

    @property
    def env_steps(self) -> int:
        """Valid rows so far."""
        return self.actor.env_steps

    @property
    def copies(self) -> int:
        """Rows of the vector environment."""
        return self.envs.num_envs

    def begin(self, seed: int) -> None:
        """Reset the environments, copy k with seed + k."""
        self.actor.begin(self.envs.reset(seed=seed)[0])

    def collect(self, steps: int, cut: int | None) -> Iterator[Sequence[Transition]]:
        """The next vector steps; after the last one a cut with that seed, if one is given."""
        step = self.actor.step
        for _ in range(steps - 1):
            yield (step(),)
        yield (step(cut is not None),)
        if cut is not None:
            self.begin(cut)

    def save_state(self) -> Any:
        """The environments' state, or None."""
        return save_state(self.envs) if self.saves else None

    def reset_to(self, state: Any) -> None:
        """Put a saved state back; the actor goes on from what it holds."""
        self.envs.reset(seed=0)  # as an environment must be before anything else; the state says what counts
        load_state(self.envs, state)

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()


class Together:
    """Several actors at the tables of a game."""

    saves = False

    def __init__(self, games: Games, tables: Sequence[Table], actors: Sequence[Actor]) -> None:
        self.games = games
        self.tables = tuple(tables)
        self.actors: Sequence[Actor] = tuple(actors)

    @property
    def env_steps(self) -> int:
        """Steps of one game so far, over all copies together."""
        return self.actors[0].env_steps

    @property
    def copies(self) -> int:
        """Copies of the game."""
        return len(self.games.copies)

    def begin(self, seed: int) -> None:
        """Begin all copies, copy k with seed + k."""
        for actor, observation in zip(self.actors, self.games.reset(self.tables, seed), strict=True):
            actor.begin(observation)

    def collect(self, steps: int, cut: int | None) -> Iterator[Sequence[Transition]]:
        """The next vector steps; after the last one a cut with that seed, if one is given."""
        for left in range(steps - 1, -1, -1):
            came = self.games.step(self.tables, [actor.choose() for actor in self.actors])
            ends = cut is not None and left == 0
            yield [actor.take(*one, played=self.copies, cut=ends) for actor, one in zip(self.actors, came, strict=True)]
        if cut is not None:
            self.begin(cut)

    def save_state(self) -> Any:
        """None: games are cut."""
        return None

    def reset_to(self, state: Any) -> None:
        """There is no such state."""
        raise AssertionError("games save no state")

    def close(self) -> None:
        """Close all copies."""
        self.games.close()


# --------------------------------------------------------------------------------------------------- saved environments

_KNOWN = (TimeLimit, OrderEnforcing, PassiveEnvChecker)
"""Wrappers whose own state is a count of steps, or nothing. Any other may hold what we do not know of."""


def can_save(envs: VectorEnv[Any, Any, Any]) -> bool:
    """Whether these environments can save all of their state."""
    if _has_pair(envs):
        return True
    return type(envs) is SyncVectorEnv and all(_owner(env) is not None for env in envs.envs)


def save_state(envs: VectorEnv[Any, Any, Any]) -> Any:
    """The state of environments that can save it: tensors and plain values."""
    if _has_pair(envs):
        return envs.save_state()  # type: ignore[attr-defined]  # _has_pair
    assert isinstance(envs, SyncVectorEnv)
    return {
        "envs": [_owner(env).save_state() for env in envs.envs],
        "limits": [[limit._elapsed_steps for limit in _limits(env)] for env in envs.envs],
        "over": torch.from_numpy(envs._autoreset_envs.copy()),
    }


def load_state(envs: VectorEnv[Any, Any, Any], state: Any) -> None:
    """Put a saved state into environments of the same kind, after their reset."""
    if _has_pair(envs):
        envs.load_state(state)  # type: ignore[attr-defined]  # _has_pair
        return
    assert isinstance(envs, SyncVectorEnv)
    for env, own, elapsed in zip(envs.envs, state["envs"], state["limits"], strict=True):
        _owner(env).load_state(own)
        for limit, steps in zip(_limits(env), elapsed, strict=True):
            limit._elapsed_steps = steps
    envs._autoreset_envs = state["over"].numpy().copy()


def _has_pair(thing: Any) -> bool:
    return callable(getattr(thing, "save_state", None)) and callable(getattr(thing, "load_state", None))


def _owner(env: gymnasium.Env[Any, Any]) -> Any:
    """What saves the state of an environment: below wrappers that are known; None where nothing does."""
    while not (_has_pair(env)):
        if not isinstance(env, _KNOWN):
            return None
        env = env.env
    return env


def _limits(env: gymnasium.Env[Any, Any]) -> list[TimeLimit[Any, Any]]:
    found, owner = [], _owner(env)
    while env is not owner:
        if isinstance(env, TimeLimit):
            found.append(env)
        assert isinstance(env, gymnasium.Wrapper)
        env = env.env
    return found
