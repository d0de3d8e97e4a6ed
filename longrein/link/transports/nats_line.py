"""One blocking line to a NATS broker: credentials, TLS, and a socket that gives whole events. No subject of ours."""

from __future__ import annotations

import base64
import re
import select
import socket
import ssl
import struct
import time
from pathlib import Path
from typing import Any, Final, NoReturn

from longrein.errors import ConnectError, ConnectionClosed, RemoteProtocolError, Unauthenticated
from longrein.link.transports import Address, ConnectOptions
from longrein.link.transports import nats_wire as wire

_WAIT_SECONDS: Final = 0.25  # how long one blocking read waits before deadlines are looked at
_READ_BYTES: Final = 1 << 18


class BrokerLine:
    """A connection to the broker, used by one thread at a time."""

    def __init__(self, address: Address, options: ConnectOptions) -> None:
        self.url = address.url
        self._sock, info, self._reader = _open(address, options)
        self._secure = isinstance(self._sock, ssl.SSLSocket)
        self._closed = False
        self.max_payload = int(info.get("max_payload", 2**20))
        self.tells_nobody = bool(info.get("headers", False))  # a broker that answers 503 where nobody is subscribed
        self._buffer = bytearray(_READ_BYTES)
        self._view = memoryview(self._buffer)
        if self._secure:
            self._sock.settimeout(_WAIT_SECONDS)
        else:  # a timeout kept by the kernel: Python's own would add a poll() to every read
            self._sock.settimeout(None)
            wait = struct.pack("ll", 0, int(_WAIT_SECONDS * 1e6))
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 30, 0))

    def fileno(self) -> int:
        """The socket's."""
        return self._sock.fileno()

    def write(self, data: bytes) -> None:
        """Send bytes of the protocol. Raises ConnectionClosed."""
        try:
            self._sock.sendall(data)
        except OSError as error:
            self.fail(f"sending failed: {error}")

    def next_message(self) -> wire.Message | None:
        """The next message that has come: the broker's own words are answered here. Raises ConnectionClosed."""
        while True:
            try:
                event = self._reader.next_event()
            except RemoteProtocolError as error:
                self.fail(str(error))
            match event:
                case wire.Control("PING"):
                    self.write(wire.PONG)
                case wire.Failure(text):
                    self.close()
                    raise broker_error(text, self.url)
                case wire.Info(fields):
                    self.max_payload = int(fields.get("max_payload", self.max_payload))
                case wire.Control():
                    pass
                case _:
                    return event

    def read(self, wait: float | None) -> bool:
        """Read once; False when nothing came within `wait` seconds, or within the kernel's own wait."""
        try:
            if wait is not None and wait < _WAIT_SECONDS and not (self._secure and self._sock.pending()):  # type: ignore[attr-defined]  # an SSLSocket
                poll = select.poll()
                poll.register(self._sock, select.POLLIN)
                if not poll.poll(max(wait, 0) * 1000):
                    return False
            got = self._sock.recv_into(self._view)
        except (BlockingIOError, TimeoutError, ssl.SSLWantReadError):
            return False
        except (OSError, ValueError) as error:
            self.fail(f"reading failed: {error}")
        if got == 0:
            self.fail("the broker closed the connection")
        self._reader.feed(self._view[:got])
        return True

    def fail(self, reason: str) -> NoReturn:
        """Close, and raise ConnectionClosed."""
        self.close()
        raise ConnectionClosed(reason, url=self.url)

    def close(self) -> None:
        """Close. May be called twice."""
        if not self._closed:
            self._closed = True
            self._sock.close()


