"""Far environments as a `gymnasium.vector.VectorEnv`, over one lease or many, on one server or many.

Besides `step` there is `send` and `recv`: `recv(min_ready)` returns the environments that are ready first, so that a
slow one, or one whose server is gone for the moment, delays nobody.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from longrein.errors import (
    ConnectError,
    ConnectionClosed,
    LeaseLost,
    LinkError,
    LinkTimeout,
    LocalProtocolError,
    SpecError,
)
from longrein.link import codec, spaces
from longrein.link import messages as m
from longrein.link.client import Answer, Client, LinkOptions, link_options, listening

Array = np.ndarray[Any, Any]
Infos = dict[str, Any]
MODES = {
    "next_step": AutoresetMode.NEXT_STEP,
    "same_step": AutoresetMode.SAME_STEP,
    "disabled": AutoresetMode.DISABLED,
}
_TURN_SECONDS = 0.2  # how often lines that are being mended are looked at
_OPENING_THREADS = 32


@dataclass
class Rows:
    """What some environments gave: arrays with one row for each of `ids`."""

    ids: Array
    observations: Any
    rewards: Array
    terminated: Array
    truncated: Array
    infos: list[tuple[int, Infos]] | Infos  # (row, info) pairs, or a ready-made vector info
    restarted: bool = False


class Part:
    """One lease of a vector environment: the environments `first` to `first + count`."""

    def __init__(self, url: str, first: int, count: int, client: Client | None = None) -> None:
        self.url = url
        self.first = first
        self.count = count
        self.ids = np.arange(first, first + count)
        self.lease = client
        self.asked: Array | None = None  # the ids that an unanswered step is about
        self.number = 0
        self.observations: Any = None  # the last batch seen, what a partial reset and a restart answer with
        self.fresh: tuple[Any, Any] | None = None  # after a restart under next-step autoreset: what its reset gave
        self.mending: Future[Any] | None = None
        self.watched: tuple[Client, int, int] | None = None  # whose line, which of its lines, and its descriptor
        self.playing = True  # False where it has had no reset yet

    @property
    def client(self) -> Client:
        """Who holds the lease. Raises LinkError where nobody does."""
        if self.lease is None:
            raise LinkError(f"environment {self.first} is not there now", url=self.url)
        return self.lease


class RemoteVectorEnv(VectorEnv[Any, Any, Any]):
    """Environments that live elsewhere, stepped together or as they become ready.

    on_loss: "raise" passes LeaseLost on; "restart" makes new environments in place of lost ones, ends their episodes
    as truncated, and marks the row with infos["restarted"]: that row's successor was never seen.
    """

    def __init__(
        self,
        urls: Sequence[str],
        num_envs: int,
        *,
        envs_per_lease: int | None = None,
        autoreset: str = "next_step",
        on_loss: str = "raise",
        render_mode: str | None = None,
        link: LinkOptions | None = None,
        **env_options: Any,
    ) -> None:
        if autoreset not in MODES:
            raise SpecError("autoreset", f"{autoreset!r} is none of {', '.join(MODES)}")
        if on_loss not in ("raise", "restart"):
            raise SpecError("on_loss", f"{on_loss!r} is neither 'raise' nor 'restart'")
        given, env_options = link_options(env_options)
        self._link = link or given
        self._autoreset = autoreset
        self._on_loss = on_loss
        self._env_options = env_options | ({"render_mode": render_mode} if render_mode is not None else {})
        self._parts: list[Part] = []
        self._pool: ThreadPoolExecutor | None = None
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe()  # a line that was mended in a thread ends the wait
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._pending = False
        self._kept: list[Rows] = []  # answers that came before an error was raised
        self._posted: list[Part] = []  # those that were asked since somebody waited last
        self._looked_at = 0.0  # when all lines were looked at last, not only those that something came for
        plan = _spread(list(urls), num_envs, envs_per_lease)
        opened = self._open_parts(plan)
        self.num_envs = num_envs
        self.single_observation_space = spaces.space_from(opened.observation_space)
        self.single_action_space = spaces.space_from(opened.action_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {**opened.metadata, "autoreset_mode": MODES[autoreset]}
        self.remote_spec: dict[str, Any] = dict(opened.spec)
        self.render_mode = opened.spec.get("render_mode")
        self._reward_shape = tuple(opened.reward_shape)
        self._actions = spaces.Layout(self.single_action_space)
        self._observations = spaces.Layout(self.single_observation_space)
        self._part_of = np.repeat(np.arange(len(self._parts)), [part.count for part in self._parts])
        self._seeds = np.random.SeedSequence()  # of environments that replace lost ones

    def _open_parts(self, plan: list[tuple[str, int, int]]) -> m.Opened:
        """Open a lease for each part of the plan; what the first of them opened, as did all others."""
        self._open_leases(plan)
        opened = self._parts[0].client.opened
        for part in self._parts:
            try:
                demand_same(self._parts[0].client, part.client)
            except SpecError:
                self.close()
                raise
        return opened

    def _open_leases(self, plan: list[tuple[str, int, int]]) -> None:
        if len(plan) == 1:
            ((url, first, count),) = plan
            self._parts.append(_part_of(url, first, self._client(url, count)))
            return
        with ThreadPoolExecutor(min(len(plan), _OPENING_THREADS)) as pool:
            futures = [pool.submit(self._client, url, count) for url, _, count in plan]
            try:
                for (url, first, _), future in zip(plan, futures, strict=True):
                    self._parts.append(_part_of(url, first, future.result()))
            except BaseException:
                for future in futures:
                    future.cancel()
                for future in futures:
                    if not future.cancelled() and future.exception() is None:
                        future.result().close()
                raise

    def _client(self, url: str, count: int) -> Client:
        url, link = listening(url, self._link)
        client = Client(url, env_options=self._env_options, num_envs=count, autoreset=self._autoreset, link=link)
        if client.opened.kind != "vector":
            client.close()
            raise SpecError(
                "url",
                f"{url} serves no Gymnasium environment ({client.opened.kind})",
                hint=f"use longrein.connect_{client.opened.kind}(url)",
            )
        return client

    # ------------------------------------------------------------------------------------------------------- reset

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Infos]:
        """Reset all environments, or those that `options["reset_mask"]` (bool `[num_envs]`) selects."""
        super().reset(seed=seed if isinstance(seed, int) else None)
        if isinstance(seed, int):
            self._seeds = np.random.SeedSequence(seed)
        self._demand_idle("reset")
        options = dict(options or {})
        mask = options.pop("reset_mask", None)
        if mask is not None and (np.shape(mask) != (self.num_envs,) or not np.any(mask)):
            raise LocalProtocolError(
                f"reset_mask has shape {np.shape(mask)} and {int(np.sum(mask))} set",
                hint=f"give a bool array of shape ({self.num_envs},) with one set at least",
            )
        seeds = self._seeds_of(seed)
        asked = []
        for part in self._parts:
            own = slice(part.first, part.first + part.count)
            part_mask = None if mask is None else [bool(flag) for flag in mask[own]]
            if part_mask is not None and not any(part_mask):
                continue
            part.fresh = None
            part_seeds = None if seeds is None else seeds[own]
            if self._post_reset(part, part_seeds, codec.wrap(options) or None, part_mask):
                asked.append(part)
        rows: list[tuple[int, Infos]] = []
        ready: Infos = {}
        for part in asked:
            answer = self._reset_answer(part)
            if answer is None:
                continue
            reply, data, offset = answer
            part.observations = self._observations.unpack_batch(data, offset, part.count, reply.observations)
            if isinstance(reply.infos, dict):
                ready = self._placed(ready, reply.infos, part.ids, self.num_envs)
            elif reply.infos:
                rows += [(part.first + index, info) for index, info in enumerate(reply.infos)]
        return self._all_observations(), {**ready, **gather_infos(rows, self.num_envs)}

    def _post_reset(self, part: Part, *fields: Any) -> bool:
        """Send a reset; whether there is to be an answer."""
        part.number = part.client.post(m.Reset, *fields)
        return True

    def _reset_answer(self, part: Part) -> Answer | None:
        try:
            return part.client.answer(part.number)
        except LeaseLost:
            if self._on_loss == "raise":
                raise
            part.lease = self._client(part.url, part.count)
            return part.client.ask(m.Reset, self._new_seeds(part.count))

    def _seeds_of(self, seed: int | Sequence[int | None] | None) -> list[int | None] | None:
        if seed is None:
            return None
        if isinstance(seed, (int, np.integer)):
            return [int(seed) + index for index in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise LocalProtocolError(f"{len(seed)} seeds for {self.num_envs} environments")
        return [None if one is None else int(one) for one in seed]

    def _new_seeds(self, count: int) -> list[int]:
        (child,) = self._seeds.spawn(1)
        return [int(word) for word in child.generate_state(count)]

    # -------------------------------------------------------------------------------------------------- step, together

    def step(self, actions: Any) -> tuple[Any, Array, Array, Array, Infos]:
        self.step_async(actions)
        return self.step_wait()

    def step_async(self, actions: Any) -> None:
        """Send the actions of all environments, and do not wait."""
        self._demand_idle("step_async")
        if len(self._parts) == 1:
            self._post(self._parts[0], actions, None)
        else:
            for part in self._parts:
                self._post(part, spaces.take(self.single_action_space, actions, part.ids), None)
        self._pending = True

    def step_wait(self, timeout: float | None = -1) -> tuple[Any, Array, Array, Array, Infos]:
        """What all environments gave. Raises LinkTimeout, after which it may be called again."""
        if not self._pending:
            raise LocalProtocolError("step_wait without step_async before it")
        if len(self._parts) == 1 and self._parts[0].fresh is None:
            gathered = [self._wait(self._parts[0], timeout)]
        else:
            gathered = self._ready(self.num_envs, timeout)
            gathered.sort(key=lambda rows: int(rows.ids[0]))
        self._pending = False
        return self._joined(gathered, self.num_envs)

    # ---------------------------------------------------------------------------------------------- step, as ready

    def send(self, actions: Any, env_ids: Iterable[int] | None = None) -> None:
        """Send actions to the environments `env_ids` (all without it), in that order, and do not wait."""
        ids = np.arange(self.num_envs) if env_ids is None else np.asarray(list(env_ids), dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.num_envs or len(np.unique(ids)) != len(ids)):
            raise LocalProtocolError(f"env_ids {ids.tolist()} are not distinct numbers below {self.num_envs}")
        if self._pending:
            raise LocalProtocolError("send between step_async and step_wait")
        owners = self._part_of[ids]
        for number in dict.fromkeys(owners.tolist()):
            part, chosen = self._parts[number], np.flatnonzero(owners == number)
            if part.asked is not None:
                raise LocalProtocolError(
                    f"environment {ids[chosen[0]]} has not answered its last action yet",
                    hint="recv() first, or envs_per_lease=1 so that each environment answers for itself",
                )
            self._post(part, spaces.take(self.single_action_space, actions, chosen), ids[chosen])

    def recv(self, min_ready: int = 1, timeout: float | None = -1) -> tuple[Any, Array, Array, Array, Infos]:
        """The first environments that are ready, `min_ready` of them at least; infos["env_id"] `[K]` says which.

        Rows are `[K, ...]`. Raises LinkTimeout when fewer are ready in time; nothing is lost by that.
        """
        waiting = sum(len(part.asked) for part in self._parts if part.asked is not None)
        waiting += sum(len(rows.ids) for rows in self._kept)
        if not 1 <= min_ready <= waiting:
            raise LocalProtocolError(f"min_ready is {min_ready}, {waiting} environments have an action to answer")
        gathered = self._ready(min_ready, timeout)
        ids = np.concatenate([rows.ids for rows in gathered])
        *moment, infos = self._joined(gathered, len(ids))
        infos["env_id"] = ids
        return moment[0], moment[1], moment[2], moment[3], infos

    # ------------------------------------------------------------------------------------------------- how it waits

    def _post(self, part: Part, actions: Any, ids: Array | None) -> None:
        """Send one lease its actions; `ids` None means all of its environments."""
        asked = part.ids if ids is None else ids
        count = len(asked)
        self._posted.append(part)
        region, loose = self._actions.pack_batch(actions, count)  # raises before anything is under way
        part.asked = asked
        if part.fresh is not None or part.mending is not None:
            return  # it was restarted: like any next-step reset, this step's action is not used; or it is not there
        some = None if count == part.count and ids is None else (asked - part.first).tolist()
        if some == list(range(part.count)):
            some = None
        try:
            part.number = part.client.post(m.Step, loose, some, region=region)
        except (LeaseLost, ConnectError) as error:
            if self._on_loss == "raise":
                part.asked = None
                raise
            self._repair(part, self._replace, error)
        except BaseException:
            part.asked = None
            raise

    def _wait(self, part: Part, timeout: float | None) -> Rows:
        """The one lease's answer: the short way when there is nobody else to wait for."""
        self._posted = [part]
        if part.mending is not None:
            return self._ready(part.count, timeout)[0]
        try:
            return self._rows(part, part.client.answer(part.number, timeout))
        except (LeaseLost, ConnectError):
            if self._on_loss == "raise":
                part.asked = None
                self._pending = False
                raise
            return self._restarted(part, self._replace(part))
        except LinkTimeout:
            raise
        except BaseException:
            part.asked = None
            self._pending = False
            raise

    def _ready(self, min_ready: int, timeout: float | None) -> list[Rows]:
        """Rows of leases as they become ready, of `min_ready` environments at least."""
        seconds = self._link.timeout if timeout == -1 else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        gathered, self._kept = self._kept, []
        count = sum(len(rows.ids) for rows in gathered)
        try:
            posted, self._posted = self._posted, []
            for part in posted:
                if part.asked is None:
                    continue
                if part.fresh is not None:
                    gathered.append(self._fresh_rows(part))
                    count += len(gathered[-1].ids)
                elif part.mending is None:
                    self._watch(part)
            while True:
                for part in self._readable(0.0 if self._enough(count, min_ready) else self._patience(deadline)):
                    rows = self._look(part)
                    if rows is not None:
                        gathered.append(rows)
                        count += len(rows.ids)
                if self._enough(count, min_ready):
                    return gathered
                if deadline is not None and time.monotonic() > deadline:
                    raise LinkTimeout(
                        f"{count} environments were ready within {seconds:g} s, {min_ready} were wanted",
                        seconds=seconds or 0.0,
                        url=self._parts[0].url,
                    )
        except BaseException:
            self._kept = gathered  # for the next call
            raise

    def _enough(self, count: int, min_ready: int) -> bool:
        """Whether so many ready environments are what was waited for."""
        return count >= min_ready

    def _patience(self, deadline: float | None) -> float:
        return _TURN_SECONDS if deadline is None else max(0.0, min(_TURN_SECONDS, deadline - time.monotonic()))

    def _readable(self, wait: float) -> list[Part]:
        """Leases that something came for, and those that are being mended or have been silent for too long."""
        found, woken = [], False
        for key, _ in self._selector.select(min(wait, self._link.silence)):
            if key.data is None:
                os.read(self._woken, 4096)
                woken = True
            elif key.data.asked is not None:
                found.append(key.data)
        now = time.monotonic()
        if not woken and now - self._looked_at < _TURN_SECONDS:
            return found
        self._looked_at = now
        silence = self._link.silence
        others = [
            part
            for part in self._parts
            if part.asked is not None
            and part.fresh is None
            and (part.client.silent_for(now) > silence if part.mending is None else part.mending.done())
        ]
        return [part for part in found if part not in others] + others

    def _watch(self, part: Part) -> None:
        """Have the selector wait for this lease's line. A closed descriptor's number may have gone to another line."""
        client = part.client
        if part.watched is not None and part.watched[:2] == (client, client.lines):
            return
        self._forget(part)
        handle = client.fileno()
        if handle == -1:
            return
        stale = self._selector.get_map().get(handle)
        if stale is not None:
            self._forget(stale.data)
        self._selector.register(handle, selectors.EVENT_READ, part)
        part.watched = client, client.lines, handle

    def _forget(self, part: Part) -> None:
        watched, part.watched = part.watched, None
        key = self._selector.get_map().get(watched[2]) if watched is not None else None
        if key is not None and key.data is part:
            self._selector.unregister(key.fd)

    def _look(self, part: Part) -> Rows | None:
        """What has come for one lease, if it is its answer. A broken line is mended in a thread, not here."""
        if part.mending is not None:
            if not part.mending.done():
                return None
            mending, part.mending = part.mending, None
            try:
                replaced = mending.result()
            except BaseException:
                part.asked = None
                raise
            self._watch(part)
            return None if replaced is None else self._restarted(part, replaced)
        try:
            answer = part.client.poll(part.number, 0.0)
            if answer is not None:
                return self._rows(part, answer)
            if part.client.silent_for(time.monotonic()) <= self._link.silence:
                return None
            part.client.break_line()
        except ConnectionClosed:
            part.client.break_line()
        except LeaseLost as error:
            if self._on_loss == "raise":
                part.asked = None
                raise
            self._forget(part)
            self._repair(part, self._replace, error)
            return None
        except BaseException:
            part.asked = None
            raise
        self._forget(part)
        self._repair(part, self._mend)
        return None

    def _repair(self, part: Part, how: Callable[[Part], Any], error: LinkError | None = None) -> None:
        """Mend in a thread, and end the wait when that is done. error: what says that the lease is gone."""
        part.mending = self._threads().submit(how, part)
        part.mending.add_done_callback(lambda _: self._wake_up())

    def _wake_up(self) -> None:
        try:
            os.write(self._wake, b"!")
        except OSError:
            pass  # it was closed meanwhile: nobody waits

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_OPENING_THREADS, thread_name_prefix="longrein-mend")
        return self._pool

    def _mend(self, part: Part) -> Any:
        """Runs in a thread: mend the line, or make new environments where that is wanted."""
        try:
            part.client.mend()
        except (LeaseLost, ConnectError):
            if self._on_loss == "raise":
                raise
            return self._replace(part)
        return None

    def _replace(self, part: Part) -> Any:
        """New environments in place of lost ones: what their first reset gave."""
        count = part.count
        part.client.close()
        part.lease = self._client(part.url, count)
        reply, data, offset = part.client.ask(m.Reset, self._new_seeds(count))
        return self._observations.unpack_batch(data, offset, count, reply.observations), reply.infos

    # -------------------------------------------------------------------------------------------------- what it makes

    def _rows(self, part: Part, answer: Answer) -> Rows:
        reply, data, offset = answer
        ids = part.asked
        assert ids is not None
        part.asked = None
        count = len(ids)
        rewards, terminated, truncated, offset = codec.unpack_signals(data, offset, count, self._reward_shape)
        observations = self._observations.unpack_batch(data, offset, count, reply.observations)
        if count == part.count:
            part.observations = observations
        else:
            part.observations = self._updated(part, ids - part.first, observations)
        infos: list[tuple[int, Infos]] | Infos = reply.infos if isinstance(reply.infos, dict) else []
        if isinstance(infos, list):
            if reply.infos:
                infos += [(row, info) for row, info in enumerate(reply.infos) if info]
            for row, seen, info in reply.final or ():
                final = spaces.from_plain(self.single_observation_space, seen)
                infos.append((row, {"final_obs": final, "final_info": info}))
        return Rows(ids, observations, rewards, terminated, truncated, infos)

    def _updated(self, part: Part, rows: Array, observations: Any) -> Any:
        """The lease's last batch with some of its rows replaced."""
        order = np.arange(part.count)
        order[rows] = part.count + np.arange(len(rows))
        both = spaces.concatenate_batches(
            self.single_observation_space, [(part.observations, part.count), (observations, len(rows))]
        )
        return spaces.take(self.single_observation_space, both, order)

    def _restarted(self, part: Part, replaced: tuple[Any, Any]) -> Rows:
        """The rows of environments that were lost: their episodes are cut off here."""
        ids = part.asked if part.asked is not None else part.ids
        part.asked = None
        last, (first, infos) = part.observations, replaced
        count = len(ids)
        rows: list[tuple[int, Infos]] = [(row, {"restarted": True}) for row in range(count)]
        if self._autoreset == "same_step":
            ends = spaces.iterate(self.single_observation_space, last, part.count)
            rows += [(row, {"final_obs": ends[int(i) - part.first], "final_info": {}}) for row, i in enumerate(ids)]
            shown = part.observations = first
        elif self._autoreset == "next_step":
            shown, part.fresh = last, (first, infos)
        else:
            shown = last
        shown = shown if count == part.count else spaces.take(self.single_observation_space, shown, ids - part.first)
        rewards = np.zeros((count, *self._reward_shape))
        return Rows(ids, shown, rewards, np.zeros(count, bool), np.ones(count, bool), rows, restarted=True)

    def _fresh_rows(self, part: Part) -> Rows:
        """The step after a restart under next-step autoreset: the new episodes' first observations."""
        assert part.fresh is not None
        assert part.asked is not None
        (observations, infos), part.fresh = part.fresh, None
        ids, part.asked = part.asked, None
        part.observations, count = observations, len(ids)
        if count != part.count:
            observations = spaces.take(self.single_observation_space, observations, ids - part.first)
        rows = [(row, infos[int(i) - part.first]) for row, i in enumerate(ids)] if isinstance(infos, list) else []
        no = np.zeros(count, bool)
        return Rows(ids, observations, np.zeros((count, *self._reward_shape)), no, no.copy(), rows)

    def _joined(self, gathered: list[Rows], size: int) -> tuple[Any, Array, Array, Array, Infos]:
        if len(gathered) == 1:
            one = gathered[0]
            infos = one.infos if isinstance(one.infos, dict) else gather_infos(one.infos, size)
            return one.observations, one.rewards, one.terminated, one.truncated, infos
        observations = spaces.concatenate_batches(
            self.single_observation_space, [(rows.observations, len(rows.ids)) for rows in gathered]
        )
        pairs: list[tuple[int, Infos]] = []
        ready: Infos = {}
        start = 0
        for rows in gathered:
            place = np.arange(start, start + len(rows.ids))
            if isinstance(rows.infos, dict):
                ready = self._placed(ready, rows.infos, place, size)
            else:
                pairs += [(start + row, info) for row, info in rows.infos]
            start += len(rows.ids)
        return (
            observations,
            np.concatenate([rows.rewards for rows in gathered]),
            np.concatenate([rows.terminated for rows in gathered]),
            np.concatenate([rows.truncated for rows in gathered]),
            {**ready, **gather_infos(pairs, size)},
        )

    def _placed(self, infos: Infos, some: Infos, place: Array, size: int) -> Infos:
        """Lay a lease's ready-made vector info into the rows `place` of the whole."""
        if len(place) == size:
            return some
        for key, value in some.items():
            if isinstance(value, dict):
                infos[key] = self._placed(infos.get(key, {}), value, place, size)
            elif isinstance(value, np.ndarray):
                whole = infos.setdefault(key, np.zeros((size, *value.shape[1:]), value.dtype))
                whole[place] = value
            else:
                infos[key] = value
        return infos

    def _all_observations(self) -> Any:
        if len(self._parts) == 1:
            return self._parts[0].observations
        return spaces.concatenate_batches(
            self.single_observation_space, [(part.observations, part.count) for part in self._parts]
        )

    def _demand_idle(self, what: str) -> None:
        if self._pending or self._kept or any(part.asked is not None for part in self._parts):
            raise LocalProtocolError(f"{what} while actions wait for their answer", hint="step_wait() or recv() first")

    # ------------------------------------------------------------------------------------------------------- the rest

    def render(self) -> tuple[Any, ...] | None:
        """A frame of each environment."""
        if self.render_mode is None:
            return None
        frames = []
        for part in self._parts:
            frames += [part.client.ask(m.Render, index)[0].frame for index in range(part.count)]
        return tuple(frames)

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of each far environment."""
        return self._attribute("call", name, codec.wrap(list(args)), codec.wrap(kwargs))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Read an attribute of each far environment."""
        return self._attribute("get", name, [], {})

    def set_attr(self, name: str, values: Any) -> None:
        """Write an attribute of each far environment: one value for all, or a list with one for each."""
        each = list(values) if isinstance(values, (list, tuple)) else [values] * self.num_envs
        if len(each) != self.num_envs:
            raise LocalProtocolError(f"{len(each)} values for {self.num_envs} environments")
        for part in self._parts:
            for index in range(part.count):
                part.client.ask(m.Call, "set", name, [codec.wrap(each[part.first + index])], {}, index)

    def _attribute(self, op: str, name: str, args: list[Any], kwargs: Infos) -> tuple[Any, ...]:
        found: list[Any] = []
        for part in self._parts:
            found += part.client.ask(m.Call, op, name, args, kwargs, None)[0].value
        return tuple(found)

    def close_extras(self, **kwargs: Any) -> None:
        """Give all leases back."""
        for part in self._parts:
            if part.lease is not None:
                part.lease.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False)
        self._selector.close()
        os.close(self._woken)
        os.close(self._wake)


