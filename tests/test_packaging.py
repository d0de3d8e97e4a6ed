"""What the package promises to whoever installs it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import longrein

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_link_needs_no_torch() -> None:
    code = (
        "import sys, longrein, longrein.cli\n"
        "for name in longrein.__all__:\n"
        "    lab = longrein._HOMES.get(name, '').startswith(('longrein.front', 'longrein.lab'))\n"
        "    petting = 'AEC' in name or 'aec' in name or 'arallel' in name\n"
        "    if not lab and not petting: getattr(longrein, name)\n"
        "import longrein.link.transports.websocket, longrein.link.transports.http\n"
        "loaded = {'torch', 'pettingzoo', 'matplotlib', 'nats', 'tensorboard'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_versions_agree() -> None:
    changelog = re.search(r"## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text())
    assert changelog is not None
    assert PROJECT["version"] == longrein.__version__ == changelog[1]


def test_every_extra_that_the_pages_name_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for names in re.findall(r"longrein\[([\w,]+)\]", page.read_text()):
            assert set(names.split(",")) <= set(PROJECT["optional-dependencies"]), page


def test_every_public_name_can_be_had() -> None:
    assert all(getattr(longrein, name) is not None for name in longrein.__all__)
    assert set(longrein.__all__) <= set(dir(longrein))
