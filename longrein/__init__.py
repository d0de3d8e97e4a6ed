"""longrein: reinforcement learning on environments that live elsewhere. What a newcomer types stands here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from longrein.errors import Error as Error
    from longrein.front import make_evaluator as make_evaluator
    from longrein.front import make_trainer as make_trainer
    from longrein.front import run as run
    from longrein.lab.saved_policy import load_policy as load_policy
    from longrein.link.adapters.system import System as System
    from longrein.link.client import LinkOptions as LinkOptions
    from longrein.link.env import RemoteEnv as RemoteEnv
    from longrein.link.env import connect as connect
    from longrein.link.multiagent import RemoteAECEnv as RemoteAECEnv
    from longrein.link.multiagent import RemoteParallelEnv as RemoteParallelEnv
    from longrein.link.multiagent import connect_aec as connect_aec
    from longrein.link.multiagent import connect_parallel as connect_parallel
    from longrein.link.policy import RemotePolicy as RemotePolicy
    from longrein.link.policy import connect_policy as connect_policy
    from longrein.link.server import Limits as Limits
    from longrein.link.server import Server as Server
    from longrein.link.server import dial as dial
    from longrein.link.server import serve as serve
    from longrein.link.vector import RemoteVectorEnv as RemoteVectorEnv
    from longrein.link.vectors import connect_vec as connect_vec

__version__ = "0.1.0"

_HOMES = {
    "Error": "longrein.errors",
    "Limits": "longrein.link.server",
    "LinkOptions": "longrein.link.client",
    "RemoteAECEnv": "longrein.link.multiagent",
    "RemoteEnv": "longrein.link.env",
    "RemoteParallelEnv": "longrein.link.multiagent",
    "RemotePolicy": "longrein.link.policy",
    "RemoteVectorEnv": "longrein.link.vector",
    "Server": "longrein.link.server",
    "System": "longrein.link.adapters.system",
    "connect": "longrein.link.env",
    "connect_aec": "longrein.link.multiagent",
    "connect_parallel": "longrein.link.multiagent",
    "connect_policy": "longrein.link.policy",
    "connect_vec": "longrein.link.vectors",
    "dial": "longrein.link.server",
    "load_policy": "longrein.lab.saved_policy",
    "make_evaluator": "longrein.front",
    "make_trainer": "longrein.front",
    "run": "longrein.front",
    "serve": "longrein.link.server",
}
"""Where each public name lives. They are imported when first used, so that a client loads no server and no torch."""

__all__ = [*_HOMES, "__version__"]


if "longrein/Remote-v0" not in gymnasium.registry:
    gymnasium.register(
        "longrein/Remote-v0", "longrein.link.env:RemoteEnv", nondeterministic=True, order_enforce=False,
        disable_env_checker=True,
    )  # fmt: skip

if "nats-v0" not in gymnasium.registry:  # gymnasium.make("longrein:nats-v0"), where gym-nats had "gym_nats:nats-v0"
    gymnasium.register(
        "nats-v0", "longrein.link.dialects.gym_nats:NatsEnv", nondeterministic=True, order_enforce=False,
        disable_env_checker=True,
    )  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longrein' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if not _HOMES[name].startswith(("longrein.front", "longrein.lab")) or (error.name or "").startswith("longrein"):
            raise
        from longrein.errors import SpecError

        hint = "pip install 'longrein[lab]'"
        raise SpecError(name, f"needs the package {error.name!r}", hint=hint) from None


def __dir__() -> list[str]:
    return sorted(__all__)
