"""The messages of the link, and nothing else crosses the wire. No bytes, no socket, no space.

A request names its lease, the epoch of the connection that sends it and its number; a reply repeats the lease and the
number. Before a lease is open the lease is "" and the number is the client's own. `docs/concepts/protocol.md` shows
every message byte by byte.

Fields typed `Plain` hold plain values: None, bool, int, float, str, bytes, list, dict, and in the binary form also
arrays, NumPy scalars, tuples and large integers, which the codec carries as MessagePack extensions.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from msgspec import Struct, field

PROTOCOL_VERSION = 1
"""The number that both ends must share. It is not the package's version."""

Plain: TypeAlias = Any
"""A plain value; msgspec cannot say the recursive type at decoding speed, so the codec's hooks hold it to the list."""


class Request(Struct, frozen=True, array_like=True):
    """What every request starts with."""

    lease: str
    epoch: int
    n: int


class Reply(Struct, frozen=True, array_like=True):
    """What every reply starts with."""

    lease: str
    n: int


# ---------------------------------------------------------------------------------------------------- requests


class Hello(Request, tag="hello", frozen=True, array_like=True):
    """The first words on a line: which versions the client speaks, and who it is."""

    versions: list[int]
    features: list[str] = field(default_factory=list)
    token: str | None = None


class Open(Request, tag="open", frozen=True, array_like=True):
    """Asks for a lease. The client chooses the lease's name, so that an Open said twice opens nothing twice."""

    env: str
    options: dict[str, Plain] = field(default_factory=dict)
    num_envs: int = 1
    autoreset: str = "disabled"  # "disabled", "next_step", "same_step" or "free"
    arrays: str = "list"  # the JSON twin only: "list" or "base64"
    token: str | None = None  # for lines that carry no Hello of their own (HTTP, NATS)


class Resume(Request, tag="resume", frozen=True, array_like=True):
    """Takes a lease over on a new line. `epoch` is the new one; `last` is the last number answered."""

    last: int
    token: str | None = None


class Reset(Request, tag="reset", frozen=True, array_like=True):
    """Resets the environments that `mask` selects, all of them without one. One seed an environment, or None."""

    seeds: list[int | None] | None = None
    options: dict[str, Plain] | None = None
    mask: list[bool] | None = None


class Step(Request, tag="step", frozen=True, array_like=True):
    """Steps all environments, or those in `ids`, with the actions in the columns and in `actions`.

    With `repeat` above 1 the same action is applied that many times, rewards add up, and an environment stops early
    when its episode ends.
    """

    actions: Plain = None
    ids: list[int] | None = None
    repeat: int = 1


class Render(Request, tag="render", frozen=True, array_like=True):
    """Asks for a frame of one environment."""

    index: int = 0


class Call(Request, tag="call", frozen=True, array_like=True):
    """Reads ("get"), writes ("set") or calls ("call") an attribute of one far environment, or of all (`index` None)."""

    op: str
    name: str
    args: list[Plain] = field(default_factory=list)
    kwargs: dict[str, Plain] = field(default_factory=dict)
    index: int | None = None


class Act(Request, tag="act", frozen=True, array_like=True):
    """Asks a served policy for actions: of every row, or of those in `ids`.

    The observations are in the columns and in `observations`. `begin` says, for each row asked about, whether an
    episode begins there: a policy that remembers forgets that row first.
    """

    observations: Plain = None
    ids: list[int] | None = None
    deterministic: bool = True
    begin: list[bool] | None = None


class Close(Request, tag="close", frozen=True, array_like=True):
    """Ends the lease and its environments."""


class Ping(Request, tag="ping", frozen=True, array_like=True):
    """Asks for a Pong, with no environment in it."""


# ----------------------------------------------------------------------------------------------------- replies


class Welcome(Reply, tag="welcome", frozen=True, array_like=True):
    """Answers Hello: the version to speak, the limits that hold, and what may be opened."""

    version: int
    server: str
    instance: str
    environments: list[str]
    limits: dict[str, float]
    features: list[str] = field(default_factory=list)


class Opened(Reply, tag="opened", frozen=True, array_like=True):
    """Answers Open and Resume: all that both sides need to lay out the columns.

    `kind` is "vector" (Gymnasium), "parallel" or "aec" (PettingZoo), or "policy": what Act asks. For a PettingZoo
    environment the two spaces are mappings from agent to space.
    """

    epoch: int
    last: int
    kind: str
    route: str
    num_envs: int
    autoreset: str
    observation_space: Plain
    action_space: Plain
    reward_shape: list[int]
    metadata: dict[str, Plain]
    spec: dict[str, Plain]
    limits: dict[str, float] = field(default_factory=dict)


class Observed(Reply, tag="observed", frozen=True, array_like=True):
    """Answers Reset. `observations` holds what fits no column; `scalars` the Python types of scalars (one env only)."""

    observations: Plain = None
    infos: Plain = None
    scalars: str | None = None


class Stepped(Reply, tag="stepped", frozen=True, array_like=True):
    """Answers Step. In the binary form rewards and flags are columns and their fields here are None.

    `final` lists [environment, observation, info] for each episode that ended under same-step autoreset.
    `steps` counts the steps really taken by each environment when the request asked for a repeat.
    """

    observations: Plain = None
    rewards: Plain = None
    terminated: Plain = None
    truncated: Plain = None
    infos: Plain = None
    final: Plain = None
    scalars: str | None = None
    steps: list[int] | None = None


class Frame(Reply, tag="frame", frozen=True, array_like=True):
    """Answers Render."""

    frame: Plain = None


class Result(Reply, tag="result", frozen=True, array_like=True):
    """Answers Call: one value, or a list with one for each environment."""

    value: Plain = None


class Acted(Reply, tag="acted", frozen=True, array_like=True):
    """Answers Act. The actions are in the columns; `actions` holds what fits none."""

    actions: Plain = None


class Closed(Reply, tag="closed", frozen=True, array_like=True):
    """Answers Close."""


class Pong(Reply, tag="pong", frozen=True, array_like=True):
    """Answers Ping."""


class Working(Reply, tag="working", frozen=True, array_like=True):
    """Not an answer: the server is still at request `n`, for `elapsed` seconds now."""

    elapsed: float


class Draining(Reply, tag="draining", frozen=True, array_like=True):
    """Not an answer: the server takes no new leases and stops in `seconds` at the latest."""

    seconds: float


class Fault(Reply, tag="fault", frozen=True, array_like=True):
    """Answers any request that failed. `applied` tells whether the environment may have stepped.

    `code` is one of `longrein.link.protocol.FAULTS`. A fault is an answer like any other: it uses the number up, unless
    its code is "gap", "fenced" or "busy", which say that the request was not taken at all.
    """

    code: str
    message: str
    retryable: bool = False
    applied: bool | None = False
    exception: str = ""
    traceback: str = ""
    details: dict[str, Plain] = field(default_factory=dict)


AnyRequest: TypeAlias = Hello | Open | Resume | Reset | Step | Render | Call | Act | Close | Ping
AnyReply: TypeAlias = (
    Welcome | Opened | Observed | Stepped | Frame | Result | Acted | Closed | Pong | Working | Draining | Fault
)
AnyMessage: TypeAlias = AnyRequest | AnyReply
