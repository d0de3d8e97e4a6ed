"""The contract of an adapter: it presents one thing as environments to serve. No wire, no lease, no thread."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Protocol

import gymnasium

Info = dict[str, Any]


@dataclass
class Moment:
    """What one step of the selected environments gave: one entry for each, in the order of the ids.

    observations: a list of elements of the single observation space.
    rewards: numbers, or arrays where the reward is a vector; kept as the environment returned them.
    infos: one dict for each environment.
    """

    observations: list[Any]
    rewards: list[Any]
    terminated: list[bool]
    truncated: list[bool]
    infos: list[Info]


@dataclass
class BatchMoment:
    """The same from a thing that is already a vector environment: arrays `[N, ...]`, and Gymnasium's vector info."""

    observations: Any
    rewards: Any
    terminated: Any
    truncated: Any
    infos: Info


class Adapter(Protocol):
    """`num_envs` copies of one environment, reset and stepped by index, each with no autoreset of its own.

    The host that owns an adapter does the autoreset, checks actions against the space before `step`, and calls from
    one thread at a time.
    """

    kind: str  # "vector"
    num_envs: int
    observation_space: gymnasium.Space[Any]  # of one environment
    action_space: gymnasium.Space[Any]
    reward_shape: tuple[int, ...]
    metadata: dict[str, Any]
    spec: dict[str, Any]  # id, max_episode_steps, reward_threshold, nondeterministic, render_mode

    def reset(
        self, ids: Sequence[int], seeds: Sequence[int | None], options: dict[str, Any] | None
    ) -> tuple[list[Any], list[Info]]:
        """Reset the environments `ids`; observations and infos in that order."""

    def step(self, ids: Sequence[int], actions: Sequence[Any]) -> Moment:
        """Step the environments `ids`."""

    def step_one(self, action: Any) -> tuple[Any, Any, bool, bool, Info]:
        """Step the first environment: the shortest way, for the many that serve one."""

    def render(self, index: int) -> Any:
        """A frame of one environment, as its render() gives it."""

    def attribute(self, index: int) -> Any:
        """The object whose attributes a Call of this environment reads and writes."""

    def close(self) -> None:
        """Free everything. May be called twice."""


class BatchAdapter(Protocol):
    """A ready-made vector environment, which autoresets by itself in the one mode that it was built with.

    As `Adapter`, but whole batches: actions and observations are batched as Gymnasium's vector spaces say.
    """

    kind: str  # "batch": served to clients as "vector"
    num_envs: int
    autoreset: str  # the mode that it was built with
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    reward_shape: tuple[int, ...]
    metadata: dict[str, Any]
    spec: dict[str, Any]

    def reset(self, seeds: list[int | None] | None, options: dict[str, Any] | None) -> tuple[Any, Info]: ...
    def step(self, actions: Any) -> BatchMoment: ...
    def render(self, index: int) -> Any: ...
    def attribute(self, index: int) -> Any: ...
    def close(self) -> None: ...


@dataclass
class Turn:
    """What the agents of a multi-agent environment see: keyed by agent; `agents` are those still alive."""

    agents: list[str]
    observations: dict[str, Any]
    rewards: dict[str, Any]
    terminated: dict[str, bool]
    truncated: dict[str, bool]
    infos: dict[str, Info]
    selection: str | None = None  # AEC: whose turn it is
    cumulative: dict[str, Any] = field(default_factory=dict)  # AEC: rewards since each agent last acted


class AgentsAdapter(Protocol):
    """One PettingZoo environment."""

    kind: str  # "parallel" or "aec"
    possible_agents: list[str]
    observation_spaces: dict[str, gymnasium.Space[Any]]
    action_spaces: dict[str, gymnasium.Space[Any]]
    metadata: dict[str, Any]
    spec: dict[str, Any]

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> Turn: ...
    def step(self, actions: dict[str, Any]) -> Turn:
        """Parallel: an action for each live agent. AEC: one, keyed by the agent whose turn it is (None when dead)."""

    def render(self, index: int) -> Any: ...
    def attribute(self, index: int) -> Any: ...
    def close(self) -> None: ...


class PolicyAdapter(Protocol):
    """One session with a policy that many sessions share: `num_envs` rows, each with what it remembers."""

    kind: str  # "policy"
    num_envs: int
    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    metadata: dict[str, Any]
    spec: dict[str, Any]

    def hold(self, num_envs: int) -> None:
        """Keep so many rows; each begins an episode."""

    def act(self, ids: Sequence[int], observations: Any, begin: Sequence[bool], deterministic: bool) -> Any:
        """Batched observations, one for each of `ids` -> batched actions. `begin`: which rows forget first."""

    def close(self) -> None: ...


TABLE: dict[str, str] = {
    "gymnasium": "longrein.link.adapters.gymnasium:adapt_gymnasium",
    "pettingzoo": "longrein.link.adapters.pettingzoo:adapt_pettingzoo",
    "old_gym": "longrein.link.adapters.old_gym:adapt_old_gym",
}
"""Kinds of environment: where the function is that adapts a thing, or returns None when it is of another kind."""


def kinds() -> Iterator[Callable[[Any, Callable[[], Any], int], Any]]:
    """Those functions, loaded one by one, with what other packages add by the entry point `longrein.adapters`."""
    for place in TABLE.values():
        module, _, name = place.partition(":")
        yield getattr(importlib.import_module(module), name)
    for point in entry_points(group="longrein.adapters"):
        yield point.load()
