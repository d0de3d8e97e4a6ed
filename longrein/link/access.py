"""Who may do what at a server: bearer tokens with scopes. It sees tokens, never messages."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from longrein.errors import SpecError

SCOPES: Final = frozenset({"open", "render", "call", "admin"})
MIN_TOKEN_CHARS: Final = 8


@dataclass(frozen=True)
class Principal:
    """Somebody who was recognised, and what they may do."""

    name: str
    scopes: frozenset[str]


ANYONE: Final = Principal("anyone", SCOPES - {"admin"})
"""Who everybody is at a server without tokens."""


class Tokens:
    """The tokens that a server takes."""

    def __init__(self, tokens: Iterable[tuple[str, Principal]] = ()) -> None:
        self._tokens = [(token.encode(), principal) for token, principal in tokens]
        for token, principal in self._tokens:
            if len(token) < MIN_TOKEN_CHARS:
                raise SpecError(f"token of {principal.name}", f"shorter than {MIN_TOKEN_CHARS} characters")
            unknown = principal.scopes - SCOPES
            if unknown:
                raise SpecError(
                    f"token of {principal.name}",
                    f"no such scope: {sorted(unknown)[0]!r}",
                    hint=f"scopes: {', '.join(sorted(SCOPES))}",
                )

    def __bool__(self) -> bool:
        return bool(self._tokens)

    def recognise(self, token: str | None) -> Principal | None:
        """Whose token this is. Each known token is compared, in constant time, so that timing tells nothing."""
        found = None
        shown = (token or "").encode()
        for known, principal in self._tokens:
            if hmac.compare_digest(known, shown):
                found = principal
        return found


def read_tokens(path: Path) -> Tokens:
    """Read a token file: on each line a token and, after a space, its scopes separated by commas (default: open,
    render, call), and after another space a name for the log. Lines that begin with # are comments."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise SpecError("token-file", f"cannot be read: {error}") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        scopes = frozenset(words[1].split(",")) if len(words) > 1 else ANYONE.scopes
        tokens.append((words[0], Principal(words[2] if len(words) > 2 else f"token {number}", scopes)))
    if not tokens:
        raise SpecError("token-file", "holds no token", file=str(path), hint="write one token on a line")
    return Tokens(tokens)


def one_token(token: str) -> Tokens:
    """A single token that may do all but administer."""
    return Tokens([(token, Principal("token", ANYONE.scopes))])
