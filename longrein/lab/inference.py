"""Central inference: what actors ask and get, where it lies, what is answered together. Starts nothing, rings no bell.

1. A request is an actor's encoded observations, and the state of its rows where the policy remembers. It has a number,
   and stands in shared memory until the next one: whoever answers may die, and another answers it again.
2. A batch counts once it is committed, by one write after all others: answers, versions, and the state of the generator
   that chose. What was written of a batch before does not count, and is done again to the bit.
3. A batch waits for every actor that acts: that is on its way through a rollout. Who waits for room for its next
   rollout does not act, and nobody waits for it. The crew says who acts before it gives room, so that actors that are
   let go together are waited for together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium.vector.utils import concatenate, create_empty_array
from numpy.typing import NDArray

from longrein.errors import RunError
from longrein.lab.actor import act
from longrein.lab.channel import Arrays, Field, Form, Segment, form_of, size_of
from longrein.learn.algorithms import Policy, initial_state
from longrein.learn.batch import EXTRAS
from longrein.learn.columns import extras_in

BINS = (1, 4, 16, 64, 256)
"""Where the bins of the histogram of batch sizes begin, in rows; a bin ends where the next begins."""

DRAWS = torch.Generator().get_state().numel()
"""Bytes of a generator's state."""

COUNTS = ("batches", "rows", "requests", "waited", "computing")
"""What is counted over all batches; the last two in seconds."""


