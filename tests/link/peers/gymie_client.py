"""An original-style Gymie client over blocking sockets, written from the fact sheet alone."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import struct
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


class GymieConnectFailed(Exception):
    """The WebSocket handshake was refused."""


class GymieProtocolError(Exception):
    """The server sent bytes that are no valid server frame."""


class GymieClosed(Exception):
    """The server closed the socket (code 1006: without a close frame)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"[{code}] {reason}")
        self.code = code
        self.reason = reason


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"not JSON: {constant}")


class OldGymieEnv:
    """One environment instance on the server, named by its bare id."""

    def __init__(self, client: OldGymieClient, instance_id: str) -> None:
        self.client = client
        self.instance_id = instance_id

    def _ask(self, method: str, **params: Any) -> Any:
        answer = self.client.send(method, {"instance_id": self.instance_id, **params})
        return json.loads(answer, parse_constant=_refuse)

    def step(self, action: Any, **extra: Any) -> list[Any]:
        return self._ask("step", action=action, **extra)

    def reset(self) -> Any:
        return self._ask("reset")

    def observation_space(self) -> dict[str, Any]:
        return self._ask("observation_space")

    def action_space(self) -> dict[str, Any]:
        return self._ask("action_space")

    def action_sample(self) -> Any:
        return self._ask("action_sample")

    def close(self) -> Any:
        return self._ask("close")


class OldGymieClient:
    """One connection: one text frame out, one text frame in, strictly in order."""

    def __init__(self, url: str, timeout: float = 30.0) -> None:
        parts = urlsplit(url)
        host, port = parts.hostname or "localhost", parts.port or 80
        self._closed: GymieClosed | None = None
        self._sock = socket.create_connection((host, port), timeout)
        self._file = self._sock.makefile("rb")
        try:
            self._handshake(parts.path or "/gym", f"{host}:{port}")
        except BaseException:
            self._hang_up()
            raise

    def _handshake(self, path: str, host: str) -> None:
        key = base64.b64encode(os.urandom(16))
        lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key.decode()}", "Sec-WebSocket-Version: 13", "", ""]
        self._sock.sendall("\r\n".join(lines).encode())
        status = self._file.readline().decode("latin-1").strip()
        headers: dict[str, str] = {}
        while (line := self._file.readline().decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        accept = base64.b64encode(hashlib.sha1(key + GUID).digest()).decode()
        if status.split(" ")[1:2] != ["101"] or headers.get("sec-websocket-accept") != accept:
            raise GymieConnectFailed(status)

    def _hang_up(self) -> None:
        self._file.close()
        self._sock.close()

    def _broken(self, what: str) -> NoReturn:
        self.close(1002, what)
        raise GymieProtocolError(what)

    def _exactly(self, count: int) -> bytes:
        data = b""
        with suppress(ConnectionError):
            data = self._file.read(count)
        if len(data) < count:
            self._closed = GymieClosed(1006, "connection lost")
            self._hang_up()
            raise self._closed
        return data

    def _write(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        if size < 126:
            head = struct.pack("!BB", 128 | opcode, 128 | size)
        elif size < 65536:
            head = struct.pack("!BBH", 128 | opcode, 254, size)
        else:
            head = struct.pack("!BBQ", 128 | opcode, 255, size)
        mask = os.urandom(4)
        self._sock.sendall(head + mask + bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload)))

    def _read_frame(self) -> tuple[bool, int, bytes]:
        first, second = self._exactly(2)
        opcode, size = first & 15, second & 127
        if first & 0x70 or second & 128 or opcode not in (0, TEXT, CLOSE, PING, PONG):
            self._broken(f"bad frame header {first:02x} {second:02x}")
        if opcode >= CLOSE and (size > 125 or not first & 128):
            self._broken("control frame is fragmented or longer than 125 bytes")
        if size == 126:
            (size,) = struct.unpack("!H", self._exactly(2))
        elif size == 127:
            (size,) = struct.unpack("!Q", self._exactly(8))
        return bool(first & 128), opcode, self._exactly(size)

    def _read_text(self) -> str:
        message, started = b"", False
        while True:
            final, opcode, payload = self._read_frame()
            if opcode == CLOSE:
                code = int.from_bytes(payload[:2], "big") if payload else 1005
                self._closed = GymieClosed(code, payload[2:].decode())
                self.close()
                raise self._closed
            if opcode == PING:
                self._write(PONG, payload)
            elif opcode != PONG:
                if (opcode == 0) is not started:
                    self._broken("continuation frame out of place")
                message, started = message + payload, True
                if final:
                    return message.decode()

    def raw(self, text: str) -> str:
        """Send any text frame and return the text of the answer."""
        if self._closed is not None:
            raise self._closed
        with suppress(ConnectionError):  # what the server said before it went can still be read
            self._write(TEXT, text.encode())
        return self._read_text()

    def send(self, method: str, params: dict[str, Any]) -> str:
        """Send one command in the form that JSON.stringify gives it."""
        command = {"method": method, "params": params}
        return self.raw(json.dumps(command, separators=(",", ":"), ensure_ascii=False, allow_nan=False))

    def make(self, env_id: str, seed: int | None = None, **extra: Any) -> OldGymieEnv:
        """Make an environment; the answer as it stands is its id (the original never sent a seed)."""
        params = {"env_id": env_id, **({} if seed is None else {"seed": seed}), **extra}
        return OldGymieEnv(self, self.send("make", params))

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame and hang up."""
        if not self._file.closed:
            with suppress(OSError):  # the other side may have been faster
                self._write(CLOSE, struct.pack("!H", code) + reason.encode())
            self._hang_up()
        self._closed = self._closed or GymieClosed(code, reason)
