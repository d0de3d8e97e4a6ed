"""One lease's environments: a request in, the bytes of its reply out. No socket, no clock, no lease.

A host owns one adapter, does the autoreset that the lease asked for, checks what comes before the environment sees it,
and is one of the two places where whatever foreign code raises is caught: it becomes a Fault, and the line stays up.
"""

from __future__ import annotations

import struct
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete

from longrein.errors import SpaceError
from longrein.link import codec, spaces
from longrein.link import messages as m
from longrein.link.adapters import Adapter, AgentsAdapter, BatchAdapter, Moment, Turn

Info = dict[str, Any]
_INT64 = struct.Struct("<q")
_ONE = struct.Struct("<d2?6x")  # the reward and the two flags of one environment, as `pack_signals` lays them out


class RequestFault(Exception):
    """A request that is answered with a Fault; it never leaves this package."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.code = code
        self.details = details


class Host:
    """What the three kinds of host share: from a request to a method, and from what went wrong to a Fault."""

    def __init__(self, adapter: Adapter | BatchAdapter | AgentsAdapter) -> None:
        self.adapter: Any = adapter
        self._handlers: dict[type, Callable[[Any, Any, int, bool], bytes]] = {
            m.Reset: self._reset,
            m.Step: self._step,
            m.Render: self._render,
            m.Call: self._call,
            m.Act: self._act,
        }

    def opened(self) -> dict[str, Any]:
        """The fields of Opened that the environments decide."""
        raise NotImplementedError

    def handle(self, request: m.Request, data: codec.Buffer, offset: int) -> bytes:
        """Answer Reset, Step, Render or Call. `data` is the whole message, its columns begin at `offset`."""
        text = codec.is_json(data)
        try:
            return self._handlers[type(request)](request, data, offset, text)
        except Exception as error:
            return encode_reply(self._fault(request, error), text)

    def step_bare(self, lease: str, n: int, data: codec.Buffer, offset: int) -> bytes:
        """Answer a Step that is columns alone."""
        return self.handle(m.Step(lease, 0, n), data, offset)

    def _fault(self, request: m.Request, error: Exception) -> m.Fault:
        if isinstance(error, RequestFault):
            return m.Fault(request.lease, request.n, error.code, str(error), details=error.details)
        if isinstance(error, SpaceError):
            at_action = error.path.startswith(("action", "message"))
            details = {"path": error.path, "expected": error.expected, "got": error.got, "hint": error.hint}
            code = "invalid_action" if at_action and isinstance(request, m.Step) else "bad_space"
            applied = False if at_action else None
            return m.Fault(request.lease, request.n, code, str(error), applied=applied, details=details)
        return m.Fault(
            request.lease,
            request.n,
            "env_error",
            str(error),
            applied=None if isinstance(request, (m.Step, m.Reset)) else False,
            exception=type(error).__name__,
            traceback="".join(traceback.format_exception(error)),
        )

    def _reset(self, request: m.Reset, data: codec.Buffer, offset: int, text: bool) -> bytes:
        raise NotImplementedError

    def _step(self, request: m.Step, data: codec.Buffer, offset: int, text: bool) -> bytes:
        raise NotImplementedError

    def _render(self, request: m.Render, data: codec.Buffer, offset: int, text: bool) -> bytes:
        frame = self.adapter.render(self._index(request.index))
        return encode_reply(m.Frame(request.lease, request.n, frame), text)

    def _call(self, request: m.Call, data: codec.Buffer, offset: int, text: bool) -> bytes:
        if request.name.startswith("_") or "._" in request.name:
            raise RequestFault("forbidden", f"{request.name!r} is private: names that begin with _ are not served")
        indices = range(self.adapter.num_envs) if request.index is None else [self._index(request.index)]
        values = [attribute_call(self.adapter.attribute(index), request) for index in indices]
        value = values if request.index is None else values[0]
        return encode_reply(m.Result(request.lease, request.n, value), text)

    def _act(self, request: m.Act, data: codec.Buffer, offset: int, text: bool) -> bytes:
        raise RequestFault("out_of_turn", "an environment is served here, not a policy: it takes no act",
                           hint="longrein.connect(url) steps it")  # fmt: skip

    def _index(self, index: int) -> int:
        if not 0 <= index < self.adapter.num_envs:
            raise RequestFault("out_of_turn", f"environment {index} does not exist: there are {self.adapter.num_envs}")
        return index

    def close(self) -> None:
        """Close the environments. What they raise is returned to nobody: the lease is over."""
        self.adapter.close()


def attribute_call(thing: Any, request: m.Call) -> Any:
    """Read, write or call a dotted attribute of an environment."""
    *path, last = request.name.split(".")
    try:
        for name in path:
            thing = _attribute(thing, name)
        if request.op == "set":
            (value,) = request.args
            if hasattr(thing, "set_wrapper_attr"):
                thing.set_wrapper_attr(last, value)
            else:
                setattr(thing, last, value)
            return None
        found = _attribute(thing, last)
    except AttributeError as error:
        raise RequestFault("not_found", f"{error}") from error
    if request.op == "get":
        if callable(found) and not isinstance(found, type):
            raise RequestFault("not_found", f"{request.name!r} is a method: call it", hint="use call(), not get_attr()")
        return found
    if request.op != "call":
        raise RequestFault("bad_message", f"op is {request.op!r}; known: get, set, call")
    if not callable(found):
        raise RequestFault("not_found", f"{request.name!r} is no method: read it", hint="use get_attr(), not call()")
    return found(*request.args, **request.kwargs)


def _attribute(thing: Any, name: str) -> Any:
    return thing.get_wrapper_attr(name) if hasattr(thing, "get_wrapper_attr") else getattr(thing, name)


def encode_reply(reply: m.Reply, text: bool, *regions: codec.Buffer, arrays: str = "list") -> bytes:
    """The reply in the form of its request; plain values that are still native are made fit to travel."""
    names = _NATIVE.get(type(reply), ())
    values = [getattr(reply, name) for name in names]
    if any(value is not None for value in values):
        fields = {name: getattr(reply, name) for name in reply.__struct_fields__}
        for name, value in zip(names, values, strict=True):
            fields[name] = codec.jsonable(value, arrays) if text else codec.wrap(value)
        reply = type(reply)(**fields)
    return codec.encode_json(reply) if text else codec.encode(reply, *regions)


# Fields that an environment fills freely, and that are made fit for the wire as the last thing before encoding.
_NATIVE: dict[type, tuple[str, ...]] = {
    m.Observed: ("infos",),
    m.Stepped: ("infos", "final"),
    m.Frame: ("frame",),
    m.Result: ("value",),
    m.Opened: ("metadata", "spec", "observation_space", "action_space"),
    m.Fault: ("details",),
}


# ----------------------------------------------------------------------------------------- one environment or copies


class VectorHost(Host):
    """Copies of one environment, each reset on its own."""

    adapter: Adapter

    def __init__(self, adapter: Adapter, autoreset: str, arrays: str = "list") -> None:
        super().__init__(adapter)
        self.autoreset = autoreset
        self.arrays = arrays
        self.actions = spaces.Layout(adapter.action_space)
        self.observations = spaces.Layout(adapter.observation_space)
        self._all = range(adapter.num_envs)
        self._single = adapter.num_envs == 1
        self._last: list[Any] = [None] * adapter.num_envs  # what a partial reset answers for the others
        self._bare: codec.Bare | None = None
        seen, done = adapter.observation_space, adapter.action_space
        self._numbered = isinstance(done, Discrete) and done.dtype == np.int64 and not self.actions.loose
        if self._numbered:
            self._first, self._count = int(done.start), int(done.n)  # type: ignore[attr-defined]  # a Discrete
        # One environment, a Box to see, numbered actions, a number as reward: `step_bare` has a short way for these.
        self._quick = (
            adapter.num_envs == 1
            and not adapter.reward_shape
            and isinstance(seen, Box)
            and self._numbered
            and not self.observations.loose
        )
        if self._quick:
            self._dtype, self._shape = seen.dtype, seen.shape
            self._padding = bytes(-self.observations.columns[0].nbytes % 8)
        self._over = [False] * adapter.num_envs  # the episode has ended and no reset came yet

    def opened(self) -> dict[str, Any]:
        adapter = self.adapter
        return {
            "kind": "vector",
            "num_envs": adapter.num_envs,
            "autoreset": self.autoreset,
            "observation_space": spaces.describe(adapter.observation_space),
            "action_space": spaces.describe(adapter.action_space),
            "reward_shape": list(adapter.reward_shape),
            "metadata": adapter.metadata,
            "spec": adapter.spec,
        }

    def _reset(self, request: m.Reset, data: codec.Buffer, offset: int, text: bool) -> bytes:
        num_envs = self.adapter.num_envs
        seeds, mask = request.seeds or [None] * num_envs, request.mask
        if len(seeds) != num_envs or (mask is not None and len(mask) != num_envs):
            raise RequestFault("bad_message", f"seeds and mask need one entry for each of {num_envs} environments")
        ids = self._all if mask is None else [index for index in self._all if mask[index]]
        options = request.options
        infos: list[Info] = [{} for _ in self._all]
        observations, new_infos = self.adapter.reset(ids, [seeds[index] for index in ids], options)
        for index, observation, info in zip(ids, observations, new_infos, strict=True):
            self._last[index], infos[index], self._over[index] = observation, info, False
        if any(observation is None for observation in self._last):
            raise RequestFault("reset_needed", "the first reset must reset all environments: leave the mask out")
        regions, loose = self._pack(self._last, text)
        scalars = spaces.scalar_types(self.observations, self._last[0]) if self._single and not text else None
        reply = m.Observed(request.lease, request.n, loose, infos if any(infos) else None, scalars)
        return encode_reply(reply, text, *regions, arrays=self.arrays)

    def _step(self, request: m.Step, data: codec.Buffer, offset: int, text: bool) -> bytes:
        ids: Sequence[int] = self._all if request.ids is None else [self._index(index) for index in request.ids]
        if len(set(ids)) != len(ids):
            raise RequestFault("bad_message", f"an environment is named twice in {request.ids}")
        if request.repeat < 1:
            raise RequestFault("bad_message", f"repeat is {request.repeat}; it counts from 1")
        actions = self._actions(request, data, offset, ids, text)
        if request.repeat == 1 and not any(self._over):
            moment = self.adapter.step(ids, actions)
            final: list[Any] = []
            steps: list[int] | None = None
            self._end(ids, moment, final)
        else:
            moment, final, steps = self._advance(ids, actions, request.repeat)
        for index, observation in zip(ids, moment.observations, strict=True):
            self._last[index] = observation
        return self._stepped(request, moment, final, steps, text)

    def step_bare(self, lease: str, n: int, data: codec.Buffer, offset: int) -> bytes:
        if not self._quick or self._over[0]:
            return self.handle(m.Step(lease, 0, n), data, offset)
        try:
            number = _INT64.unpack_from(data, offset)[0]
            if not 0 <= number - self._first < self._count:
                return self.handle(m.Step(lease, 0, n), data, offset)
            observation, reward, terminated, truncated, info = self.adapter.step_one(np.int64(number))
            self._last[0] = observation
            if (
                info
                or terminated
                or truncated
                or type(reward) is not float
                or type(observation) is not np.ndarray
                or observation.dtype != self._dtype
                or observation.shape != self._shape
            ):
                moment = Moment([observation], [reward], [terminated], [truncated], [info])
                final: list[Any] = []
                self._end(self._all, moment, final)
                self._last[0] = moment.observations[0]
                return self._stepped(m.Step(lease, 0, n), moment, final, None, False)
            if self._bare is None:
                self._bare = codec.Bare(m.Stepped(lease, 0))
            bare = self._bare
            word, signals = n.to_bytes(4, "big"), _ONE.pack(reward, False, False)
            return b"".join((bare.front, word, bare.back, signals, observation.tobytes(), self._padding))
        except Exception as error:  # the border to foreign code, as in `handle`
            return encode_reply(self._fault(m.Step(lease, 0, n), error), False)

    def _actions(self, request: m.Step, data: codec.Buffer, offset: int, ids: Sequence[int], text: bool) -> list[Any]:
        """The actions, each an element of the space; those of environments due for a reset are not looked at."""
        space, n = self.adapter.action_space, len(ids)
        waiting = any(self._over)
        if waiting and self.autoreset != "next_step":
            for index in ids:
                if self._over[index]:
                    raise RequestFault("reset_needed", f"the episode of environment {index} has ended: reset it first")
        if text:
            plain = request.actions
            if not isinstance(plain, list) or len(plain) != n:
                raise SpaceError("action", f"a list with one action for each of {n} environments", repr(plain)[:80])
            actions = [spaces.from_plain(space, action) for action in plain]
        elif self._numbered and not waiting:
            numbers = self.actions.unpack_batch(data, offset, n, request.actions)
            if bool(((numbers >= self._first) & (numbers < self._first + self._count)).all()):
                return list(numbers)
            actions = list(numbers)
        else:
            actions = self.actions.unpack_each(data, offset, n, request.actions)
        for position, index in enumerate(ids):
            if not self._over[index]:
                spaces.check(space, actions[position], "action" if self._single else f"action[{position}]")
        return actions

    def _advance(
        self, ids: Sequence[int], actions: list[Any], repeat: int
    ) -> tuple[Moment, list[Any], list[int] | None]:
        """Step with repeats and with the environments that are due for a reset, in the order of the ids."""
        n = len(ids)
        whole = Moment([None] * n, [0.0] * n, [False] * n, [False] * n, [{} for _ in ids])
        steps = [0] * n
        due = [position for position, index in enumerate(ids) if self._over[index]]
        if due:  # next-step autoreset: the action is not used, the reward is 0
            observations, infos = self.adapter.reset([ids[p] for p in due], [None] * len(due), None)
            for position, observation, info in zip(due, observations, infos, strict=True):
                whole.observations[position], whole.infos[position] = observation, info
                self._over[ids[position]] = False
        live = [position for position in range(n) if position not in set(due)]
        for count in range(repeat):
            if not live:
                break
            moment = self.adapter.step([ids[p] for p in live], [actions[p] for p in live])
            for row, position in enumerate(live):
                whole.observations[position] = moment.observations[row]
                whole.rewards[position] = (
                    moment.rewards[row] if not count else whole.rewards[position] + moment.rewards[row]
                )
                whole.terminated[position], whole.truncated[position] = moment.terminated[row], moment.truncated[row]
                whole.infos[position] = moment.infos[row]
                steps[position] += 1
            live = [p for p in live if not (whole.terminated[p] or whole.truncated[p])]
        final: list[Any] = []
        self._end(ids, whole, final)
        return whole, final, steps if repeat > 1 else None

    def _end(self, ids: Sequence[int], moment: Moment, final: list[Any]) -> None:
        """Mark the episodes that ended; under same-step autoreset begin the next ones and keep what was final."""
        if self.autoreset == "free" or not (any(moment.terminated) or any(moment.truncated)):
            return
        for position, index in enumerate(ids):
            if not (moment.terminated[position] or moment.truncated[position]):
                continue
            if self.autoreset != "same_step":
                self._over[index] = True
                continue
            final.append((position, moment.observations[position], moment.infos[position]))
            (observation,), (info,) = self.adapter.reset([index], [None], None)
            moment.observations[position], moment.infos[position] = observation, info

    def _stepped(self, request: m.Step, moment: Moment, final: list[Any], steps: list[int] | None, text: bool) -> bytes:
        infos = moment.infos if any(moment.infos) else None
        regions, loose = self._pack(moment.observations, text)
        space = self.adapter.observation_space
        form = self.arrays if text else "array"
        ends = [[row, spaces.to_plain(space, seen, arrays=form), info] for row, seen, info in final] or None
        if text:
            reply = m.Stepped(
                request.lease,
                request.n,
                loose,
                codec.jsonable(np.asarray(moment.rewards, np.float64).tolist()),
                [bool(flag) for flag in moment.terminated],
                [bool(flag) for flag in moment.truncated],
                infos,
                ends,
                None,
                steps,
            )
            return encode_reply(reply, True, arrays=self.arrays)
        scalars = self._scalars(moment) if self._single else None
        signals = codec.pack_signals(moment.rewards, moment.terminated, moment.truncated, self.adapter.reward_shape)
        if infos is None and ends is None and steps is None:
            return codec.encode(m.Stepped(request.lease, request.n, loose, scalars=scalars), signals, *regions)
        reply = m.Stepped(request.lease, request.n, loose, infos=infos, final=ends, scalars=scalars, steps=steps)
        return encode_reply(reply, False, signals, *regions)

    def _scalars(self, moment: Moment) -> str | None:
        letters = spaces.scalar_types(self.observations, moment.observations[0])
        reward = moment.rewards[0]
        if letters is None and type(reward) is float:
            return None
        return f"{letters or ''};{spaces.scalar_letter(reward)}"

    def _pack(self, values: list[Any], text: bool) -> tuple[list[codec.Buffer], Any]:
        if not text:
            return self.observations.parts(values)
        return [], [spaces.to_plain(self.adapter.observation_space, value, arrays=self.arrays) for value in values]


# ------------------------------------------------------------------------------------------- a vector environment


class BatchHost(Host):
    """A ready-made vector environment, whole batches only, in the autoreset mode that it was built with."""

    adapter: BatchAdapter

    def __init__(self, adapter: BatchAdapter, arrays: str = "list") -> None:
        super().__init__(adapter)
        self.arrays = arrays
        self.actions = spaces.Layout(adapter.action_space)
        self.observations = spaces.Layout(adapter.observation_space)

    def opened(self) -> dict[str, Any]:
        adapter = self.adapter
        return {
            "kind": "vector",
            "num_envs": adapter.num_envs,
            "autoreset": adapter.autoreset,
            "observation_space": spaces.describe(adapter.observation_space),
            "action_space": spaces.describe(adapter.action_space),
            "reward_shape": list(adapter.reward_shape),
            "metadata": adapter.metadata,
            "spec": adapter.spec,
        }

    def _reset(self, request: m.Reset, data: codec.Buffer, offset: int, text: bool) -> bytes:
        options = dict(request.options or {})
        if request.mask is not None:
            options["reset_mask"] = np.asarray(request.mask, dtype=bool)
        observations, infos = self.adapter.reset(request.seeds, options or None)
        region, loose = self._pack(observations, text)
        reply = m.Observed(request.lease, request.n, loose, infos or None)
        return encode_reply(reply, text, region, arrays=self.arrays)

    def _step(self, request: m.Step, data: codec.Buffer, offset: int, text: bool) -> bytes:
        num_envs, space = self.adapter.num_envs, self.adapter.action_space
        if request.ids is not None and request.ids != list(range(num_envs)):
            raise RequestFault("out_of_turn", "this is a ready-made vector environment: it steps as a whole")
        if request.repeat != 1:
            raise RequestFault("out_of_turn", "this is a ready-made vector environment: it repeats no action")
        if text:
            if not isinstance(request.actions, list) or len(request.actions) != num_envs:
                raise SpaceError("action", f"a list of {num_envs} actions", repr(request.actions)[:80])
            each = [spaces.from_plain(space, action) for action in request.actions]
        else:
            each = self.actions.unpack_each(data, offset, num_envs, request.actions)
        for index, action in enumerate(each):
            spaces.check(space, action, f"action[{index}]")
        region, loose = self.actions.pack(each)
        now = self.adapter.step(self.actions.unpack_batch(bytearray(region), 0, num_envs, loose))
        region, loose = self._pack(now.observations, text)
        if text:
            reply = m.Stepped(
                request.lease,
                request.n,
                loose,
                codec.jsonable(np.asarray(now.rewards, np.float64)),
                np.asarray(now.terminated, bool).tolist(),
                np.asarray(now.truncated, bool).tolist(),
                now.infos or None,
            )
            return encode_reply(reply, True, arrays=self.arrays)
        signals = codec.pack_signals(now.rewards, now.terminated, now.truncated, self.adapter.reward_shape)
        reply = m.Stepped(request.lease, request.n, loose, infos=now.infos or None)
        return encode_reply(reply, False, signals, region)

    def _pack(self, batched: Any, text: bool) -> tuple[Any, Any]:
        space, num_envs = self.adapter.observation_space, self.adapter.num_envs
        if not text:
            return self.observations.pack_batch(batched, num_envs)
        each = spaces.iterate(space, batched, num_envs)
        return b"", [spaces.to_plain(space, value, arrays=self.arrays) for value in each]


# -------------------------------------------------------------------------------------------- a PettingZoo environment


class AgentsHost(Host):
    """A PettingZoo environment. What its agents see and do is keyed by agent, and travels in the head."""

    adapter: AgentsAdapter

    def __init__(self, adapter: AgentsAdapter, arrays: str = "list") -> None:
        super().__init__(adapter)
        self.arrays = arrays
        self._turn: Turn | None = None

    def opened(self) -> dict[str, Any]:
        adapter = self.adapter
        return {
            "kind": adapter.kind,
            "num_envs": 1,
            "autoreset": "disabled",
            "observation_space": {a: spaces.describe(s) for a, s in adapter.observation_spaces.items()},
            "action_space": {a: spaces.describe(s) for a, s in adapter.action_spaces.items()},
            "reward_shape": [],
            "metadata": adapter.metadata,
            "spec": adapter.spec | {"possible_agents": list(adapter.possible_agents)},
        }

    def _index(self, index: int) -> int:
        if index != 0:
            raise RequestFault("out_of_turn", f"environment {index} does not exist: there is one")
        return 0

    def _call(self, request: m.Call, data: codec.Buffer, offset: int, text: bool) -> bytes:
        if request.name.startswith("_") or "._" in request.name:
            raise RequestFault("forbidden", f"{request.name!r} is private: names that begin with _ are not served")
        value = attribute_call(self.adapter.attribute(0), request)
        return encode_reply(m.Result(request.lease, request.n, value), text)

    def _reset(self, request: m.Reset, data: codec.Buffer, offset: int, text: bool) -> bytes:
        seed = request.seeds[0] if request.seeds else None
        turn = self._turn = self.adapter.reset(seed, request.options)
        reply = m.Observed(request.lease, request.n, self._observations(turn, text), self._state(turn))
        return encode_reply(reply, text, arrays=self.arrays)

    def _step(self, request: m.Step, data: codec.Buffer, offset: int, text: bool) -> bytes:
        turn = self._turn
        if turn is None or not turn.agents:
            raise RequestFault("reset_needed", "no agent is left: reset first")
        if not isinstance(request.actions, dict):
            raise SpaceError("action", "a mapping from agent to action", repr(request.actions)[:80])
        wanted = {turn.selection} if self.adapter.kind == "aec" else set(turn.agents)
        if set(request.actions) != wanted:
            raise SpaceError("action", f"actions for {sorted(map(str, wanted))}", f"{sorted(request.actions)}")
        actions: dict[str, Any] = {}
        for agent, plain in request.actions.items():
            space = self.adapter.action_spaces[agent]
            dead = self.adapter.kind == "aec" and (turn.terminated.get(agent) or turn.truncated.get(agent))
            if plain is None and dead:
                actions[agent] = None
                continue
            actions[agent] = spaces.from_plain(space, plain)
            spaces.check(space, actions[agent], f"action[{agent!r}]")
        turn = self._turn = self.adapter.step(actions)
        reply = m.Stepped(
            request.lease,
            request.n,
            self._observations(turn, text),
            codec.jsonable(turn.rewards) if text else codec.wrap(turn.rewards),
            {a: bool(f) for a, f in turn.terminated.items()},
            {a: bool(f) for a, f in turn.truncated.items()},
            self._state(turn),
        )
        return encode_reply(reply, text, arrays=self.arrays)

    def _observations(self, turn: Turn, text: bool) -> dict[str, Any]:
        form = self.arrays if text else "array"
        known = self.adapter.observation_spaces
        return {a: spaces.to_plain(known[a], value, arrays=form) for a, value in turn.observations.items()}

    def _state(self, turn: Turn) -> dict[str, Any]:
        """Infos, and who is alive; for an AEC environment also whose turn it is and what each has gathered."""
        state: dict[str, Any] = {"agents": turn.agents, "infos": turn.infos}
        if self.adapter.kind == "aec":
            state |= {
                "selection": turn.selection,
                "cumulative": turn.cumulative,
                "rewards": turn.rewards,
                "terminated": turn.terminated,
                "truncated": turn.truncated,
            }
        return state


def host_of(adapter: Any, autoreset: str, num_envs: int, arrays: str = "list") -> Host:
    """The host for an adapter's kind. Raises RequestFault when the adapter cannot do what the lease asks."""
    if adapter.kind == "vector":
        return VectorHost(adapter, autoreset, arrays)
    if adapter.kind == "batch":
        if autoreset != adapter.autoreset:
            raise RequestFault(
                "out_of_turn",
                f"this vector environment autoresets by {adapter.autoreset!r}, {autoreset!r} was asked",
                hint=f"connect with autoreset={adapter.autoreset!r}",
            )
        if num_envs != adapter.num_envs:
            raise RequestFault(
                "out_of_turn",
                f"this vector environment has {adapter.num_envs} environments, {num_envs} were asked",
                hint=f"connect with num_envs={adapter.num_envs}",
            )
        return BatchHost(adapter, arrays)
    return AgentsHost(adapter, arrays)
