"""PettingZoo environments to serve, parallel and AEC. Knows no wire and no lease."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import gymnasium

from longrein.errors import SpaceError, SpecError
from longrein.link.adapters import Turn


class _Agents:
    """What the two kinds share: agents, spaces, frames."""

    num_envs = 1

    def __init__(self, env: Any) -> None:
        self.env = env
        possible = getattr(env, "possible_agents", None)
        if not possible:
            raise SpaceError("possible_agents", "the list of all agents that may appear", repr(possible),
                             hint="agents that are invented on the way cannot be described to a client")  # fmt: skip
        self.possible_agents: list[str] = [str(agent) for agent in possible]
        self.observation_spaces: dict[str, gymnasium.Space[Any]] = {a: env.observation_space(a) for a in possible}
        self.action_spaces: dict[str, gymnasium.Space[Any]] = {a: env.action_space(a) for a in possible}
        self.metadata: dict[str, Any] = dict(env.metadata)
        self.spec: dict[str, Any] = {
            "id": str(self.metadata.get("name", type(env.unwrapped).__name__)),
            "render_mode": getattr(env, "render_mode", None),
            "has_state": _has_state(env),
        }

    def render(self, index: int) -> Any:
        return self.env.render()

    def attribute(self, index: int) -> Any:
        return self.env

    def close(self) -> None:
        env, self.env = self.env, None
        if env is not None:
            env.close()


def _has_state(env: Any) -> bool:
    base = type(env.unwrapped)
    return "state" in base.__dict__ or hasattr(base, "state_space") or hasattr(env.unwrapped, "state_space")


class ParallelAdapter(_Agents):
    """All live agents act at once."""

    kind = "parallel"

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> Turn:
        observations, infos = self.env.reset(seed=seed, options=options)
        agents = list(self.env.agents)
        return Turn(agents, observations, {}, {}, {}, infos)

    def step(self, actions: dict[str, Any]) -> Turn:
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        return Turn(list(self.env.agents), observations, rewards, terminated, truncated, infos)


class AECAdapter(_Agents):
    """One agent acts at a time."""

    kind = "aec"

    def reset(self, seed: int | None, options: dict[str, Any] | None) -> Turn:
        self.env.reset(seed=seed, options=options)
        return self._turn()

    def step(self, actions: dict[str, Any]) -> Turn:
        (action,) = actions.values()
        self.env.step(action)
        return self._turn()

    def _turn(self) -> Turn:
        env = self.env
        agents = list(env.agents)
        return Turn(
            agents,
            {agent: env.observe(agent) for agent in agents},
            dict(env.rewards),
            dict(env.terminations),
            dict(env.truncations),
            dict(env.infos),
            env.agent_selection if agents else None,
            dict(env._cumulative_rewards),
        )


def adapt_pettingzoo(thing: Any, make: Callable[[], Any], num_envs: int) -> ParallelAdapter | AECAdapter | None:
    """The adapter for a PettingZoo environment; None for other things, and where PettingZoo was never imported."""
    pettingzoo = sys.modules.get("pettingzoo")
    if pettingzoo is None:
        return None
    adapter: type[ParallelAdapter] | type[AECAdapter]
    if isinstance(thing, pettingzoo.ParallelEnv):
        adapter = ParallelAdapter
    elif isinstance(thing, pettingzoo.AECEnv):
        adapter = AECAdapter
    else:
        return None
    if num_envs != 1:
        raise SpecError("num_envs", f"a PettingZoo environment is one world, {num_envs} were asked for",
                        hint="open several leases, one for each copy")  # fmt: skip
    return adapter(thing)
