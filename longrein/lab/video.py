"""Episodes as video files: the pictures of one environment, kept while it is played. Knows no policy and no run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from numpy.typing import NDArray

from longrein.errors import RunError, SpecError


class Filmed(VectorWrapper):
    """A vector environment, whose first copy is filmed from one reset to the end of the episode.

    It must have been made with render_mode="rgb_array". Raises RunError on the first reset when it gives no pictures,
    SpecError when what writes videos is not installed.
    """

    def __init__(self, envs: VectorEnv[Any, Any, Any]) -> None:
        super().__init__(envs)
        self.frames: list[NDArray[np.uint8]] = []
        _writer()  # said now, rather than after an episode

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        found: tuple[Any, dict[str, Any]] = super().reset(seed=seed, options=options)
        self.frames = [self._frame()]
        return found

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        found: tuple[Any, Any, Any, Any, dict[str, Any]] = super().step(actions)
        if not (found[2][0] or found[3][0]):  # after an end, the picture is of the next episode
            self.frames.append(self._frame())
        return found

    def save(self, path: Path) -> Path:
        """Write what was filmed since the last reset as an MP4 file. Raises RunError."""
        beside = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # H.264 wants even sides; 2 rounds up to them, where imageio's own 16 would scale most pictures.
            _writer().mimwrite(beside, self.frames, fps=self.metadata.get("render_fps") or 30, macro_block_size=2)
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise RunError(f"{path} cannot be written: {error}", hint="give another folder to --record") from error
        return path

    def _frame(self) -> NDArray[np.uint8]:
        pictures = self.env.render()
        picture = None if pictures is None else np.asarray(pictures[0])
        if picture is None or picture.ndim != 3 or picture.dtype != np.uint8:
            raise RunError("the environment gives no pictures", hint='it must support render_mode="rgb_array"')
        return picture


def _writer() -> Any:
    """The module that writes videos. Raises SpecError where it, or its ffmpeg, is not installed."""
    try:
        import imageio.v2
        import imageio_ffmpeg  # noqa: F401  # what imageio writes MP4 with
    except ModuleNotFoundError as error:
        raise SpecError(
            "record", f"videos need the package {error.name!r}", hint="pip install 'longrein[video]'"
        ) from None
    return imageio.v2