def _open(address: Address, options: ConnectOptions) -> tuple[socket.socket, dict[str, Any], wire.Reader]:
    """A socket on which the broker has said PONG, what its INFO says, and the reader that heard it."""
    where = f"{address.host}:{address.port}"
    deadline = time.monotonic() + options.timeout
    try:
        sock = socket.create_connection((address.host, address.port or 4222), options.timeout)
    except OSError as error:
        raise ConnectError(
            f"no broker listens at {where}: {error.strerror or error}",
            url=address.url,
            hint="start one: nats-server -a 127.0.0.1 -p 4222",
        ) from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        reader = wire.Reader(options.max_message_bytes)
        info = _await(sock, reader, wire.Info, deadline, address.url).fields
        if address.secure or info.get("tls_required"):
            context = options.ssl_context or ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=address.host)
        sock.sendall(greeting(info, options.credentials, address.url, "longrein"))
        _await(sock, reader, wire.Control, deadline, address.url)
        return sock, info, reader
    except (OSError, RemoteProtocolError) as error:
        sock.close()
        raise ConnectError(f"no NATS broker answers at {where}: {error}", url=address.url) from error
    except BaseException:
        sock.close()
        raise


def _await(sock: socket.socket, reader: wire.Reader, kind: type, deadline: float, url: str) -> Any:
    while True:
        event = reader.next_event()
        if isinstance(event, wire.Failure):
            raise broker_error(event.text, url)
        if isinstance(event, kind):
            return event
        if event is None:
            sock.settimeout(max(0.01, deadline - time.monotonic()))
            data = sock.recv(65536)
            if not data:
                raise ConnectionResetError("it closed the connection")
            reader.feed(data)


def _login(info: dict[str, Any], credentials: dict[str, str], url: str) -> dict[str, Any]:
    """The fields of CONNECT that say who we are: a user, a token, or the broker's nonce signed with an nkey."""
    fields: dict[str, Any] = {}
    if "user" in credentials:
        fields |= {"user": credentials["user"], "pass": credentials.get("password", "")}
    if "token" in credentials:
        fields["auth_token"] = credentials["token"]
    seed = secret_of(credentials["nkey_seed"]) if "nkey_seed" in credentials else ""
    if "creds" in credentials:
        fields["jwt"], seed = _read_creds(Path(credentials["creds"]), url)
    if seed:
        import nkeys

        pair = nkeys.from_seed(seed.strip().encode())
        fields["sig"] = base64.urlsafe_b64encode(pair.sign(str(info.get("nonce", "")).encode())).rstrip(b"=").decode()
        if "jwt" not in fields:
            fields["nkey"] = pair.public_key.decode()
    return fields


def secret_of(text: str) -> str:
    """A seed, given as itself or as the path of a file."""
    return text if text.startswith("S") and "/" not in text else Path(text).read_text()


def _read_creds(path: Path, url: str) -> tuple[str, str]:
    """The JWT and the seed of a .creds file."""
    try:
        blocks = re.findall(r"-{3,}BEGIN [^-]+-{3,}\s*(.*?)\s*-{3,}END", path.read_text(), re.DOTALL)
    except OSError as error:
        raise ConnectError(f"the credentials cannot be read: {error}", url=url) from None
    if len(blocks) < 2:
        raise ConnectError(f"{path} is no .creds file: it holds {len(blocks)} of two blocks", url=url)
    return blocks[0], blocks[1]


def greeting(info: dict[str, Any], credentials: dict[str, str], url: str, name: str) -> bytes:
    """CONNECT and PING: who we are, after what the broker said of itself."""
    fields = {
        "verbose": False, "pedantic": False, "lang": "python", "version": "longrein", "protocol": 1, "name": name,
        "headers": True, "no_responders": True, "echo": True,
    } | _login(info, credentials, url)  # fmt: skip
    return wire.connect_line(fields) + wire.PING


def broker_error(text: str, url: str) -> Exception:
    """What a -ERR of the broker stands for."""
    if "authorization" in text.lower() or "authentication" in text.lower():
        return Unauthenticated(
            f"the broker refused: {text}", url=url, hint="give credentials={'user': ..., 'password': ...}"
        )
    return ConnectionClosed(f"the broker said {text!r}", url=url)
