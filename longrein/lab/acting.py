"""A policy as a service: requests of many sessions answered together. Knows policies and rows, no wire.

`policy_server` is where it meets the link: each lease is one session, with rows of state of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longrein.errors import SpecError
from longrein.lab.saved_policy import SavedPolicy
from longrein.link.server import Server

Rows = NDArray[np.generic]
State = NDArray[np.float32] | None


@dataclass(eq=False, slots=True)
class _Batch:
    """Requests that are answered together."""

    requests: list[tuple[Rows, State]] = field(default_factory=list)
    rows: int = 0
    full: threading.Event = field(default_factory=threading.Event)  # nothing to wait for any more
    done: threading.Event = field(default_factory=threading.Event)
    answers: list[tuple[Rows, State]] = field(default_factory=list)  # none: each is to be answered alone


class Service:
    """One policy for many sessions.

    The first request of a batch waits for others: no longer than `max_wait` seconds, until `max_rows` rows are there,
    or until every open session has asked; so one session alone never waits. While the policy is at work, the next
    batch gathers. Raises SpecError for sizes that cannot be.
    """

    def __init__(self, policy: SavedPolicy, *, max_rows: int = 256, max_wait: float = 0.002, seed: int = 0) -> None:
        if max_rows < 1:
            raise SpecError("batch", f"must be at least 1, got {max_rows}")
        if max_wait < 0:
            raise SpecError("wait", f"must not be negative, got {max_wait}")
        self.policy = policy
        self.max_rows = max_rows
        self.max_wait = max_wait
        self.batches = 0  # passes through the network
        self.requests = 0  # answered by them
        self._generator = torch.Generator().manual_seed(seed)
        self._sessions = 0
        self._lock = threading.Lock()  # of all below
        self._gathering: dict[bool, _Batch] = {}  # by whether they are deterministic
        self._busy = threading.Lock()  # of the policy
        self._pool = ThreadPoolExecutor(1, "longrein-policy")  # keeps what a batch raised from its first request

    def join(self) -> None:
        """A session has come."""
        with self._lock:
            self._sessions += 1

    def leave(self) -> None:
        """A session has gone: nobody waits for its requests any more."""
        with self._lock:
            self._sessions -= 1
            for batch in self._gathering.values():
                self._look(batch)

    def act(self, encoded: Rows, state: State, deterministic: bool) -> tuple[Rows, State]:
        """Encoded observations [N, ...] and states [N, S] -> stored actions [N, ...], next states.

        Whatever the policy raises, it raises to the request that caused it.
        """
        with self._lock:
            batch = self._gathering.get(deterministic)
            leads = batch is None
            if batch is None:
                batch = self._gathering[deterministic] = _Batch()
            place = len(batch.requests)
            batch.requests.append((encoded, state))
            batch.rows += len(encoded)
            self._look(batch)
            if batch.rows >= self.max_rows:
                del self._gathering[deterministic]
        if leads:
            self._lead(batch, deterministic)
        else:
            batch.done.wait()
        if not batch.answers:
            # It was the only one, or one of them is such that the policy raised: each is tried alone, to find whose.
            return self._alone(encoded, state, deterministic)
        return batch.answers[place]

    def _look(self, batch: _Batch) -> None:
        if batch.rows >= self.max_rows or len(batch.requests) >= self._sessions:
            batch.full.set()

    def _lead(self, batch: _Batch, deterministic: bool) -> None:
        batch.full.wait(self.max_wait)
        with self._busy:
            with self._lock:
                if self._gathering.get(deterministic) is batch:
                    del self._gathering[deterministic]
            if len(batch.requests) > 1:
                answered = self._pool.submit(self._together, batch.requests, deterministic)
                if answered.exception() is None:
                    batch.answers = answered.result()
            batch.done.set()

    def _together(self, requests: list[tuple[Rows, State]], deterministic: bool) -> list[tuple[Rows, State]]:
        self._count(len(requests))
        encoded = np.concatenate([rows for rows, _ in requests])
        states = [state for _, state in requests if state is not None]
        together = np.concatenate(states) if states else None
        stored, following = self.policy.decide(encoded, deterministic, together, self._generator)
        ends = np.cumsum([len(rows) for rows, _ in requests])[:-1]
        actions = np.split(stored, ends)
        states_after = [None] * len(actions) if following is None else np.split(following, ends)
        return list(zip(actions, states_after, strict=True))

    def _alone(self, encoded: Rows, state: State, deterministic: bool) -> tuple[Rows, State]:
        with self._busy:
            self._count(1)
            return self.policy.decide(encoded, deterministic, state, self._generator)

    def _count(self, requests: int) -> None:
        self.batches += 1
        self.requests += requests


class Session:
    """One client's rows: the adapter that a lease holds (see `longrein.link.adapters.PolicyAdapter`)."""

    kind = "policy"

    def __init__(self, service: Service) -> None:
        self._service = service
        policy = service.policy
        self.num_envs = 0
        self.observation_space = policy.observation_space
        self.action_space = policy.action_space
        about = policy.about
        self.metadata: dict[str, Any] = {
            "algorithm": about.algorithm, "recurrent": policy.recurrent, "env_steps": about.env_steps
        }  # fmt: skip
        self.spec: dict[str, Any] = {"id": about.env}
        self._state: State = None
        self._open = True
        service.join()

    def hold(self, num_envs: int) -> None:
        """Keep so many rows; each begins an episode."""
        self.num_envs = num_envs
        self._state = self._service.policy.initial_state(num_envs)

    def act(self, ids: Sequence[int], observations: Any, begin: Sequence[bool], deterministic: bool) -> Any:
        """Batched observations, one for each of `ids` -> batched actions. `begin`: which rows forget first."""
        policy = self._service.policy.policy
        state = None
        if self._state is not None:
            state = self._state[list(ids)]  # a copy: what came of it is kept only once the action is there
            state[np.asarray(begin, np.bool_)] = 0.0
        stored, following = self._service.act(policy.encode(observations), state, deterministic)
        if self._state is not None:
            self._state[list(ids)] = following
        return policy.for_env(stored)

    def close(self) -> None:
        """The lease is over. May be called twice."""
        if self._open:
            self._open = False
            self._service.leave()


def policy_server(
    policy: SavedPolicy,
    at: str | Sequence[str],
    *,
    max_rows: int = 256,
    max_wait: float = 0.002,
    seed: int = 0,
    name: str = "policy",
    **options: Any,
) -> Server:
    """A server, not started yet, that answers observations with a policy's actions.

    max_rows, max_wait: of `Service`. seed: of choices that are not deterministic. name: what clients open; one alone
    they need not name. options: those of `Server` (token_file, certificate, limits, ...).
    Raises SpecError where an argument cannot be, ConnectError where an address cannot be had.
    """
    if options.setdefault("workers", "thread") != "thread":
        raise SpecError("workers", "sessions need a thread each, to wait for one another", hint="leave it out")
    service = Service(policy, max_rows=max_rows, max_wait=max_wait, seed=seed)
    make: Callable[[], Session] = lambda: Session(service)  # noqa: E731  # a def would be served with its name
    return Server([(name, make)], at=at, **options)
