"""One Unity player of ML-Agents 0.2: how it is found, started, spoken to and ended. Knows no space and no lease."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longrein.errors import ConnectError, RoleDied, RunError, SpecError

FOLDERS = "LONGREIN_UNITY_PLAYERS"
"""Environment variable: folders with players, separated by colons."""
HOME = Path("~/.cache/longrein/unity")
"""Where `longrein install` puts players and their interpreter, and where players are looked for without FOLDERS."""
ANSWER_SECONDS = 60.0
"""How long a player that has started may take for one answer."""
_PAGE = "docs/environments/unity.md"


def found_players() -> dict[str, Path]:
    """The players on this machine, by name: the lower-case stem of NAME.x86_64."""
    folders = os.environ.get(FOLDERS) or str(HOME)
    files = [f for folder in folders.split(":") if folder for f in sorted(Path(folder).expanduser().rglob("*.x86_64"))]
    return {file.stem.lower(): file for file in reversed(files)}  # the first folder wins


def player_file(name: str) -> Path:
    """The file of a player, by its name or its path. Raises SpecError."""
    file = found_players().get(name.lower(), Path(name).expanduser())
    if not file.is_file():
        known = ", ".join(sorted(found_players())) or "none"
        hint = f"longrein install unity:3dball; or give the path of a NAME.x86_64: see {_PAGE}"
        raise SpecError("env", f"no Unity player {name!r}; found: {known}", hint=hint)
    if not os.access(file, os.X_OK):
        raise SpecError("env", f"{file} is not executable", hint=f"chmod +x {file}")
    return file.resolve()


class Player:
    """One running player. `reset` and `step` raise RunError from when it has died or was silent for ANSWER_SECONDS."""

    def __init__(self, file: Path | None, name: str, port: int, train_mode: bool, startup_seconds: float) -> None:
        module = _unityagents()
        self.name = name
        self.train_mode = train_mode
        self.pending: dict[str, float] = {}  # parameters for the next reset
        self.behaviours: dict[str, dict[str, Any]] = {}
        self.infos: dict[str, Any] = {}  # what each behaviour shows: states, rewards, ...
        self._agents: dict[str, list[int]] = {}
        self._failure: RunError | None = None
        folder = tempfile.mkdtemp(prefix="longrein-unity-")
        held: list[Any] = []  # the process, then the line: what is to be ended
        self._end = weakref.finalize(self, _end, held, folder)
        try:
            with _listen(port) as listener:
                process = None if file is None else _start(file, listener.getsockname()[1], folder)
                held.append(process)
                line = _accept(listener, process, name, folder, startup_seconds)
            held.append(line)
            try:
                self._engine = _engine(module, line, _greeting(line))
                self.reset()
            except RunError as error:
                raise ConnectError(f"the player {name} connected, and no more: {error}") from None
            line.connection.settimeout(ANSWER_SECONDS)
            self.log_path: str = self._engine._log_path if file is None else str(Path(folder) / "player.log")
            for brain in self._engine._external_brain_names:
                self._agents[brain] = list(self.infos[brain].agents)
                self.behaviours[brain] = _facts(self._engine.brains[brain], len(self._agents[brain]))
        except BaseException:
            self.close()
            raise

    @property
    def parameters(self) -> dict[str, float]:
        return dict(self._engine._resetParameters)

    @property
    def over(self) -> bool:
        """The scene's own limit was reached: a reset must follow."""
        return bool(self._engine.global_done)

    def reset(self) -> None:
        pending, self.pending = self.pending, {}
        self._ask(self._engine.reset, train_mode=self.train_mode, config=pending)

    def step(self, actions: dict[str, NDArray[Any]]) -> None:
        """Step the scene; behaviours without an action there get zeros, for the protocol has no `nothing`."""
        self._ask(self._engine.step, {brain: actions.get(brain, self.idle(brain)) for brain in self.behaviours})

    def idle(self, brain: str) -> NDArray[np.float64]:
        facts = self.behaviours[brain]
        return np.zeros(facts["agents"] if facts["action_type"] == "discrete" else (facts["agents"], facts["actions"]))

    def states(self, brain: str) -> NDArray[np.float32]:
        return np.asarray(self.infos[brain].states, np.float32)  # [agents, state size]

    def _ask(self, request: Callable[..., Any], *args: Any, **options: Any) -> None:
        if self._failure is not None:
            raise self._failure
        try:
            self.infos = request(*args, **options)
            for brain, ids in self._agents.items():
                if self.infos[brain].agents != ids:
                    raise RunError(f"the agents of {brain} changed from {ids} to {self.infos[brain].agents}",
                                   hint="only scenes whose agents stay can be served")  # fmt: skip
        except RunError as error:
            self._failure = error
            raise

    def close(self) -> None:
        self._end()


class _Line:
    """The socket as `unityagents` sees it, which by itself would turn for ever at the end of a line."""

    def __init__(self, connection: socket.socket, process: subprocess.Popen[bytes] | None, name: str, folder: str):
        self.connection, self._process, self._name, self._folder = connection, process, name, folder
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def recv(self, size: int) -> bytes:
        try:
            data = self.connection.recv(size)
        except TimeoutError:
            raise RunError(
                f"the player {self._name} said nothing for {self.connection.gettimeout():.0f} seconds"
            ) from None
        except OSError:
            data = b""
        if not data:
            raise self._died()
        return data

    def send(self, data: bytes) -> None:
        try:
            self.connection.sendall(data)
        except OSError:
            raise self._died() from None

    def _died(self) -> RunError:
        if self._process is None:
            return RunError(f"the player {self._name} closed the line")
        try:
            code = self._process.wait(2.0)  # the line ends a moment before the process
        except subprocess.TimeoutExpired:
            code = None
        return RoleDied(f"the player {self._name}", code, hint=_last_words(self._folder))


