"""What an actor does, wherever it runs: opens environments, holds a copy of the policy, plays rollouts. No channel.

Weights change at one moment only, before a rollout; where environments answer each for itself, when some are to act.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium
import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.lab.actor import Actor
from longrein.lab.assembly import Played, Population
from longrein.lab.channel import Arrays
from longrein.lab.first_ready import FirstReady, since
from longrein.lab.games import Games
from longrein.lab.inference import Asking
from longrein.learn import algorithms
from longrein.learn.algorithms import Policy
from longrein.learn.rollout import Rollout


@dataclass(frozen=True)
class Role:
    """What an actor is to do, whenever it lives."""

    open_world: Callable[..., Any]
    """Opens an environment with that many copies; (copies, True) lets each answer for itself."""
    copies: int
    algorithm: str
    config: Any
    first_ready: int = 0
    """Environments whose answer it waits for before it acts on; 0: it steps all of them together."""


@dataclass(frozen=True)
class Hello:
    """What an actor steps."""

    observation_space: gymnasium.Space[Any]
    action_space: gymnasium.Space[Any]
    num_envs: int

    @classmethod
    def of(cls, envs: Any) -> Hello:
        """What a vector environment is."""
        return cls(envs.single_observation_space, envs.single_action_space, envs.num_envs)


def seeds_of_life(
    index: int, life: int, first: int, copies: int, several: bool, seed_of: Callable[..., int]
) -> tuple[int, int]:
    """Of an actor's environments, copy k with seed + k, and of its choices.

    life: 0 for one that begins with the session or at a cut, whose environments are seeded from `first` on. several:
    whether there are other actors.
    """
    path = [f"actor {index}"] if several else []
    if not life:
        return first + index * copies, seed_of("actor", *path)
    seed = seed_of("environments", f"actor {index}", f"life {life}") // 2
    return seed, seed_of("actor", *path, f"life {life}")


def policy_arrays(policy: Policy) -> Arrays:
    """Weights and buffers of a policy: views, good as long as it lives. Nothing of one that is no module of torch."""
    tensors: dict[str, Tensor] = policy.state_dict() if isinstance(policy, torch.nn.Module) else {}
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def opened(role: Role, key: str) -> Any:
    """A role's environments. key: the setting that asks for such roles. Raises SpecError for a game of several."""
    # Those that are to answer each for itself must be opened so.
    envs = role.open_world(role.copies, True) if role.first_ready else role.open_world(role.copies)
    if isinstance(envs, Games):
        seats = len(envs.seats)
        envs.close()
        raise SpecError(key, f"goes with one agent alone in its environment, and this is a game of {seats} seats",
                        hint="topology: serial")  # fmt: skip
    return envs


def all_alike(hellos: Sequence[Hello | None], role: str) -> Hello:
    """What all of them step. role: as it is told, "actor". Raises SpecError where they do not step the same."""
    first = hellos[0]
    assert first is not None
    for index, hello in enumerate(hellos):
        if hello != first:
            raise SpecError("env", f"{role} 0 steps {first}, and {role} {index} {hello}",
                            hint="all must step the same environment")  # fmt: skip
    return first


def generator_of(draws: int | bytes) -> torch.Generator:
    """A generator, from its seed or from its state."""
    generator = torch.Generator()
    if isinstance(draws, int):
        return generator.manual_seed(draws)
    return generator.set_state(torch.frombuffer(bytearray(draws), dtype=torch.uint8))


def fill(rollout: Rollout, actor: Actor, cut: int | None) -> None:
    """Act a whole rollout out.

    cut: seed of the environments' reset after it; they go on as they are where it is None.
    """
    for left in range(rollout.length - 1, -1, -1):
        rollout.add(actor.step(cut is not None and left == 0))
    if cut is not None:
        actor.begin(actor.envs.reset(seed=cut)[0])


class ActingRole:
    """One life of an actor: `begin`, then `play` as often as there is room for a rollout, then `close`.

    Opens the environments. Raises SpecError, LinkError, and whatever their maker raises.
    """

    def __init__(self, role: Role) -> None:
        self._envs = opened(role, "meta.topology.actors")
        self.hello = Hello.of(self._envs)
        self._role = role
        self._restarts = 0  # environments lost and replaced, at the end of the last rollout
        self._env_steps = 0
        self._population: Population | None = None

    def begin(
        self,
        seed: int,
        draws: int | bytes,
        newest: Callable[[Arrays], int],
        asking: Callable[[Policy], Asking] | None = None,
    ) -> None:
        """Make the policy, and reset the environments, copy k with seed + k.

        draws: the seed of the policy's choices, or the state of their generator. newest: puts the newest weights into
        the policy's arrays, where they are not there yet, and says their version. asking: from the policy to one that
        asks another process; the weights of ours are of no use then, and `newest` is not called.
        """
        _, build = algorithms.load(self._role.algorithm)
        algorithm = build(self._role.config, self.hello.observation_space, self.hello.action_space, 0)
        arrays = policy_arrays(algorithm.policy)
        self._asking = None if asking is None else asking(algorithm.policy)
        if self._asking is None:
            newest(arrays)
        self._generator = generator_of(draws)
        self._rollout = Rollout(algorithm.rollout_steps)
        self._ready: FirstReady | None = None
        self._newest: Callable[[], int] = partial(newest, arrays)
        if self._role.first_ready:
            self._ready = FirstReady(
                self._envs, algorithm.policy, least=self._role.first_ready, length=algorithm.rollout_steps,
                newest=self._newest, generator=self._generator,
            )  # fmt: skip
            self._actor = self._ready.actor
            self._ready.begin(self._envs.reset(seed=seed)[0])
            self._population = self._ready.population()
        else:
            policy = algorithm.policy if self._asking is None else self._asking
            self._actor = Actor(self._envs, policy, seed=None, generator=self._generator)
            self._actor.begin(self._envs.reset(seed=seed)[0])

    def play(self, columns: Arrays, cut: int | None, waited: float) -> Played:
        """Fill `columns` [T, B, ...] with the next rollout; without arrays they get them, good until the next call.

        cut: seed of the environments' reset after it; they go on as they are where it is None. waited: seconds before.
        """
        begun = time.monotonic()
        version = self._fill(columns, cut) if self._ready is None else self._ready.fill(columns)
        acting = time.monotonic() - begun
        finished = (self._actor if self._ready is None else self._ready).finished()
        episodes = tuple(since(self._env_steps, episode) for episode in finished)
        state = None if cut is None else self._generator.get_state().numpy().tobytes()
        lost, self._restarts = self._actor.restarts - self._restarts, self._actor.restarts
        self._env_steps = self._actor.env_steps
        return Played(version, episodes, lost, acting, waited, state, self._came_and_went())

    def close(self) -> None:
        """Close the environments."""
        self._envs.close()

    def _fill(self, columns: Arrays, cut: int | None) -> int:
        """With environments that are stepped together; the version that acted."""
        if columns:
            self._rollout.use(columns)
        version = self._newest() if self._asking is None else 0
        fill(self._rollout, self._actor, cut)
        self._rollout.take()
        columns |= self._rollout.columns
        return version if self._asking is None else self._asking.rest()

    def _came_and_went(self) -> Population | None:
        """Since the last rollout."""
        had, has = self._population, None if self._ready is None else self._ready.population()
        self._population = has
        return has and had and Population(has.live, has.joined - had.joined, has.left - had.left)
