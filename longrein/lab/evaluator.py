"""Evaluation while training goes on: weights of a moment to a process of its own, scores back. Knows no environment.

1. Evaluations are done in the order they were asked for, one at a time, each with a copy of the weights of its moment.
2. Who is killed while it plays is replaced, and plays again from the first episode; nothing was noted before.
3. PENDING may wait; whoever asks for one more waits. A checkpoint holds those that have no scores yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

import torch

from longrein.lab.acting_role import policy_arrays
from longrein.lab.channel import Arrays, Weights, form_of
from longrein.lab.evaluator_process import EvaluatorRole, Play, live
from longrein.lab.role_process import Post, context_for, packed
from longrein.learn.algorithms import Policy

PENDING = 2
"""Evaluations without scores that do not keep training from going on."""

Note = Callable[[int, Sequence[tuple[int, int, float]]], None]
"""Is given the env steps that the weights had, and (seed, length, return) of each episode."""


class Evaluator:
    """Evaluations of one policy, as long as it is open. Its process starts at the first.

    Raises SpecError where the role cannot be sent to another process.
    """

    def __init__(self, role: EvaluatorRole, policy: Policy, note: Note) -> None:
        self._policy = policy
        self._note = note
        self._post = Post("evaluator", context_for(role.algorithm), live, (packed(role),))
        self._weights: Weights | None = None
        self._pending: deque[tuple[int, Arrays]] = deque()  # env steps, and weights; the first is played
        self._ready = False
        self._playing = False

    def ask(self, env_steps: int) -> None:
        """Evaluate the policy as it is now. env_steps: that it has. Raises as `look`."""
        self._add(env_steps, {name: array.copy() for name, array in policy_arrays(self._policy).items()})
        self._wait(PENDING)

    def look(self) -> None:
        """Note what has come. Raises what kept it from playing, or RoleDied, when it failed too often."""
        if self._post.pipe is None:
            return
        for said in self._post.hear():
            if said is None:
                self._ready = self._playing = False
            elif not self._ready:
                self._ready = True
            else:
                self._post.lives()
                self._playing = False
                env_steps, _ = self._pending.popleft()
                self._note(env_steps, said)
        self._send()

    def wait(self) -> None:
        """Until all have their scores. Raises as `look`."""
        self._wait(0)

    def state_dict(self) -> list[Any]:
        """Evaluations that have no scores yet."""
        return [
            {"env_steps": env_steps, "weights": {name: torch.from_numpy(array) for name, array in arrays.items()}}
            for env_steps, arrays in self._pending
        ]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        """Ask for them again."""
        for one in state:
            self._add(one["env_steps"], {name: tensor.numpy().copy() for name, tensor in one["weights"].items()})

    def close(self) -> None:
        """End the process, whatever it does."""
        self._post.end(0.2)
        if self._weights is not None:
            self._weights.close()

    def _add(self, env_steps: int, arrays: Arrays) -> None:
        self._pending.append((env_steps, arrays))
        if self._post.pipe is None:
            self._weights = Weights(form_of(arrays))
            self._post.start()
        self._send()

    def _send(self) -> None:
        """The next one, to an evaluator that has nothing to do."""
        if self._pending and self._ready and not self._playing:
            assert self._weights is not None
            env_steps, arrays = self._pending[0]
            self._weights.publish(arrays, env_steps)
            self._playing = True
            self._post.send(Play((self._weights.name, self._weights.form)))

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self.look()
            if len(self._pending) > most and self._post.pipe is not None:
                wait([self._post.pipe], 0.1)
