"""One client's session with a served policy: an Act in, the bytes of its reply out. No socket, no clock, no lease."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from gymnasium.vector.utils import concatenate, create_empty_array

from longrein.errors import SpaceError
from longrein.link import codec, spaces
from longrein.link import messages as m
from longrein.link.adapters import PolicyAdapter
from longrein.link.host import Host, RequestFault, encode_reply
from longrein.link.observations import as_batch


class PolicyHost(Host):
    """Rows of a policy: what each remembers belongs to the lease, what it does is asked of the policy."""

    adapter: PolicyAdapter

    def __init__(self, adapter: PolicyAdapter, num_envs: int, arrays: str = "list") -> None:
        super().__init__(adapter)  # type: ignore[arg-type]  # nothing that Host does by itself needs an environment
        self.arrays = arrays
        self.observations = spaces.Layout(adapter.observation_space)
        self.actions = spaces.Layout(adapter.action_space)
        adapter.hold(num_envs)

    def opened(self) -> dict[str, Any]:
        adapter = self.adapter
        return {
            "kind": "policy",
            "num_envs": adapter.num_envs,
            "autoreset": "disabled",
            "observation_space": spaces.describe(adapter.observation_space),
            "action_space": spaces.describe(adapter.action_space),
            "reward_shape": [],
            "metadata": adapter.metadata,
            "spec": adapter.spec,
        }

    def _act(self, request: m.Act, data: codec.Buffer, offset: int, text: bool) -> bytes:
        ids: Sequence[int] = range(self.adapter.num_envs)
        if request.ids is not None:
            ids = [self._index(index) for index in request.ids]
            if not ids or len(set(ids)) != len(ids):
                raise RequestFault("bad_message", f"ids name each row once, and at least one: {request.ids}"[:200])
        rows = len(ids)
        begin = request.begin if request.begin is not None else [False] * rows
        if len(begin) != rows:
            raise RequestFault("bad_message", f"begin has {len(begin)} entries for {rows} rows")
        seen = self._observations(request, data, offset, rows, text)
        actions = self.adapter.act(ids, seen, begin, request.deterministic)
        if text:
            space = self.adapter.action_space
            each = spaces.iterate(space, actions, rows)
            plain = [spaces.to_plain(space, action, arrays=self.arrays) for action in each]
            return encode_reply(m.Acted(request.lease, request.n, plain), True)
        region, loose = self.actions.pack_batch(actions, rows)
        return encode_reply(m.Acted(request.lease, request.n, loose), False, region)

    def _observations(self, request: m.Act, data: codec.Buffer, offset: int, rows: int, text: bool) -> Any:
        space = self.adapter.observation_space
        if not text:
            need, got = self.observations.nbytes(rows), len(data) - offset
            if got != need:
                raise SpaceError("observation", f"{need} bytes: {rows} of {space}", f"{max(got, 0)} bytes")
            own = bytearray(memoryview(data)[offset:])  # writable: torch takes no other array without a complaint
            return as_batch(space, self.observations.unpack_batch(own, 0, rows, request.observations), rows)
        plain = request.observations
        if not isinstance(plain, list) or len(plain) != rows:
            met = f"{len(plain)}" if isinstance(plain, list) else repr(plain)[:80]
            raise SpaceError("observations", f"a list with one observation for each of {rows} rows", met)
        each = [spaces.from_plain(space, one, f"observation[{row}]") for row, one in enumerate(plain)]
        return as_batch(space, concatenate(space, each, create_empty_array(space, rows)), rows)

    def _index(self, index: int) -> int:
        if not 0 <= index < self.adapter.num_envs:
            raise RequestFault("out_of_turn", f"row {index} does not exist: this session has {self.adapter.num_envs}")
        return index

    def _fault(self, request: m.Request, error: Exception) -> m.Fault:
        fault = super()._fault(request, error)
        if not isinstance(error, SpaceError) or not error.path.startswith(("observation", "message")):
            return fault
        return m.Fault(fault.lease, fault.n, "invalid_observation", fault.message, details=fault.details)

    def _refuse(self, request: m.Request) -> NoReturn:
        kind = type(request).__name__.lower()
        raise RequestFault("out_of_turn", f"a policy is served here: it takes act, not {kind}",
                           hint="longrein.connect_policy(url).act(observation)")  # fmt: skip

    def _reset(self, request: m.Reset, data: codec.Buffer, offset: int, text: bool) -> bytes:
        self._refuse(request)

    def _step(self, request: m.Step, data: codec.Buffer, offset: int, text: bool) -> bytes:
        self._refuse(request)

    def _render(self, request: m.Render, data: codec.Buffer, offset: int, text: bool) -> bytes:
        self._refuse(request)

    def _call(self, request: m.Call, data: codec.Buffer, offset: int, text: bool) -> bytes:
        self._refuse(request)
