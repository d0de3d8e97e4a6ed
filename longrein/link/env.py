"""A far environment as a `gymnasium.Env`. Knows spaces and Gymnasium's contract; lines it leaves to client."""

from __future__ import annotations

import struct
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from longrein.errors import LinkError
from longrein.link import codec, spaces
from longrein.link import messages as m
from longrein.link.attributes import RemoteAttributes
from longrein.link.client import Client, LinkOptions, link_options, listening
from longrein.link.dialects import dialect_of

Info = dict[str, Any]
ENTRY_POINT = "longrein.link.env:RemoteEnv"
_SIGNALS = struct.Struct("<d2?6x")
_INT64 = struct.Struct("<q")
_INTEGERS = (int, np.int64)


class RemoteEnv(RemoteAttributes, gymnasium.Env[Any, Any]):
    """One environment that lives elsewhere.

    Observations are the caller's own: each lies in memory that no later step touches.
    `call`, `get_attr` and `set_attr` reach the far environment's properties.
    """

    def __init__(
        self, url: str, render_mode: str | None = None, *, link: LinkOptions | None = None, **env_options: Any
    ) -> None:
        given, env_options = link_options(env_options)
        url, link = listening(url, link or given)
        options = env_options | ({"render_mode": render_mode} if render_mode is not None else {})
        self._client = client = Client(url, env_options=options, link=link)
        opened = client.opened
        if opened.kind != "vector":
            client.close()
            what = "policy" if opened.kind == "policy" else f"PettingZoo environment ({opened.kind})"
            raise LinkError(f"a {what} is served here", url=url, hint=f"use longrein.connect_{opened.kind}(url)")
        if opened.num_envs != 1:
            client.close()
            raise LinkError(
                f"a vector environment of {opened.num_envs} is served here",
                url=url,
                hint="use longrein.connect_vec(url, num_envs=...)",
            )
        self.observation_space = spaces.space_from(opened.observation_space)
        self.action_space = spaces.space_from(opened.action_space)
        self.metadata = dict(opened.metadata)
        self.remote_spec: dict[str, Any] = dict(opened.spec)
        self.render_mode = opened.spec.get("render_mode")
        self._reward_shape = tuple(opened.reward_shape)
        self._actions = spaces.Layout(self.action_space)
        self._observations = spaces.Layout(self.observation_space)
        space = self.action_space
        self._first, self._count = 0, 0  # of a Discrete action space of the usual dtype
        if isinstance(space, gymnasium.spaces.Discrete) and space.dtype == np.int64:
            self._first, self._count = int(space.start), int(space.n)
        self._short = self._reward_shape == () and not self._actions.loose  # its steps are columns alone
        self.spec = EnvSpec(
            "longrein/Remote-v0",
            entry_point=ENTRY_POINT,
            reward_threshold=opened.spec.get("reward_threshold"),
            nondeterministic=bool(opened.spec.get("nondeterministic", True)),
            disable_env_checker=True,
            order_enforce=False,
            kwargs={"url": url, "render_mode": render_mode, "link": link, **env_options},
        )

    @property
    def url(self) -> str:
        """Where the environment lives."""
        return self._client.url

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        super().reset(seed=seed)
        seeds = None if seed is None else [seed]
        reply, data, offset = self._client.ask(m.Reset, seeds, codec.wrap(options))
        observation = self._observations.unpack_one(data, offset, reply.observations)
        if reply.scalars is not None:
            observation = spaces.restore_scalars(self._observations, observation, reply.scalars)
        return observation, reply.infos[0] if reply.infos else {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Info]:
        if not self._short:
            return self.step_repeat(action, 1)
        if type(action) in _INTEGERS and 0 <= action - self._first < self._count:
            region: codec.Buffer = _INT64.pack(action)  # what check and pack would give
        else:
            spaces.check(self.action_space, action)
            region, _ = self._actions.pack((action,))
        reply, data, offset = self._client.step(region)
        if reply is not None:
            return self._moment(reply, data, offset)
        reward, terminated, truncated = _SIGNALS.unpack_from(data, offset)
        return self._observations.unpack_one(data, offset + 16, None), reward, terminated, truncated, {}

    def step_repeat(self, action: Any, repeat: int) -> tuple[Any, Any, bool, bool, Info]:
        """Apply one action `repeat` times with a single trip: rewards add up, and it stops when the episode ends.

        With `repeat` above 1, info["repeats"] counts the steps really taken.
        """
        spaces.check(self.action_space, action)
        region, loose = self._actions.pack((action,))
        reply, data, offset = (
            self._client.ask(m.Step, loose, region=region)
            if repeat == 1
            else self._client.ask(m.Step, loose, None, repeat, region=region)
        )
        moment = self._moment(reply, data, offset)
        if repeat != 1:
            moment[4]["repeats"] = reply.steps[0]
        return moment

    def _moment(self, reply: Any, data: bytearray, offset: int) -> tuple[Any, Any, bool, bool, Info]:
        """What a step gave, from its answer."""
        reward: Any
        if self._reward_shape == ():
            reward, terminated, truncated = _SIGNALS.unpack_from(data, offset)
            offset += 16
        else:
            rewards, ends, cuts, offset = codec.unpack_signals(data, offset, 1, self._reward_shape)
            reward, terminated, truncated = rewards[0], bool(ends[0]), bool(cuts[0])
        observation = self._observations.unpack_one(data, offset, reply.observations)
        if reply.scalars is not None:
            letters, _, letter = reply.scalars.partition(";")
            if letters:
                observation = spaces.restore_scalars(self._observations, observation, letters)
            if letter:
                reward = spaces.scalar_as(reward, letter)
        return observation, reward, terminated, truncated, reply.infos[0] if reply.infos else {}

    def render(self) -> Any:
        if self.render_mode is None:
            gymnasium.logger.warn("render() without a render mode: give render_mode=... to connect")
            return None
        reply, _, _ = self._client.ask(m.Render)
        return reply.frame

    def ping(self) -> float:
        """One round trip to the server with no environment in it; seconds."""
        return self._client.ping()

    def close(self) -> None:
        if hasattr(self, "_client"):  # it may not have come to be
            self._client.close()

    def __str__(self) -> str:
        return f"<RemoteEnv {self.remote_spec.get('id')} at {self.url}>"


def connect(url: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """A far environment as a `gymnasium.Env`: a RemoteEnv, or a dialect's at an existing server of an older system.

    url: ws://host:port/ENV, wss://, ws+unix:///path:/ENV, http://, https://, nats://host:port/NAME/ENV, memory://NAME;
    ws+listen://host:port waits there for a system that dials in. ENV may be left out where one thing is served.
    gymie://host:5000/ENV, gym-nats://host:4222 and multiserver://host:18000 lead to the servers of those systems.
    options: those of `LinkOptions` (timeout, wait, token, ...); all others go to the environment's maker.
    """
    dialect = dialect_of(url)
    return RemoteEnv(url, **options) if dialect is None else dialect.load().connect(url, **options)