def _unityagents() -> Any:
    hint = f"it needs an interpreter of its own: longrein install unity:3dball; see {_PAGE}"
    root, known = logging.getLogger(), logging.getLogger().handlers[:]
    level = root.level
    try:
        module = importlib.import_module("unityagents")
    except ImportError as error:
        raise SpecError("env", f"unityagents cannot be imported: {error}", hint=hint) from None
    finally:
        root.handlers[:] = known  # importing it sets up the whole process's logging
        root.setLevel(level)
    logging.getLogger("unityagents").setLevel(logging.WARNING)
    if not hasattr(np, "float_"):
        raise SpecError("env", f"unityagents cannot use numpy {np.__version__}", hint=hint)
    return module


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        listener.close()
        problem = f"port {port} cannot be had: {error}"
        raise SpecError("base_port", problem, hint="base_port=0 takes a free one") from None
    listener.listen(1)
    return listener


def _start(file: Path, port: int, folder: str) -> subprocess.Popen[bytes]:
    log = Path(folder) / "player.log"
    command = [str(file), "--port", str(port), "-batchmode", "-nographics", "-logFile", str(log)]
    with open(Path(folder) / "output.log", "wb") as output:  # what it says before it has a log
        try:
            return subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:
            problem = f"{file} cannot be run: {error}"
            raise SpecError("env", problem, hint="it must be built for Linux, x86_64") from None


def _accept(
    listener: socket.socket, process: subprocess.Popen[bytes] | None, name: str, folder: str, seconds: float
) -> _Line:
    url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    listener.settimeout(0.1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            connection = listener.accept()[0]
        except TimeoutError:
            pass
        else:
            connection.settimeout(max(deadline - time.monotonic(), 1.0))
            return _Line(connection, process, name, folder)
        if process is not None and process.poll() is not None:
            problem = f"the player {name} ended with exit code {process.returncode} before it connected"
            raise ConnectError(problem, url=url, hint=_last_words(folder))
    problem = f"no player connected within {seconds:g} seconds"
    raise ConnectError(problem, url=url, hint=_last_words(folder) or "was it started with --port, and this port?")


def _greeting(line: _Line) -> dict[str, Any]:
    data = b""
    while True:
        data += line.recv(65536)
        try:
            found: dict[str, Any] = json.loads(data)
        except ValueError:
            if data.startswith(b"PRI * HTTP/2"):
                raise ConnectError("this player speaks the protocol of ML-Agents 0.4 and later (gRPC)",
                                   hint=f"only that of 0.2 is spoken here: see {_PAGE}") from None  # fmt: skip
            continue
        if found.get("apiNumber") != "API-2":
            raise ConnectError(f"the player speaks {found.get('apiNumber', 'API-1')}, unityagents 0.2.0 speaks API-2")
        return found


def _engine(module: Any, line: _Line, greeting: dict[str, Any]) -> Any:
    """A UnityEnvironment around the line. Its own __init__ would start the player, and can neither wait nor watch."""
    engine = module.UnityEnvironment.__new__(module.UnityEnvironment)
    brains = zip(greeting["brainNames"], greeting["brainParameters"], strict=True)
    parameters = greeting["resetParameters"]
    engine.__dict__.update(
        _conn=line,
        _buffer_size=65536,
        _loaded=True,
        _global_done=None,
        _data={},
        _log_path=greeting["logPath"],
        _brains={name: module.brain.BrainParameters(name, facts) for name, facts in brains},
        _num_brains=len(greeting["brainNames"]),
        _external_brain_names=greeting["externalBrainNames"] or [],
        _num_external_brains=len(greeting["externalBrainNames"] or []),
        _resetParameters=parameters,
        _curriculum=module.curriculum.Curriculum(None, parameters),
    )
    return engine


def _end(held: list[Any], folder: str) -> None:
    """End the player: ask, then kill. A player whose line ends goes by itself, so none outlives a killed server."""
    process, line = (*held, None, None)[:2]
    if line is not None:
        try:
            line.connection.sendall(b"EXIT")
        except OSError:
            pass  # it has gone already
        line.connection.close()
    if process is not None:
        try:
            process.wait(5.0 if line is not None else 0.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    shutil.rmtree(folder, ignore_errors=True)


def _last_words(folder: str) -> str:
    texts = [Path(folder) / name for name in ("output.log", "player.log")]
    lines = [line for text in texts if text.exists() for line in text.read_text(errors="replace").splitlines() if line]
    return "its last words: " + " | ".join(lines[-5:]) if lines else ""


def _facts(brain: Any, agents: int) -> dict[str, Any]:
    return {
        "agents": agents,
        "state_size": int(brain.state_space_size),
        "state_type": str(brain.state_space_type),
        "cameras": [[c["height"], c["width"], 1 if c["blackAndWhite"] else 3] for c in brain.camera_resolutions],
        "action_type": str(brain.action_space_type),
        "actions": int(brain.action_space_size),
        "memory_size": int(brain.memory_space_size),
    }
