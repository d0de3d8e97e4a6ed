"""Checkpoints: written beside and renamed, read as plain data only. Knows no algorithm."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch

from longrein.errors import CheckpointError

FORMAT = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint of tensors and plain values; whoever reads meanwhile sees the old one, whole.

    Raises CheckpointError when it cannot be written.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError where a file object of its own failed
        beside.unlink(missing_ok=True)
        hint = "the checkpoint before it is whole; make room, then longrein run --resume RUN"
        raise CheckpointError(str(path), f"cannot be written: {error}", hint=hint) from error


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote. Never runs code from the file.

    Raises CheckpointError when it cannot be read, is damaged, or is of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "there is no such file", hint="give the run's session folder") from error
    except (OSError, RuntimeError, EOFError, BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(str(path), f"cannot be read: {error}", hint="it may be damaged") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(str(path), f"expected format {FORMAT}, found {found}", hint="another version wrote it")
    return state
