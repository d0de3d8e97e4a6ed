"""Which message may follow which, and what its number means. Message in, verdict out: no socket, no clock, no log.

The rules, for each lease:

 1. The client names the lease: 16 random bytes or more. Open is request 0 of the lease; said again in the same words
    by the same client it is answered again and opens nothing.
 2. Requests after it are numbered 1, 2, 3 ... The server takes number `last + 1` and no other.
 3. A number at or below `last` is not taken again. Its stored answer is sent again; while it is still being worked on,
    its answer goes to whoever asked last; when its answer has left the window it is refused as "stale".
 4. A number above `last + 1` is refused as "gap", with the number that is expected. The client then repeats, in order,
    all that it has no answer to.
 5. Every answer uses its number up, a Fault too, unless the Fault's code is in NOT_TAKEN.
 6. A new line takes the lease over with Resume and an epoch above the lease's. What still comes with a lower epoch is
    refused as "fenced". The same epoch again is answered again.
 7. At most `window` requests may be without an answer. The client refuses to send more.
 8. Before the first Reset a lease takes Reset, Render, Call, Close; after it also Step. After Close it is gone.
 9. Working and Draining are not answers and use no number up.
10. A reply whose lease or number is not waited for is dropped.
"""

from __future__ import annotations

import enum
import secrets
from dataclasses import dataclass, field
from typing import Final

from msgspec.structs import replace

from longrein import errors
from longrein.errors import LocalProtocolError
from longrein.link import codec
from longrein.link import messages as m

REPLY_WINDOW: Final = 4
"""Answers that a server keeps for each lease, and requests that a client may have without an answer."""

MIN_LEASE_CHARS: Final = 16
AUTORESET_MODES: Final = ("disabled", "next_step", "same_step", "free")
"""Gymnasium's three, and "free": a step past an episode's end goes to the environment, whatever that makes of it."""


@dataclass(frozen=True)
class FaultKind:
    """What a code of a Fault means at the client."""

    error: type[errors.LinkError]
    retryable: bool
    meaning: str


FAULTS: Final[dict[str, FaultKind]] = {
    "bad_message": FaultKind(errors.RemoteProtocolError, False, "the bytes were no message, or a field was wrong"),
    "version": FaultKind(errors.VersionMismatch, False, "no version of the protocol is shared"),
    "out_of_turn": FaultKind(errors.ProtocolError, False, "this message may not come now"),
    "reset_needed": FaultKind(errors.LocalProtocolError, False, "a step before the first reset, or after the end"),
    "gap": FaultKind(errors.ProtocolError, True, "numbers were left out; nothing was taken"),
    "stale": FaultKind(errors.ProtocolError, False, "the answer asked for again is no longer kept"),
    "fenced": FaultKind(errors.LeaseLost, False, "another connection has taken the lease over"),
    "busy": FaultKind(errors.RateLimited, True, "too many requests without an answer; nothing was taken"),
    "invalid_action": FaultKind(errors.LinkError, False, "an action is outside its space (raised as SpaceError)"),
    "invalid_observation": FaultKind(
        errors.LinkError, False, "an observation is none of what the policy sees (raised as SpaceError)"
    ),
    "bad_space": FaultKind(
        errors.LinkError, False, "a value fits no space, or a space cannot be described (SpaceError)"
    ),
    "env_error": FaultKind(errors.RemoteEnvError, False, "the environment raised"),
    "env_timeout": FaultKind(errors.RemoteEnvError, False, "the environment took longer than the server allows"),
    "lease_lost": FaultKind(
        errors.LeaseLost, False, "there is no such lease: expired, closed, or the server restarted"
    ),
    "unauthenticated": FaultKind(errors.Unauthenticated, False, "the token is missing or wrong"),
    "forbidden": FaultKind(errors.Forbidden, False, "the token does not allow this"),
    "capacity": FaultKind(errors.CapacityReached, True, "all leases are taken"),
    "draining": FaultKind(errors.CapacityReached, True, "the server is stopping and takes no new leases"),
    "too_large": FaultKind(errors.TooLarge, False, "over an announced limit"),
    "rate_limited": FaultKind(errors.RateLimited, True, "too much at once"),
    "not_found": FaultKind(errors.NotFound, False, "not served here, or no such attribute"),
    "internal": FaultKind(errors.RemoteProtocolError, False, "a defect in the server"),
}

NOT_TAKEN: Final = frozenset({"gap", "fenced", "busy"})
"""Faults that use no number up: the request was never taken."""

# Rule 8 as a table: in which phase a lease takes which request.
PHASES: Final[dict[str, frozenset[type[m.Request]]]] = {
    "opened": frozenset({m.Reset, m.Render, m.Call, m.Act, m.Close}),
    "reset": frozenset({m.Reset, m.Step, m.Render, m.Call, m.Act, m.Close}),
    "closed": frozenset(),
}

ANSWERS: Final[dict[type[m.Request], type[m.Reply]]] = {
    m.Hello: m.Welcome,
    m.Open: m.Opened,
    m.Resume: m.Opened,
    m.Reset: m.Observed,
    m.Step: m.Stepped,
    m.Render: m.Frame,
    m.Call: m.Result,
    m.Act: m.Acted,
    m.Close: m.Closed,
    m.Ping: m.Pong,
}


