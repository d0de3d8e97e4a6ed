"""An original-style Gymie server with its limits and close texts, written from the fact sheet alone."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import gymnasium
import numpy as np

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
ENV_ID = re.compile(r"^(?:[\w:-]+/)?([\w:.-]+)-v(\d+)$")
BROKEN = b"HTTP/1.1 500 Internal Server Error\r\nContent-type: text/plain\r\nContent-Length: 0\r\n\r\n"


class Refusal(Exception):
    """An error with a text of its own (close code 1007)."""


class OldApi:
    """A gymnasium environment with the 4-tuple step of the old gym; rendering is a no-op."""

    def __init__(self, env_id: str, seed: int | None) -> None:
        self.env = gymnasium.make(env_id, disable_env_checker=True)
        self.seed = seed or None  # as in the original, a seed of 0 is no seed
        self.old_bounds = env_id.startswith("CartPole")  # float32 maximum in the old gym, infinite today

    def reset(self) -> Any:
        seed, self.seed = self.seed, None
        return self.env.reset(seed=seed)[0]

    def step(self, action: Any) -> tuple[Any, Any, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if truncated and not terminated:
            info = {**info, "TimeLimit.truncated": True}
        return obs, reward, bool(terminated or truncated), info

    def space_info(self, which: str) -> str:
        space: Any = getattr(self.env, which)
        name = type(space).__name__
        info: dict[str, Any] = {"name": name}
        if name in "Discrete":
            info["n"] = int(space.n)
        elif name in "MultiBinary":
            info.update(n=space.n, shape=list(space.shape or ()))
        elif name in "Box":
            big = float(np.finfo(np.float32).max) if self.old_bounds else np.inf
            low, high = (np.clip(np.asarray(b, np.float64), -big, big) for b in (space.low, space.high))
            info.update(shape=list(space.shape or ()), low=low.tolist(), high=high.tolist())
        return json.dumps(info)


class OldGymie:
    """The server: a table of environments that all connections share, and what it received."""

    def __init__(self) -> None:
        self.port = 0
        self.received: list[str] = []
        self.envs: dict[str, OldApi] = {}
        names = ("make", "reset", "step", "observation_space", "action_space", "action_sample", "close")
        self.public: dict[str, Callable[..., str]] = {name: getattr(self, "do_" + name) for name in names}

    def lookup(self, instance_id: str) -> OldApi:
        if instance_id not in self.envs:
            raise Refusal(f"Instance `{instance_id}` not found")
        return self.envs[instance_id]

    def do_make(self, env_id: str, seed: int | None = None) -> str:
        if ENV_ID.match(env_id) is None:
            raise Refusal(f"Environment `{env_id}` is malformed")
        try:
            env = OldApi(env_id, seed)
        except gymnasium.error.UnregisteredEnv as error:
            raise Refusal(f"Environment `{env_id}` not found") from error
        instance_id = uuid.uuid4().hex
        self.envs[instance_id] = env
        return instance_id

    def do_reset(self, instance_id: str) -> str:
        return str(self.lookup(instance_id).reset().tolist())

    def do_step(self, instance_id: str, action: Any, render: bool = False) -> str:
        env = self.lookup(instance_id)
        try:
            obs, reward, done, info = env.step(action)
        except Exception as error:
            raise Refusal(f"Action `{action}` is wrong") from error
        return json.dumps((obs.tolist(), reward, done, info))

    def do_observation_space(self, instance_id: str) -> str:
        return self.lookup(instance_id).space_info("observation_space")

    def do_action_space(self, instance_id: str) -> str:
        return self.lookup(instance_id).space_info("action_space")

    def do_action_sample(self, instance_id: str) -> str:
        action = self.lookup(instance_id).env.action_space.sample()
        return str(action.tolist() if isinstance(action, np.ndarray) else action)

    def do_close(self, instance_id: str) -> str:
        self.lookup(instance_id).env.close()
        del self.envs[instance_id]
        return json.dumps(True)

    def answer(self, message: str) -> str | tuple[int, str]:
        """The text to send, or the code and reason to close with; raises where the original did."""
        try:
            data = json.loads(message)
        except ValueError:
            return 1003, f"Message `{message}` is invalid"
        keys = list(data.keys())  # no object: AttributeError, not caught
        if "method" not in keys or "params" not in keys:
            return 1003, f"Message keys {keys} are missing or invalid"
        try:
            return self.public[data["method"]](**data["params"])
        except KeyError:
            return 1007, f"Method `{data['method']}` not found"
        except TypeError:
            return 1007, f"Parameters `{data['params']}` are wrong"
        except Refusal as error:
            return 1007, str(error)
        except Exception as error:
            return 1007, f"Unknonwn error: {error}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            await self.talk(reader, writer)
        writer.close()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        path, key = lines[0].split(" ")[1].partition("?")[0], headers.get("sec-websocket-key")
        if path != "/gym" or key is None:
            status, body = ("200 OK", "Gymie is running...") if path != "/gym" else ("400 Bad Request", "")
            head = f"HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Connection: close\r\n\r\n{body}".encode())
            return await writer.drain()
        accept = base64.b64encode(hashlib.sha1((key + GUID).encode()).digest()).decode()
        head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        writer.write(f"{head}Sec-WebSocket-Accept: {accept}\r\n\r\n".encode())
        message = b""
        while True:
            final, opcode, payload = await read_frame(reader)
            if opcode == CLOSE:
                writer.write(frame(CLOSE, payload))
                return await writer.drain()
            if opcode == PING:
                writer.write(frame(PONG, payload))
            elif opcode in (0, TEXT, BINARY):
                message += payload
                if final:
                    self.received.append(message.decode())
                    message = b""
                    try:
                        answer = self.answer(self.received[-1])
                    except Exception:
                        writer.write(BROKEN)  # inside the websocket stream, as the original did
                        return await writer.drain()
                    if isinstance(answer, tuple):
                        writer.write(frame(CLOSE, struct.pack("!H", answer[0]) + answer[1].encode()))
                        while opcode != CLOSE:
                            _, opcode, _ = await read_frame(reader)
                        return None
                    writer.write(frame(TEXT, answer.encode()))
            await writer.drain()


async def read_frame(reader: asyncio.StreamReader) -> tuple[bool, int, bytes]:
    first, second = await reader.readexactly(2)
    size = second & 127
    if size >= 126:
        size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
    mask = await reader.readexactly(4) if second & 128 else bytes(4)
    payload = await reader.readexactly(size)
    return bool(first & 128), first & 15, bytes(byte ^ mask[i & 3] for i, byte in enumerate(payload))


def frame(opcode: int, payload: bytes) -> bytes:
    """One unmasked frame; close reasons are not cut, as in the original."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 128 | opcode, size) + payload
    return struct.pack(*(("!BBH", 128 | opcode, 126) if size < 65536 else ("!BBQ", 128 | opcode, 127)), size) + payload


@contextmanager
def start_old_gymie() -> Iterator[OldGymie]:
    """Run the server on a free port of 127.0.0.1, in a thread with a loop of its own."""
    gymie, loop = OldGymie(), asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(gymie.serve, "127.0.0.1", 0))
    gymie.port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield gymie
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks))
        loop.run_until_complete(asyncio.sleep(0))  # lets closed transports go
        loop.close()
        for env in gymie.envs.values():
            env.env.close()