@dataclass(frozen=True)
class Batching:
    """When requests are answered."""

    rows: int
    """Of one request: the environments of one actor."""
    most: int
    """Rows of a batch, at which it waits for no more; a request is answered whole, however many it has."""
    patience: float | None
    """Seconds that the oldest request waits for others at most; None: until all who act have asked."""

    def left(self, since: Sequence[float], acting: int, now: float) -> float | None:
        """Seconds until a batch is due, if nobody asks before that: 0 where it is, None where nothing says when.

        since: when each of the waiting requests was made. acting: how many actors are acting. now: on the same clock.
        """
        if not since:
            return None
        if len(since) >= acting or len(since) >= self.requests:
            return 0.0
        return None if self.patience is None else max(min(since) + self.patience - now, 0.0)

    @property
    def requests(self) -> int:
        """Of a batch, at most."""
        return max(self.most // self.rows, 1)

    def chosen(self, actors: Sequence[int], since: Sequence[float]) -> list[int]:
        """Those of the waiting actors that are answered next: who has waited longest, in the actors' order."""
        oldest = sorted(zip(since, actors, strict=True))[: self.requests]
        return sorted(actor for _, actor in oldest)


def forms(policy: Policy, space: gymnasium.Space[Any], rows: int) -> tuple[Form, Form]:
    """What a request of so many rows, and its answer, are made of. The policy acts for it, and is of no use afterwards.

    space: of one environment's observations.
    """
    space = deepcopy(space)  # its own draws stay as they are
    space.seed(0)
    samples = [space.sample() for _ in range(rows)]
    observation = policy.encode(concatenate(space, samples, create_empty_array(space, rows)))
    state = initial_state(policy, rows)
    action, extras = act(policy, observation, state, generator=torch.Generator())
    return form_of(request(observation, state)), form_of(answer(action, extras))


def request(observation: NDArray[Any], state: NDArray[np.float32] | None) -> Arrays:
    """The arrays of a request."""
    return {"observation": observation} | ({} if state is None else {"state": state})


def answer(action: NDArray[Any], extras: Mapping[str, NDArray[Any]]) -> Arrays:
    """The arrays of an answer."""
    return {"action": action} | {EXTRAS + name: array for name, array in extras.items()}


class Desk:
    """Shared memory where all actors' requests and answers lie. Without a name it is made here.

    asks, answers: forms of one actor's request, and of its answer.
    """

    def __init__(self, actors: int, asks: Form, answers: Form, name: str | None = None) -> None:
        self.actors = actors
        self.asks = asks
        self.answers = answers
        head = (
            Field("asked", (actors,), "<i8"),  # number of each actor's last request
            Field("since", (actors,), "<f8"),  # when it was made, by time.monotonic, which processes have in common
            Field("acting", (actors,), "|b1"),
            Field("answered", (actors,), "<i8"),  # number of the request that was answered last
            Field("batch", (actors,), "<i8"),  # the batch it was answered in
            Field("version", (actors,), "<i8"),  # of the weights that answered
            Field("committed", (), "<i8"),  # the last batch that counts
            Field("draws", (2, DRAWS), "|u1"),  # the generator's state after each batch, by turns
            Field("counts", (2, len(COUNTS) + len(BINS)), "<f8"),  # after each batch, by turns
            Field("closed", (), "|b1"),
        )
        one = size_of(asks) + size_of(answers)
        self._segment = Segment(size_of(head) + actors * one, name)
        self.name = self._segment.name
        self._head = self._segment.arrays(head)
        starts = [size_of(head) + actor * one for actor in range(actors)]
        self._asks = [self._segment.arrays(asks, start) for start in starts]
        self._answers = [self._segment.arrays(answers, start + size_of(asks)) for start in starts]

    @property
    def closed(self) -> bool:
        """Whether all is over."""
        return bool(self._head["closed"])

    def shut(self) -> None:
        """All is over, for everybody."""
        self._head["closed"][...] = True

    @property
    def batches(self) -> int:
        """How many count."""
        return int(self._head["committed"])

    @property
    def acting(self) -> NDArray[np.bool_]:
        """Who acts: [actors], to be written to."""
        return self._head["acting"]

    @property
    def draws(self) -> bytes:
        """State of the generator after the last batch; whoever reads it knows that no batch is under way."""
        state: bytes = self._head["draws"][self.batches % 2].tobytes()
        return state

    def begin(self, draws: bytes) -> None:
        """Let the first batch be chosen with a generator in this state."""
        self._head["draws"][self.batches % 2] = np.frombuffer(draws, np.uint8)

    # -------------------------------------------------------------------------------------------------------- the actor

    def ask(self, actor: int, arrays: Arrays) -> None:
        """Make a request. Raises RunError when it does not look as all others do."""
        _fill(self._asks[actor], arrays, "an actor's request")
        self._head["since"][actor] = time.monotonic()
        self._head["acting"][actor] = True
        self._head["asked"][actor] += 1

    def answered(self, actor: int) -> bool:
        """Whether the last request was answered."""
        head = self._head
        return bool(head["answered"][actor] == head["asked"][actor] and head["batch"][actor] <= head["committed"])

    def answer_to(self, actor: int) -> tuple[Arrays, int]:
        """The last request's answer, good until the next request, and the version of the weights that gave it."""
        return self._answers[actor], int(self._head["version"][actor])

    # ----------------------------------------------------------------------------------------------------- who answers

    def waiting(self) -> list[int]:
        """Actors that act and have no answer, in order."""
        return [actor for actor in np.flatnonzero(self.acting).tolist() if not self.answered(actor)]

    def since(self, actors: Sequence[int]) -> list[float]:
        """When each of them asked."""
        since: list[float] = self._head["since"][list(actors)].tolist()
        return since

    def answer(self, actors: Sequence[int], policy: Policy, version: int, generator: torch.Generator) -> None:
        """Answer some actors' requests in one batch, in their order, and commit it. version: of the policy's weights.

        generator: of its choices, in the state of `draws`; it is put into the state after the batch.
        """
        head, begun, number = self._head, time.monotonic(), self.batches + 1
        numbers = head["asked"][list(actors)]
        together = {one.name: np.concatenate([self._asks[actor][one.name] for actor in actors]) for one in self.asks}
        action, extras = act(policy, together["observation"], together.get("state"), generator=generator)
        arrays = answer(action, extras)
        rows = len(action) // len(actors)
        for index, actor in enumerate(actors):
            part = slice(index * rows, (index + 1) * rows)
            _fill(self._answers[actor], {name: array[part] for name, array in arrays.items()}, "the policy's answer")
        head["version"][list(actors)] = version
        head["batch"][list(actors)] = number
        head["answered"][list(actors)] = numbers
        head["draws"][number % 2] = generator.get_state().numpy()
        waited = sum(begun - since for since in self.since(actors))
        sizes = [0] * len(BINS)
        sizes[int(np.searchsorted(BINS, len(action), "right")) - 1] = 1
        new = (1, len(action), len(actors), waited, time.monotonic() - begun, *sizes)
        head["counts"][number % 2] = head["counts"][(number - 1) % 2] + new
        head["committed"][...] = number

    # ------------------------------------------------------------------------------------------------------- the crew

    def counts(self) -> NDArray[np.float64]:
        """COUNTS, and how many batches there were of each of BINS, since the desk was made."""
        while True:
            number = self.batches
            counts: NDArray[np.float64] = self._head["counts"][number % 2].copy()
            if self.batches == number:  # else the next batch may have begun to write there
                return counts

    def close(self) -> None:
        """Let go of it; whoever made it removes it."""
        self._head, self._asks, self._answers = {}, [], []
        self._segment.close()


class Place(NamedTuple):
    """Where an actor asks: all that is needed to find its desk."""

    name: str
    asks: Form
    answers: Form
    actors: int
    actor: int


class Asking:
    """A policy that asks another process, in place of the one that it encodes with.

    ring: tells the other that something is on the desk. wait: returns when it rang back, or may have.
    """

    def __init__(
        self, local: Policy, desk: Desk, actor: int, ring: Callable[[], None], wait: Callable[[], None]
    ) -> None:
        self.encode = local.encode
        self.for_env = local.for_env
        self._local = local
        self._desk = desk
        self._actor = actor
        self._ring = ring
        self._wait = wait
        self._oldest: int | None = None

    def initial_state(self, num_envs: int) -> NDArray[np.float32] | None:
        """As the policy that is asked."""
        return initial_state(self._local, num_envs)

    def act(
        self,
        observation: NDArray[np.generic],
        deterministic: bool = False,
        generator: torch.Generator | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.generic], dict[str, NDArray[np.generic]]]:
        """As Policy.act, never deterministic, with the other's generator. Raises EOFError when all is over."""
        self._desk.ask(self._actor, request(observation, state))
        self._ring()
        while not self._desk.answered(self._actor):
            self._wait()
            if self._desk.closed:
                raise EOFError
        arrays, version = self._desk.answer_to(self._actor)
        self._oldest = version if self._oldest is None else min(version, self._oldest)
        return arrays["action"].copy(), {name: array.copy() for name, array in extras_in(arrays).items()}

    def rest(self) -> int:
        """After a rollout: nobody waits for us until the next request. The oldest version that acted in it."""
        self._desk.acting[self._actor] = False
        self._ring()
        oldest, self._oldest = self._oldest, None
        assert oldest is not None, "nothing was asked"
        return oldest


def _fill(to: Arrays, arrays: Arrays, what: str) -> None:
    if to.keys() != arrays.keys():
        raise RunError(f"{what} has {', '.join(arrays)}, and the first had {', '.join(to)}")
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (to[name].shape, to[name].dtype):
            raise RunError(f"{what}: {name} is {array.dtype} {list(array.shape)}, and was {to[name].dtype} "
                           f"{list(to[name].shape)}", hint="inference: local")  # fmt: skip
        to[name][...] = array