def new_lease_name() -> str:
    """16 random bytes: whoever knows the name of a lease may use it."""
    return secrets.token_urlsafe(16)


class Verdict(enum.Enum):
    """What the server does with a numbered request."""

    TAKE = enum.auto()  # do it
    REPEAT = enum.auto()  # send the stored answer again
    WAIT = enum.auto()  # it is being worked on: its answer goes to the line that asked last
    REFUSE = enum.auto()  # answer with a Fault


@dataclass(slots=True)
class Ledger:
    """The server's half of one lease: what was taken, what was answered, and whose turn it is."""

    window: int = REPLY_WINDOW
    phase: str = "opened"
    epoch: int = 1
    last: int = 0  # the last number taken
    answered: int = 0  # the last number answered: answers come in order
    answers: dict[int, bytes] = field(default_factory=dict)

    def judge(self, request: m.Request) -> tuple[Verdict, str]:
        """The verdict on a numbered request. A code beside TAKE or REFUSE says with which Fault to answer."""
        if request.epoch != self.epoch:
            return Verdict.REFUSE, "fenced" if request.epoch < self.epoch else "out_of_turn"
        n = request.n
        if n == self.last + 1:
            if self.last - self.answered >= self.window:
                return Verdict.REFUSE, "busy"
            if type(request) not in PHASES[self.phase]:
                return Verdict.TAKE, "reset_needed" if self.phase == "opened" else "lease_lost"
            return Verdict.TAKE, ""
        if n > self.last + 1:
            return Verdict.REFUSE, "gap"
        if n in self.answers:
            return Verdict.REPEAT, ""
        return (Verdict.WAIT, "") if n > self.answered else (Verdict.REFUSE, "stale")

    def take(self, request: m.Request) -> None:
        """The request is taken: its number is used up."""
        self.last = request.n
        if type(request) is m.Reset:
            self.phase = "reset"
        elif type(request) is m.Close:
            self.phase = "closed"

    def answer(self, n: int, reply: bytes) -> None:
        """Keep the answer for as long as the window says."""
        self.answered = n
        self.answers[n] = reply
        self.answers.pop(n - self.window, None)

    def take_over(self, epoch: int) -> bool:
        """Rule 6. False when the epoch is one that has passed."""
        if epoch < self.epoch:
            return False
        self.epoch = epoch
        return True


@dataclass(slots=True)
class Sheet:
    """The client's half of one lease: which requests have no answer yet, and which replies are worth reading."""

    lease: str = field(default_factory=new_lease_name)
    epoch: int = 1
    n: int = 0
    window: int = REPLY_WINDOW
    unanswered: dict[int, tuple[type[m.Request], bytes]] = field(default_factory=dict)  # by number

    def number(self) -> int:
        """The next number. Raises LocalProtocolError when rule 7 forbids another request."""
        if len(self.unanswered) >= self.window:
            raise LocalProtocolError(
                f"{len(self.unanswered)} requests have no answer yet",
                hint="earlier calls timed out and the far environment is still at them; wait longer, or connect anew",
            )
        self.n += 1
        return self.n

    def sent(self, n: int, kind: type[m.Request], data: bytes) -> None:
        """The request is on its way."""
        self.unanswered[n] = kind, data

    def accept(self, reply: m.Reply, waiting_for: int) -> bool:
        """Whether this is the answer to request `waiting_for`. An answer to an older one is noted and dropped."""
        if reply.lease != self.lease or type(reply) in (m.Working, m.Draining):
            return False
        if type(reply) is m.Fault and reply.code in NOT_TAKEN:
            return reply.n == waiting_for
        self.unanswered.pop(reply.n, None)
        return reply.n == waiting_for

    def next_epoch(self) -> int:
        """The epoch with which the next line takes the lease over."""
        self.epoch += 1
        return self.epoch

    def repeats(self) -> list[bytes]:
        """What a new line must say again, in order, in the current epoch."""
        for n, (kind, data) in self.unanswered.items():
            request, offset = codec.decode_request(data)
            if request.epoch != self.epoch:
                self.unanswered[n] = kind, codec.encode(replace(request, epoch=self.epoch), data[offset:])
        return [data for _, (_, data) in sorted(self.unanswered.items())]


def error_of(fault: m.Fault, url: str) -> errors.Error:
    """The error that a Fault stands for at the client."""
    if fault.code in ("invalid_action", "invalid_observation", "bad_space"):
        details = fault.details
        return errors.SpaceError(
            str(details.get("path", "value")),
            str(details.get("expected", "an element of its space")),
            str(details.get("got", fault.message)),
            hint=str(details.get("hint", "")),
        )
    hint = str(fault.details.get("hint", ""))
    if fault.code in ("env_error", "env_timeout"):
        return errors.RemoteEnvError(
            fault.message,
            type=fault.exception or fault.code,
            traceback=fault.traceback,
            applied=fault.applied,
            url=url,
            hint=hint,
        )
    kind = FAULTS.get(fault.code)
    if kind is None:
        return errors.RemoteProtocolError(f"a fault of unknown code {fault.code!r}: {fault.message}", url=url)
    return kind.error(fault.message, url=url, hint=hint)
