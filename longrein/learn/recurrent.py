"""Recurrent layers whose state survives rollouts and ends with episodes. Knows no environment and no algorithm.

One row of state, float32 [S], holds all that a layer remembers of one environment; zeros begin an episode. Whoever acts
keeps the rows and puts zeros where an episode ended; the learner does the same inside a rollout (`begins`), from the
state that was stored with its first row. Both follow "The 37 Implementation Details of PPO" (Huang et al. 2022, LSTM).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longrein.learn.networks import unset


class Core(nn.Module):
    """A GRU or an LSTM layer: features [.., inputs] and a state -> features [.., size] and the next state.

    Orthogonal weights of gain 1, biases 0. Of an LSTM, a row of state is its output beside its cell.
    """

    def __init__(self, kind: str, inputs: int, size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.kind = kind  # gru or lstm
        self.size = size
        self.state_size = size if kind == "gru" else 2 * size
        self.layer = unset(nn.GRU, inputs, size) if kind == "gru" else unset(nn.LSTM, inputs, size)
        for name, parameter in self.layer.named_parameters():
            if name.startswith("weight"):
                nn.init.orthogonal_(parameter, 1.0, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step of N environments: [N, inputs], [N, state_size] -> [N, size], next state [N, state_size]."""
        weights = self.layer.parameters()  # of input and state, then the biases of both
        if self.kind == "gru":
            output = torch.gru_cell(features, state, *weights)
            return output, output
        output, cell = torch.lstm_cell(features, state.chunk(2, -1), *weights)
        return output, torch.cat([output, cell], -1)

    def run(self, features: Tensor, state: Tensor) -> Tensor:
        """N sequences, none with an end inside: [L, N, inputs], from states [N, state_size] -> [L, N, size]."""
        first = [part.contiguous() for part in state.unsqueeze(0).chunk(1 if self.kind == "gru" else 2, -1)]
        output: Tensor = self.layer(features, first[0] if self.kind == "gru" else tuple(first))[0]
        return output


def begins(done: Tensor, valid: Tensor) -> Tensor:
    """Rows of a rollout [T, B] that begin with a new state: those after an end, or after a row that was none.

    That is the rule by which the actor puts zeros into the state; False in the first row, whose state was stored.
    """
    first = torch.zeros_like(done)
    first[1:] = done[:-1] | ~valid[:-1]
    return first


@dataclass(frozen=True, slots=True)
class Sequences:
    """Where the rows of a rollout [T, B] stand when each episode's piece is a sequence of its own: padded [L, N].

    Each sequence has one place more than it has rows, for the successor of its last row; then the place after a row's
    own is the successor's, wherever the row stands. So one run gives the values of all rows and of all successors.
    """

    number: Tensor  # [T, B] int64: which sequence
    place: Tensor  # [T, B] int64: which step of it
    length: int  # L
    first: Tensor  # [N] int64: the environment of those that go on from a stored state, B of the others

    @classmethod
    def of(cls, begin: Tensor) -> Sequences:
        """From where they begin: bool [T, B], the first row aside, where all do."""
        steps, envs = begin.shape
        # Numbered along each environment's time line, one after the other.
        marks = begin.T.clone()
        marks[:, 0] = True
        flat = marks.reshape(-1)
        number = flat.cumsum(0) - 1
        starts = flat.nonzero().squeeze(1)
        place = torch.arange(len(flat), device=flat.device) - starts[number]
        first = torch.where(starts % steps == 0, starts // steps, envs)
        return cls(number.view(envs, steps).T, place.view(envs, steps).T, int(place.max()) + 2, first)

    def run(
        self, core: Core, features: Tensor, state: Tensor, ends: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features [T, B, F] through a core from states [B, S]: (of the rows, of their successors), each [T, B, size].

        ends: bool [T, B] of M rows that end a sequence, and their successors' features [M, F]; a row that ends one and
        is not among them has a successor without meaning.
        """
        padded = features.new_zeros(self.length, len(self.first), features.shape[-1])
        if ends is not None:
            at, successor = ends
            padded[self.place[at] + 1, self.number[at]] = successor
        padded[self.place, self.number] = features
        states = torch.cat([state, state.new_zeros(1, state.shape[1])])
        output = core.run(padded, states[self.first])
        return output[self.place, self.number], output[self.place + 1, self.number]
