"""Who may reach a server, and do what there: open doors, TLS, tokens with scopes. It sees no message."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from longrein.errors import SpecError
from longrein.link.transports import Address

log = logging.getLogger("longrein.server")

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


def refuse_open_door(
    address: Address, guarded: bool, insecure: bool, context: ssl.SSLContext | None, *, tokens: bool = True
) -> None:
    """Raise SpecError for an address that other machines can reach and nobody guards, or that lacks a certificate.

    tokens: whether what is spoken there knows them. Where the door is left open in so many words, the log says so once.
    """
    if address.secure and address.scheme != "tls" and context is None:
        raise SpecError("at", f"{address.url} needs a certificate", hint="give certificate=... and key=...")
    if address.scheme in ("memory", "nats", "tls") or address.scheme.endswith("+unix") or guarded:
        return  # a broker guards its own door; a socket's file has permissions
    try:
        loopback = ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        loopback = address.host == "localhost"
    if loopback:
        return
    if insecure:
        log.warning("%s: whoever can reach this address may step, reset and close what is served here", address.url)
        return
    open_door = "--insecure (insecure=True) says that whoever reaches this address may use it"
    raise SpecError(
        "at",
        f"{address.url} can be reached from other machines, and no token is asked for",
        hint=f"give --token-file FILE, or {open_door}" if tokens else open_door,
    )


def listening_tls(
    certificate: str | Path | None, key: str | Path | None, client_ca: str | Path | None
) -> ssl.SSLContext | None:
    """The TLS settings with which a server is called; None without a certificate. Raises SpecError."""
    if certificate is None:
        if client_ca is not None or key is not None:
            raise SpecError("certificate", "a key or client CA without a certificate")
        return None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise SpecError("certificate", f"cannot be used: {error}", file=str(certificate)) from None
    return context


def calling_tls(ca: str | Path | None, certificate: str | Path | None, key: str | Path | None) -> ssl.SSLContext | None:
    """The TLS settings with which a server calls others: a broker, or a trainer that waits."""
    if ca is None:
        return None
    try:
        context = ssl.create_default_context(cafile=str(ca))
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise SpecError("ca", f"cannot be used: {error}", file=str(ca)) from None
    return context
