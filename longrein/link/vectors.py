"""Which vector environment far environments need: the link's own, one that comes and goes, or a dialect's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium.vector import VectorEnv

from longrein.errors import SpecError
from longrein.link.dialects import dialect_of
from longrein.link.vector import RemoteVectorEnv


def connect_vec(
    url: str | Sequence[str], num_envs: int | None = None, *, elastic: bool = False, **options: Any
) -> VectorEnv[Any, Any, Any]:
    """Far environments as a `gymnasium.vector.VectorEnv`.

    url: as for `connect`, or a list of such, over which the environments are spread.
    num_envs: how many; without it one for each URL. envs_per_lease: how many go together in one message (default: all
    of a URL); 1 lets each answer for itself in `recv`. autoreset: "next_step" (Gymnasium's default), "same_step" or
    "disabled". on_loss: "raise" or "restart". elastic: True opens those that are there, and lets them come and go.
    Further options: those of `LinkOptions`; all others go to the environments' maker.
    """
    urls = [url] if isinstance(url, str) else list(url)
    if not urls:
        raise SpecError("url", "no URL was given")
    dialect = dialect_of(urls[0])
    if elastic:
        if dialect is not None:
            raise SpecError("elastic", f"what is served at {urls[0]} cannot come and go", hint="leave it out")
        from longrein.link.elastic import ElasticVectorEnv

        return ElasticVectorEnv(urls, num_envs if num_envs is not None else len(urls), **options)
    if dialect is not None:
        from longrein.link.dialects.vector import connect_vec as connect_dialect_vec

        return connect_dialect_vec(dialect, urls, num_envs, **options)
    return RemoteVectorEnv(urls, num_envs if num_envs is not None else len(urls), **options)
