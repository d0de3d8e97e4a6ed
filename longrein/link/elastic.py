"""Far environments that come and go, as a vector environment of a fixed number of rows, some of them vacant.

1. A row is live while a lease is held for it, else vacant. Opening waits for one live row, and a moment for others.
2. Vacant rows are tried for in the background, a few at a time at each URL, with growing pauses.
3. A server that leaves makes its rows vacant: it was killed, stopped, or its lease was lost, and mending its line
   failed. One that says that it is to stop is left at the end of the episode.
4. An action for a vacant row is answered when the row is live again: with `restarted`, truncated, where an episode was
   cut off; with `idle` where none was. Either way the observation is the first one of a new episode.
5. `recv` does not wait for vacant rows. Where all are vacant it waits for `patience` seconds, and raises LinkError.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import tenacity
from gymnasium.vector.utils import create_empty_array

from longrein.errors import (
    CapacityReached,
    ConnectError,
    ConnectionClosed,
    Error,
    LeaseLost,
    LinkError,
    LinkTimeout,
    LocalProtocolError,
    RateLimited,
    SpecError,
)
from longrein.link import messages as m
from longrein.link import spaces
from longrein.link.client import Answer, Client
from longrein.link.vector import Array, Infos, Part, RemoteVectorEnv, Rows, demand_same

log = logging.getLogger("longrein.elastic")

TRIES_AT_ONCE = 4
"""At each URL: so many vacant rows are tried for beside each other."""
PAUSE_SECONDS = 5.0
"""Longest pause between two tries for a row; the first ones are shorter."""
SETTLE_SECONDS = 0.5
"""Without another row, once there is one, after which the opening is over."""
PASSING = (ConnectError, ConnectionClosed, LinkTimeout, CapacityReached, RateLimited, LeaseLost)
"""What a server that is not there yet, or has no room, is met by; anything else is a mistake in what was asked."""


class ElasticVectorEnv(RemoteVectorEnv):
    """As RemoteVectorEnv, for `send` and `recv` alone; its environments may come and go.

    Raises LinkError when none is there within `patience` seconds, when it is made and later.
    """

    def __init__(
        self,
        urls: Sequence[str],
        num_envs: int,
        *,
        envs_per_lease: int = 1,
        autoreset: str = "same_step",
        on_loss: str = "restart",
        **options: Any,
    ) -> None:
        if autoreset == "disabled" or on_loss != "restart":
            raise SpecError("elastic", "environments that come and go reset themselves, and begin anew when lost",
                            hint="autoreset='same_step', and leave on_loss out")  # fmt: skip
        self.joined = 0  # environments, since it was made
        self.left = 0
        self._live = 0
        self._lock = threading.Lock()  # over what finders and the caller both change
        self._closing = threading.Event()
        self._open = threading.Event()  # from here on whoever joins is reset at once
        self._vacant: dict[str, queue.SimpleQueue[Part | None]] = {}
        self._example: Client | None = None  # the first that was opened
        self._error: Error | None = None  # the last one that a try ended with
        self._alone: float | None = None  # since when there has been nobody to wait for
        try:
            super().__init__(
                urls, num_envs, envs_per_lease=envs_per_lease, autoreset=autoreset, on_loss=on_loss, **options
            )
        except BaseException:
            self._end()
            raise
        for part in self._parts:
            part.observations = create_empty_array(self.single_observation_space, part.count)
        self._open.set()

    @property
    def live(self) -> int:
        """Environments that are there now."""
        return self._live

    # ------------------------------------------------------------------------------------------------ opening

    def _open_parts(self, plan: list[tuple[str, int, int]]) -> m.Opened:
        for url, first, count in plan:
            part = Part(url, first, count)
            self._parts.append(part)
            self._want(part, playing=False)
        for url, vacant in self._vacant.items():
            for index in range(min(TRIES_AT_ONCE, vacant.qsize())):
                name = f"longrein-finder-{url}-{index}"
                threading.Thread(target=self._find, args=(vacant,), daemon=True, name=name).start()
        self._settle()
        with self._lock:  # who is there now is reset by the caller, whoever comes later by its finder
            for part in self._parts:
                if part.mending is not None and part.mending.done():
                    part.mending = None
            self._opening = False
        assert self._example is not None
        log.info("%d of %d environments are there", self._live, sum(part.count for part in self._parts))
        return self._example.opened

    _opening = True

    def _settle(self) -> None:
        """Wait until somebody is there, and nobody comes any more. Raises what keeps all of them away."""
        begun = moved = time.monotonic()
        seen, wanted = 0, sum(part.count for part in self._parts)
        while seen < wanted:
            time.sleep(0.01)
            now, live = time.monotonic(), self._live
            if live != seen:
                seen, moved = live, now
            if now - moved < SETTLE_SECONDS:
                continue
            if seen:
                return
            if self._error is not None and not isinstance(self._error, PASSING):
                raise self._error
            if now - begun > self._link.patience:
                raise self._nobody(now - begun)

    def _nobody(self, seconds: float) -> LinkError:
        said = f"; the last try: {_short(self._error)}" if self._error is not None else ""
        return LinkError(f"none of the environments was there for {seconds:.0f} s{said}", url=self._parts[0].url,
                         hint="start a server, or give a longer patience=")  # fmt: skip

    # ------------------------------------------------------------------------------------------- coming and going

    def _want(self, part: Part, *, playing: bool) -> None:
        """Have a lease found for a part. playing: whether an episode was cut off."""
        part.lease, part.playing = None, playing
        part.fresh = None
        if part.mending is None:
            part.mending = self._future()
        self._vacant.setdefault(part.url, queue.SimpleQueue()).put(part)

    def _future(self) -> Future[Any]:
        future = Future[Any]()
        future.add_done_callback(lambda _: self._wake_up())
        return future

    def _find(self, vacant: queue.SimpleQueue[Part | None]) -> None:
        """Runs in a thread: find leases for the vacant parts of one URL."""
        while (part := vacant.get()) is not None:
            trying = tenacity.Retrying(
                wait=tenacity.wait_random_exponential(multiplier=0.2, max=PAUSE_SECONDS),
                sleep=tenacity.sleep_using_event(self._closing),
                stop=tenacity.stop_when_event_set(self._closing),
                retry=tenacity.retry_if_exception_type(Error),
                before_sleep=self._note,
            )
            try:
                trying(self._join, part)
            except tenacity.RetryError:
                return  # it was closed

    def _note(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, Error):
            if not isinstance(error, PASSING) and str(error) != str(self._error):
                log.warning("no environment joins: %s", _short(error))
            self._error = error

    def _join(self, part: Part) -> None:
        """Open a lease for a part, and begin an episode in it."""
        client = self._client(part.url, part.count)
        try:
            with self._lock:
                if self._example is None:
                    self._example = client
                demand_same(self._example, client)
                if self._opening:
                    self._joins(part, client, None)
                    return
            self._open.wait()
            if self._closing.is_set():
                client.close()
                return
            reply, data, offset = client.ask(m.Reset, self._new_seeds(part.count))
            first = self._observations.unpack_batch(data, offset, part.count, reply.observations)
            with self._lock:
                self._joins(part, client, (first, reply.infos))
                self.joined += part.count
            log.info("%s joined from %s: %d of %d are there", _told(part), part.url, self._live, self.num_envs)
        except BaseException:
            client.close()
            raise

    def _joins(self, part: Part, client: Client, began: Any) -> None:
        if self._closing.is_set():
            client.close()
            return
        assert part.mending is not None
        part.lease = client
        self._live += part.count
        part.mending.set_result(began)

    def _leave(self, part: Part, why: object, *, playing: bool = True) -> None:
        """A part's lease is gone, or is not wanted any more."""
        client = part.lease
        with self._lock:
            if self._closing.is_set():
                return
            self._live -= part.count
            self.left += part.count
            log.warning("%s left: %s; %d of %d are there", _told(part), _short(why), self._live, self.num_envs)
        self._want(part, playing=playing)
        if client is not None:
            self._threads().submit(client.close)  # it may wait for an answer

    def _repair(self, part: Part, how: Callable[[Part], Any], error: LinkError | None = None) -> None:
        part.mending = self._future()
        if error is not None:
            self._leave(part, error)
        else:
            self._threads().submit(self._mend_or_leave, part, part.mending)

    def _mend_or_leave(self, part: Part, mending: Future[Any]) -> None:
        """Runs in a thread: mend the line; where that cannot be, the part is vacant."""
        try:
            part.client.mend()
        except LinkError as error:
            self._leave(part, error)
        else:
            if not self._closing.is_set():
                mending.set_result(None)

    # ------------------------------------------------------------------------------------------------- what it gives

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Infos]:
        """Reset those that are there; rows that are vacant hold nothing of meaning, and are to be acted in."""
        found = super().reset(seed=seed, options=options)
        for part in self._parts:
            part.playing = part.playing or part.mending is None
        return found

    def _post_reset(self, part: Part, *fields: Any) -> bool:
        if part.mending is not None:
            return False
        try:
            return super()._post_reset(part, *fields)
        except (LeaseLost, ConnectError) as error:
            self._repair(part, self._replace, error)
            return False

    def _reset_answer(self, part: Part) -> Answer | None:
        try:
            return part.client.answer(part.number)
        except (LeaseLost, ConnectError) as error:
            self._repair(part, self._replace, error)
            return None

    def step_async(self, actions: Any) -> None:
        """Not of environments that come and go: a step would wait for those that are not there."""
        raise LocalProtocolError("environments that come and go are not stepped together", hint="send() and recv()")

    def _enough(self, count: int, min_ready: int) -> bool:
        if count >= min_ready:
            self._alone = None
            return True
        if any(part.asked is not None and part.mending is None for part in self._parts):
            self._alone = None
            return False
        if count:
            return True
        now = time.monotonic()
        if self._alone is None:
            self._alone = now
        elif now - self._alone > self._link.patience:
            raise self._nobody(now - self._alone)
        return False

    def _rows(self, part: Part, answer: Answer) -> Rows:
        rows = super()._rows(part, answer)
        if part.client.draining and bool((rows.terminated | rows.truncated).all()):
            self._forget(part)
            part.mending = self._future()
            self._leave(part, "its server is to stop", playing=False)
        return rows

    def _restarted(self, part: Part, replaced: tuple[Any, Any]) -> Rows:
        playing, part.playing = part.playing, True
        if playing:
            return super()._restarted(part, replaced)
        ids = part.asked if part.asked is not None else part.ids
        part.asked = None
        shown = part.observations = replaced[0]
        count = len(ids)
        if count != part.count:
            shown = spaces.take(self.single_observation_space, shown, ids - part.first)
        no = np.zeros(count, bool)
        idle: list[tuple[int, Infos]] = [(row, {"idle": True}) for row in range(count)]
        rewards: Array = np.zeros((count, *self._reward_shape))
        return Rows(ids, shown, rewards, no, no.copy(), idle)

    # -------------------------------------------------------------------------------------------------- the end

    def _end(self) -> None:
        with self._lock:
            self._closing.set()
        self._open.set()
        for vacant in self._vacant.values():
            for _ in range(TRIES_AT_ONCE):
                vacant.put(None)

    def close_extras(self, **kwargs: Any) -> None:
        """Give all leases back, and look for no more."""
        self._end()
        super().close_extras(**kwargs)


def _short(error: object) -> str:
    """Without its hint."""
    return str(error).partition("\n")[0]


def _told(part: Part) -> str:
    last = part.first + part.count - 1
    return f"environment {part.first}" if part.count == 1 else f"environments {part.first} to {last}"
