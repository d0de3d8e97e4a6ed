"""Every error that longrein raises; it knows no module that raises them.

Error
 |- LinkError(url)
 |    |- ConnectError, ConnectionClosed(reason), LinkTimeout(seconds) [also TimeoutError], LeaseLost
 |    |- ProtocolError: LocalProtocolError (we spoke out of turn), RemoteProtocolError (they did), VersionMismatch
 |    |- Refused: Unauthenticated, Forbidden, CapacityReached, TooLarge, RateLimited, NotFound
 |    `- RemoteEnvError(type, message, traceback, applied)    the far environment raised; the line still stands
 |- SpaceError(path, expected, got) [also ValueError]
 |- SpecError(file, key, problem, hint) [also ValueError]
 `- RunError: RoleDied(role, exitcode), CheckpointError(path)

A message says what was met and what to do. All of them pickle, since they cross processes.
"""

from __future__ import annotations

from typing import Any


def _rebuild(cls: type[Error], args: tuple[Any, ...], state: dict[str, Any]) -> Error:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class Error(Exception):
    """The root of the tree: catch it to catch whatever longrein raises on purpose."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n  hint: {hint}" if hint else message)
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__.copy())


class LinkError(Error):
    """Something between us and a far environment went wrong. `url` is the address that was used."""

    def __init__(self, message: str, *, url: str = "", hint: str = "") -> None:
        super().__init__(f"{url}: {message}" if url else message, hint=hint)
        self.url = url


class ConnectError(LinkError):
    """No line could be opened."""


class ConnectionClosed(LinkError):
    """An open line ended. `reason` says how; `code` and `said` are a WebSocket's close code and text, if there were."""

    def __init__(self, reason: str, *, url: str = "", hint: str = "", code: int | None = None, said: str = "") -> None:
        super().__init__(f"the connection closed: {reason}", url=url, hint=hint)
        self.reason = reason
        self.code = code
        self.said = said


class LinkTimeout(LinkError, TimeoutError):
    """No answer within `seconds`. The lease is still usable: a late answer is recognised and dropped."""

    def __init__(self, message: str, *, seconds: float, url: str = "", hint: str = "") -> None:
        super().__init__(message, url=url, hint=hint)
        self.seconds = seconds


class LeaseLost(LinkError):
    """The far environment is gone: its server restarted, its worker died or the lease expired."""


class ProtocolError(LinkError):
    """One end spoke out of turn."""


class LocalProtocolError(ProtocolError):
    """We did: for instance a step before the first reset."""


class RemoteProtocolError(ProtocolError):
    """They did: for instance bytes that are no message."""


class VersionMismatch(ProtocolError):
    """The two ends share no version of the protocol."""


class Refused(LinkError):
    """The server understood, and will not."""


class Unauthenticated(Refused):
    """The token is missing or wrong."""


class Forbidden(Refused):
    """The token is right and does not allow this."""


class CapacityReached(Refused):
    """All leases are taken."""


class TooLarge(Refused):
    """A message or a request is over an announced limit."""


class RateLimited(Refused):
    """Too much at once; try again later."""


class NotFound(Refused):
    """There is no such environment or attribute at the server."""


class RemoteEnvError(LinkError):
    """The far environment raised. `applied` tells whether it may have stepped; None where nobody knows."""

    def __init__(
        self,
        message: str,
        *,
        type: str,
        traceback: str = "",
        applied: bool | None = None,
        url: str = "",
        hint: str = "",
    ) -> None:
        text = f"the far environment raised {type}: {message}"
        super().__init__(f"{text}\n--- far side ---\n{traceback.rstrip()}" if traceback else text, url=url, hint=hint)
        self.type = type
        self.message = message
        self.traceback = traceback
        self.applied = applied


class SpaceError(Error, ValueError):
    """A value does not belong to its space, or a space cannot be described. `path` names the element."""

    def __init__(self, path: str, expected: str, got: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: expected {expected}, got {got}", hint=hint)
        self.path = path
        self.expected = expected
        self.got = got


class SpecError(Error, ValueError):
    """A spec or a setting is wrong. `key` is the dotted path."""

    def __init__(self, key: str, problem: str, *, file: str = "", hint: str = "") -> None:
        super().__init__(f"{file + ': ' if file else ''}{key}: {problem}", hint=hint)
        self.file = file
        self.key = key
        self.problem = problem


class RunError(Error):
    """A run could not go on."""


class RoleDied(RunError):
    """A process of the run died. `exitcode` is None where it is not known: on another machine."""

    def __init__(self, role: str, exitcode: int | None, *, hint: str = "") -> None:
        super().__init__(f"{role} died" + ("" if exitcode is None else f" with exit code {exitcode}"), hint=hint)
        self.role = role
        self.exitcode = exitcode


class CheckpointError(RunError):
    """A checkpoint cannot be read or written."""

    def __init__(self, path: str, problem: str, *, hint: str = "") -> None:
        super().__init__(f"{path}: {problem}", hint=hint)
        self.path = path
