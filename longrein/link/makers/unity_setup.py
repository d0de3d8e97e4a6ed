"""Installs Unity players, and the interpreter in which they are served. It knows registries and pip, no protocol.

The players' Python end, unityagents 0.2.0, asks for packages that no Python of today has, and does not run with
NumPy 2: so it lives in a virtual environment of its own, beside the players, with longrein in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rich.progress import wrap_file

from longrein.errors import ConnectError, SpecError
from longrein.link.makers.unity_player import HOME

PLAYERS = {
    "3dball": "0c12228b00eaa603389b3ab1dae2bf6c768c13504ea348d3918ffcdfae51ed32",
    "gridworld": "2fd6871e42827af6ca8ebe990495b2d4745883017588cdf0071f9edf156fd6ed",
    "tennis": "51cce54badc5a4ee7cf1eb1bc0475c30f49244a62e26e962b77bd401c9acce6f",
}
"""Players that the npm registry has (packages slm-env-NAME 2.0.0, 75 to 80 MB), with the SHA-256 of each package."""

PINS = ("numpy==1.26.4", "pillow")
UNITYAGENTS = "unityagents==0.2.0"
MOVED = "LONGREIN_IN_UNITY"  # set in the process that was moved, so that it is not moved twice


def interpreter() -> Path:
    """The Python of the players' virtual environment, whether it is there or not."""
    return HOME.expanduser() / "venv" / "bin" / "python"


def install(player: str) -> Path:
    """Install the interpreter and one player, where they are missing; the player's file.

    Raises SpecError for a player that no registry has, ConnectError where it cannot be fetched.
    """
    if player not in PLAYERS:
        raise SpecError("player", f"no registry has a player {player!r}", hint=f"there are {', '.join(PLAYERS)}")
    _make_interpreter()
    folder = HOME.expanduser() / player
    if not folder.exists():
        _fetch(player, folder)
    (file,) = folder.rglob("*.x86_64")
    return file


def _make_interpreter() -> None:
    folder, ours = interpreter().parents[1], _longrein()
    stamp = folder / ".made"
    if stamp.exists() and stamp.read_text() == " ".join(ours):
        return
    python = _python()
    print(f"making {folder} by {python}", flush=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [str(interpreter()), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    for words in ([*PINS], ["--no-deps", UNITYAGENTS], [*ours, *PINS]):
        if subprocess.run([*pip, *words]).returncode:
            raise ConnectError(f"pip could not install {' '.join(words)}", hint="its words stand above")
    stamp.write_text(" ".join(ours))


def _python() -> str:
    """A Python for which NumPy 1.26 has wheels, this one if it will do."""
    if sys.version_info[:2] in ((3, 11), (3, 12)):
        return sys.executable
    for name in ("python3.11", "python3.12"):
        found = shutil.which(name)
        if found:
            return found
    raise SpecError("python", "unityagents needs NumPy 1.26, which Python 3.13 has not", hint="install Python 3.12")


def _longrein() -> list[str]:
    """The words with which pip installs the longrein that runs here: its folder, where it came from one."""
    distribution = importlib.metadata.distribution("longrein")
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    if "dir_info" in origin:
        folder = unquote(urlsplit(origin["url"]).path)
        return ["-e", folder] if origin["dir_info"].get("editable") else [folder]
    return [f"longrein=={distribution.version}"]


def _fetch(player: str, folder: Path) -> None:
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/slm-env-{player}/-/slm-env-{player}-2.0.0.tgz"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        package = Path(place) / "package.tgz"
        try:
            with urllib.request.urlopen(url, timeout=60) as answer, package.open("wb") as file:
                size = int(answer.headers.get("Content-Length", 0))
                with wrap_file(answer, size, description=f"slm-env-{player}") as shown:
                    shutil.copyfileobj(shown, file)
        except (urllib.error.URLError, TimeoutError) as error:
            raise ConnectError(
                f"the player cannot be fetched: {error}", url=url, hint="is the registry in reach?"
            ) from None
        found = hashlib.sha256(package.read_bytes()).hexdigest()
        if found != PLAYERS[player]:
            raise ConnectError(f"the package's SHA-256 is {found}, not {PLAYERS[player]}", url=url)
        with tarfile.open(package) as archive:
            archive.extractall(Path(place) / "player", filter="data")
        for binary in (Path(place) / "player").rglob("*.x86_64"):
            binary.chmod(0o755)
        (Path(place) / "player").rename(folder)  # whole, or not at all


def move(things: Sequence[str]) -> None:
    """Go on in the players' interpreter where a Unity player is to be served and this one cannot; else return.

    The process is replaced, so that whoever started it still holds it. Nothing happens where nothing is installed: the
    maker then says what to do.
    """
    wanted = any(thing.startswith("unity:") for thing in things)
    if not wanted or importlib.util.find_spec("unityagents") is not None or MOVED in os.environ:
        return
    python = interpreter()
    if python.exists():
        os.execve(python, [str(python), "-m", "longrein.cli", *sys.argv[1:]], {**os.environ, MOVED: "1"})
