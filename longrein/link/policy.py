"""A policy that acts elsewhere: observations there, actions back. Knows spaces; lines it leaves to client."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from longrein.errors import LeaseLost, LinkError, SpaceError
from longrein.link import messages as m
from longrein.link import spaces
from longrein.link.client import Client, LinkOptions, link_options, listening
from longrein.link.observations import as_batch


class RemotePolicy:
    """A session with a served policy, for one thread at a time: `num_envs` rows, each of which remembers for itself.

    A policy that remembers keeps its memory at the server, for as long as the session lives. When the server was
    started anew the session is lost: a policy without memory gets another one by itself, of one with memory LeaseLost
    is raised, since what it remembered is gone.
    """

    def __init__(self, url: str, num_envs: int = 1, *, link: LinkOptions | None = None, **options: Any) -> None:
        given, others = link_options(options)
        self._url, self._link = listening(url, link or given)
        self._options = others
        self.num_envs = num_envs
        self._client = self._open()
        opened = self._client.opened
        self.observation_space = spaces.space_from(opened.observation_space)
        self.action_space = spaces.space_from(opened.action_space)
        self.metadata: dict[str, Any] = dict(opened.metadata)
        self.recurrent = bool(self.metadata.get("recurrent"))
        self._observations = spaces.Layout(self.observation_space)
        self._actions = spaces.Layout(self.action_space)
        self._begin = [False] * num_envs

    @property
    def url(self) -> str:
        """Where the policy lives."""
        return self._client.url

    def act(self, observation: Any, deterministic: bool = True) -> Any:
        """One observation -> the action for it. Raises SpaceError for one that does not belong, LinkError."""
        if self.num_envs != 1:
            raise SpaceError("observation", f"{self.num_envs} of them: act_batch(observations)", "one",
                             hint="act() is for sessions of one row")  # fmt: skip
        batch = as_batch(self.observation_space, observation)
        return spaces.iterate(self.action_space, self._act(batch, None, deterministic), 1)[0]

    def act_batch(self, observations: Any, deterministic: bool = True, ids: Sequence[int] | None = None) -> Any:
        """Observations of all rows, or of those in `ids`, as a vector environment batches them -> actions as it takes
        them. Raises SpaceError, LinkError."""
        rows = self.num_envs if ids is None else len(ids)
        batch = as_batch(self.observation_space, observations, rows, "observations")
        return self._act(batch, None if ids is None else [int(index) for index in ids], deterministic)

    def reset(self, mask: Sequence[bool] | None = None) -> None:
        """Begin episodes: the rows that `mask` selects, all without one, forget. It takes effect with the next act."""
        if mask is not None and len(mask) != self.num_envs:
            raise SpaceError("mask", f"{self.num_envs} entries", f"{len(mask)}")
        for row in range(self.num_envs):
            self._begin[row] |= mask is None or bool(mask[row])

    def ping(self) -> float:
        """One round trip to the server with no policy in it; seconds."""
        return self._client.ping()

    def close(self) -> None:
        """Give the session back. May be called twice."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Client:
        client = Client(self._url, env_options=self._options, num_envs=self.num_envs, link=self._link)
        kind = client.opened.kind
        if kind != "policy":
            client.close()
            name = "connect" if kind == "vector" else f"connect_{kind}"
            raise LinkError("an environment is served here, not a policy", url=self._url,
                            hint=f"use longrein.{name}(url)")  # fmt: skip
        return client

    def _act(self, batch: Any, ids: list[int] | None, deterministic: bool) -> Any:
        rows = range(self.num_envs) if ids is None else ids
        begin = [self._begin[row] for row in rows]
        fields = (ids, deterministic, begin if any(begin) else None)
        region, loose = self._observations.pack_batch(batch, len(rows))
        try:
            reply, data, offset = self._client.ask(m.Act, loose, *fields, region=region)
        except LeaseLost:
            if self.recurrent:
                raise
            self._client.close()
            self._client = self._open()
            reply, data, offset = self._client.ask(m.Act, loose, *fields, region=region)
        for row in rows:
            self._begin[row] = False
        return self._actions.unpack_batch(data, offset, len(rows), reply.actions)


def connect_policy(url: str, num_envs: int = 1, **options: Any) -> RemotePolicy:
    """A policy that `longrein act` serves, over WebSocket, HTTP or NATS.

    url: as for `connect`; the name behind the host may be left out. num_envs: rows of `act_batch`.
    options: those of `LinkOptions` (timeout, wait, token, ...).
    Raises ConnectError, Unauthenticated, CapacityReached, and LinkError where an environment is served.
    """
    return RemotePolicy(url, num_envs, **options)
