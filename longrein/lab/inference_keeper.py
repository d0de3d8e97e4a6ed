"""The crew's side of central inference: starts the process, watches and replaces it, measures it. Knows no rollout."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import gymnasium
import numpy as np
import torch

from longrein.lab.channel import Form, Weights
from longrein.lab.inference import BINS, COUNTS, Batching, Desk, Place
from longrein.lab.inference_process import Begin, Build, InferenceRole, live, ring
from longrein.lab.role_process import Post, packed
from longrein.lab.topology import Topology


class InferenceKeeper:
    """The inference process of a crew, through all of its lives.

    copies: environments of one actor. context: how processes are started.
    """

    def __init__(self, algorithm: str, config: Any, copies: int, topology: Topology, context: Any) -> None:
        actors = topology.actors
        patience = None if topology.inference_wait_ms is None else topology.inference_wait_ms / 1000
        batching = Batching(copies, topology.inference_batch or actors * copies, patience)
        pairs = [socket.socketpair() for _ in range(actors)]  # both ends stay open here: whoever dies breaks none
        self.bells = [one for one, _ in pairs]
        """Of the actors."""
        self._bells = [other for _, other in pairs]
        role = packed(InferenceRole(algorithm, config, actors, batching))
        self._post = Post("inference", context, live, (role, self._bells))
        self._actors = actors
        self._forms: tuple[Form, Form] | None = None
        self._spaces: Build | None = None
        self._weights: Weights | None = None
        self._desk: Desk | None = None
        self._told = False  # whether this life was told where to begin
        self._batches = 0  # when it was looked at last
        self._counts = np.zeros(len(COUNTS) + len(BINS))
        self._measured_at = time.monotonic()

    def open(self, observation_space: gymnasium.Space[Any], action_space: gymnasium.Space[Any]) -> None:
        """Start it. spaces: of one environment."""
        self._spaces = Build(observation_space, action_space)
        self._post.start()
        self._post.send(self._spaces)

    @property
    def ready(self) -> bool:
        """Whether it has said what requests are made of."""
        return self._forms is not None

    @property
    def begun(self) -> bool:
        """Whether it was ever told to begin."""
        return self._desk is not None

    @property
    def pipes(self) -> list[Connection]:
        """For multiprocessing.connection.wait."""
        return [] if self._post.pipe is None else [self._post.pipe]

    def begin(self, weights: Weights, draws: int | bytes) -> None:
        """Let it answer with these weights. draws: the seed of its choices, or their generator's state."""
        assert self._forms is not None, "it is not ready"
        self._desk, self._weights = Desk(self._actors, *self._forms), weights
        generator = torch.Generator()
        self._desk.begin(
            draws if isinstance(draws, bytes) else generator.manual_seed(draws).get_state().numpy().tobytes()
        )
        self._tell()

    def hear(self) -> None:
        """Take in what it said, and replace it where it died. Raises what ended it, when it did so too often."""
        if self._post.pipe is None:
            return
        for said in self._post.hear():
            if said is None:
                self._told = False
                self._post.send(self._spaces)
            else:
                self._forms = said
                self._tell()
        if self._desk is not None and self._desk.batches > self._batches:
            self._batches = self._desk.batches
            self._post.lives()

    def place(self, actor: int) -> Place:
        """Where an actor asks."""
        assert self._desk is not None, "nothing was begun"
        return Place(self._desk.name, self._desk.asks, self._desk.answers, self._actors, actor)

    def expect(self, actors: Iterable[int]) -> None:
        """These are about to act: wait for all of them."""
        assert self._desk is not None, "nothing was begun"
        self._desk.acting[list(actors)] = True

    def miss(self, actor: int) -> None:
        """An actor has died: nobody waits for it."""
        if self._desk is not None:
            self._desk.acting[actor] = False
            ring(self.bells[actor])

    @property
    def draws(self) -> bytes:
        """State of its generator, at a moment when no actor acts."""
        assert self._desk is not None, "nothing was begun"
        return self._desk.draws

    def measured(self) -> dict[str, float]:
        """Of the batches since the last call."""
        assert self._desk is not None, "nothing was begun"
        now, counts = time.monotonic(), self._desk.counts()
        took, self._measured_at = max(now - self._measured_at, 1e-9), now
        new, self._counts = counts - self._counts, counts
        batches, rows, requests, waited, computing = new[: len(COUNTS)].tolist()
        return {
            "inference_batch": rows / max(batches, 1.0),
            **{f"inference_batch_{low}": n / max(batches, 1.0)
               for low, n in zip(BINS, new[len(COUNTS) :].tolist(), strict=True)},
            "inference_wait_ms": 1000 * waited / max(requests, 1.0),
            "inference_share": min(computing / took, 1.0),
            "inference_requests_per_second": requests / took,
            "inference_replaced": float(self._post.replaced),
        }  # fmt: skip

    def shut(self) -> None:
        """Let all who wait for an answer end: nobody gives one any more."""
        if self._desk is not None:
            self._desk.shut()
            for bell in (*self.bells, *self._bells):
                ring(bell)

    def close(self) -> None:
        """End the process, and remove what it had in common with actors."""
        self._post.end()
        for bell in (*self.bells, *self._bells):
            bell.close()
        if self._desk is not None:
            self._desk.close()

    def _tell(self) -> None:
        """Where to begin, once that is known, and it is there to be told."""
        if self._desk is not None and self._weights is not None and not self._told and self._forms is not None:
            self._told = True
            self._post.send(Begin((self._weights.name, self._weights.form), self._desk.name))
