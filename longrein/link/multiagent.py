"""Far PettingZoo environments as PettingZoo environments. Lines and retries it leaves to client."""

from __future__ import annotations

from typing import Any

import gymnasium
from pettingzoo import AECEnv, ParallelEnv

from longrein.errors import LinkError, LocalProtocolError, SpaceError
from longrein.link import codec, spaces
from longrein.link import messages as m
from longrein.link.attributes import RemoteAttributes
from longrein.link.client import Client, LinkOptions, link_options, listening

Info = dict[str, Any]
Space = gymnasium.Space[Any]


def _open(url: str, kind: str, link: LinkOptions | None, options: Info) -> tuple[Client, Any]:
    """A lease on a PettingZoo environment of the wanted kind. Raises LinkError when something else is served."""
    given, env_options = link_options(options)
    url, link = listening(url, link or given)
    client = Client(url, env_options={k: v for k, v in env_options.items() if v is not None}, link=link)
    if client.opened.kind != kind:
        client.close()
        served = client.opened.kind
        name = "connect" if served == "vector" else f"connect_{served}"
        raise LinkError(f"what is served here is of the kind {served!r}, not {kind!r}", url=url,
                        hint=f"use longrein.{name}(url)")  # fmt: skip
    return client, client.opened


def _spaces(described: dict[str, Any]) -> dict[str, Space]:
    return {agent: spaces.space_from(description) for agent, description in described.items()}


class RemoteParallelEnv(RemoteAttributes, ParallelEnv[str, Any, Any]):
    """A world elsewhere in which all live agents act at once."""

    def __init__(
        self, url: str, render_mode: str | None = None, *, link: LinkOptions | None = None, **options: Any
    ) -> None:
        self._client, opened = _open(url, "parallel", link, options | {"render_mode": render_mode})
        self.possible_agents: list[str] = list(opened.spec["possible_agents"])
        self.agents: list[str] = []
        self.metadata: dict[str, Any] = dict(opened.metadata)
        self.render_mode: str | None = opened.spec.get("render_mode")
        self.observation_spaces: dict[str, Space] = _spaces(opened.observation_space)
        self.action_spaces: dict[str, Space] = _spaces(opened.action_space)
        self._ready = False

    @property
    def unwrapped(self) -> ParallelEnv[str, Any, Any]:
        return self

    def observation_space(self, agent: str) -> Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: Info | None = None) -> tuple[dict[str, Any], dict[str, Info]]:
        seeds = None if seed is None else [seed]
        reply, _, _ = self._client.ask(m.Reset, seeds, codec.wrap(options))
        self._ready = True
        self.agents = list(reply.infos["agents"])
        return self._observations(reply), reply.infos["infos"]

    def step(
        self, actions: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, float], dict[str, bool], dict[str, bool], dict[str, Info]]:
        if not self._ready:
            raise LocalProtocolError("a step before the first reset", url=self._client.url, hint="reset first")
        if not self.agents:
            self.agents = []
            return {}, {}, {}, {}, {}
        plain = {agent: _plain_action(self.action_spaces, agent, action) for agent, action in actions.items()}
        reply, _, _ = self._client.ask(m.Step, plain)
        self.agents = list(reply.infos["agents"])
        return self._observations(reply), reply.rewards, reply.terminated, reply.truncated, reply.infos["infos"]

    def _observations(self, reply: Any) -> dict[str, Any]:
        return {a: spaces.from_plain(self.observation_spaces[a], plain) for a, plain in reply.observations.items()}

    def render(self) -> Any:
        return None if self.render_mode is None else self._client.ask(m.Render)[0].frame

    def state(self) -> Any:
        """The far environment's global state, where it has one."""
        return self._client.ask(m.Call, "call", "state", [], {}, 0)[0].value

    def close(self) -> None:
        self._client.close()


class RemoteAECEnv(RemoteAttributes, AECEnv[str, Any, Any]):
    """A world elsewhere in which one agent acts at a time."""

    def __init__(
        self, url: str, render_mode: str | None = None, *, link: LinkOptions | None = None, **options: Any
    ) -> None:
        super().__init__()
        self._client, opened = _open(url, "aec", link, options | {"render_mode": render_mode})
        self.possible_agents: list[str] = list(opened.spec["possible_agents"])
        self.agents: list[str] = []
        self.metadata: dict[str, Any] = dict(opened.metadata)
        self.render_mode: str | None = opened.spec.get("render_mode")
        self.observation_spaces: dict[str, Space] = _spaces(opened.observation_space)
        self.action_spaces: dict[str, Space] = _spaces(opened.action_space)
        self._seen: dict[str, Any] = {}
        self._ready = False

    @property
    def unwrapped(self) -> AECEnv[str, Any, Any]:
        return self

    def observation_space(self, agent: str) -> Space:
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> Space:
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: Info | None = None) -> None:
        seeds = None if seed is None else [seed]
        reply, _, _ = self._client.ask(m.Reset, seeds, codec.wrap(options))
        self._ready = True
        self._take(reply)

    def step(self, action: Any) -> None:
        if not self._ready:
            raise LocalProtocolError("a step before the first reset", url=self._client.url, hint="reset first")
        agent = self.agent_selection
        dead = self.terminations.get(agent) or self.truncations.get(agent)
        plain = None if dead and action is None else _plain_action(self.action_spaces, agent, action)
        reply, _, _ = self._client.ask(m.Step, {agent: plain})
        self._take(reply)

    def _take(self, reply: Any) -> None:
        state = reply.infos
        self.agents = list(state["agents"])
        self.agent_selection = state["selection"]
        self.rewards = state["rewards"]
        self._cumulative_rewards = state["cumulative"]
        self.terminations = state["terminated"]
        self.truncations = state["truncated"]
        self.infos = state["infos"]
        self._seen = {a: spaces.from_plain(self.observation_spaces[a], p) for a, p in reply.observations.items()}

    def observe(self, agent: str) -> Any:
        return self._seen.get(agent)

    def render(self) -> Any:
        return None if self.render_mode is None else self._client.ask(m.Render)[0].frame

    def state(self) -> Any:
        """The far environment's global state, where it has one."""
        return self._client.ask(m.Call, "call", "state", [], {}, 0)[0].value

    def close(self) -> None:
        self._client.close()


def _plain_action(known: dict[str, Space], agent: str, action: Any) -> Any:
    space = known.get(agent)
    if space is None:
        raise SpaceError("action", f"actions of {sorted(known)}", f"one of {agent!r}")
    spaces.check(space, action, f"action[{agent!r}]")
    return spaces.to_plain(space, action)


def connect_parallel(url: str, **options: Any) -> RemoteParallelEnv:
    """A far PettingZoo parallel environment. Takes what `connect` takes."""
    return RemoteParallelEnv(url, **options)


def connect_aec(url: str, **options: Any) -> RemoteAECEnv:
    """A far PettingZoo AEC environment. Takes what `connect` takes."""
    return RemoteAECEnv(url, **options)