class _InfoGatherer(VectorEnv[Any, Any, Any]):
    """Gymnasium's own way of making one vector info of many; it is a method, so it needs something to stand on."""

    def __init__(self, size: int) -> None:
        self.num_envs = size

    def gather(self, pairs: list[tuple[int, Infos]]) -> Infos:
        infos: Infos = {}
        for row, info in pairs:
            infos = self._add_info(infos, info, row)
        return infos

    def __del__(self) -> None:
        """There is nothing to close."""


def gather_infos(pairs: list[tuple[int, Infos]], size: int) -> Infos:
    """Gymnasium's vector info for `size` rows, from (row, info) pairs."""
    return _InfoGatherer(size).gather(pairs) if pairs else {}


def demand_same(one: Client, other: Client) -> None:
    """Raise SpecError unless both opened the same environment."""
    for name in ("observation_space", "action_space", "reward_shape"):
        if getattr(one.opened, name) != getattr(other.opened, name):
            raise SpecError(
                "urls",
                f"{other.url} has another {name} than {one.url}",
                hint="one vector environment needs the same environment at each server",
            )


def _part_of(url: str, first: int, client: Client) -> Part:
    return Part(url, first, client.opened.num_envs, client)


def _spread(urls: list[str], num_envs: int, envs_per_lease: int | None) -> list[tuple[str, int, int]]:
    """(url, first, count) for each lease: as even as it goes over the URLs."""
    if num_envs < len(urls):
        raise SpecError("num_envs", f"{num_envs} environments for {len(urls)} URLs", hint="one URL needs one at least")
    plan, first = [], 0
    for index, url in enumerate(urls):
        left = num_envs // len(urls) + (index < num_envs % len(urls))
        while left > 0:
            count = min(left, envs_per_lease or left)
            plan.append((url, first, count))
            first += count
            left -= count
    return plan
