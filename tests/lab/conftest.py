"""What the tests of sessions in several processes ask for by name."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from longrein.lab.channel import PREFIX


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are not what is looked at, and drawing one takes longer than training does."""
    monkeypatch.setattr("longrein.lab.plots.draw_session", lambda *_, **__: None)


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """No shared memory of ours or torch's, and no process, is left when the test has ended."""
    yield
    for pattern in (f"{PREFIX}-{os.getpid()}-*", f"torch_{os.getpid()}_*"):
        assert [path.name for path in Path("/dev/shm").glob(pattern)] == []
    assert multiprocessing.active_children() == []
