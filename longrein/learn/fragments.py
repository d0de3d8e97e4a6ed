"""Pieces of time lines [T, K, ...] as off-policy corrected updates take them: cleaned and replayed.

Each of the K columns is T steps of one environment; a trace never crosses from one column into another. Knows batches
and the memory of sequences, no algorithm and no network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longrein.learn.batch import FIELDS, Batch
from longrein.learn.sequence_replay import SequenceReplay


@dataclass(frozen=True, slots=True)
class Fragments:
    """Columns to learn from, and where they came from."""

    batch: Batch  # [T, K, ...], zeros in its invalid rows
    weight: Tensor | None = None  # [K], importance weights of the columns, the largest 1; None where all are 1
    index: Tensor | None = None  # int64, the memory's sequences that are the last columns; None where none is

    @property
    def share(self) -> Tensor:
        """What part each row has in a mean over the valid rows, times its column's weight: [T, K]."""
        share = self.batch.valid / self.batch.valid.sum()
        return share if self.weight is None else share * self.weight

    def remember(self, replay: SequenceReplay, error: Tensor) -> None:
        """Give the sequences the priority that their rows' errors [T, K], none of them negative, have in the mean."""
        if self.index is not None:
            rows = self.batch.valid.sum(0).clamp(min=1)
            mean = (error * self.batch.valid).sum(0) / rows
            replay.update_priorities(self.index, mean[-len(self.index) :])


def without_invalid(batch: Batch) -> Batch:
    """The batch with zeros in its invalid rows: a loss that gives them weight 0 must not meet NaN times 0."""
    if batch.valid.all():
        return batch
    gone = ~batch.valid

    def cleaned(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(gone.view(*gone.shape, *[1] * (tensor.ndim - gone.ndim)), 0)

    # Flags stay: an episode may end in a row of which nothing else is known.
    columns = {name: getattr(batch, name) for name in FIELDS}
    columns |= {name: cleaned(columns[name]) for name in ("observation", "action", "reward", "next_observation")}
    return Batch(**columns, extras={name: cleaned(tensor) for name, tensor in batch.extras.items()})


def scaled(reward: Tensor, scale: float, clip: float | None) -> Tensor:
    """Rewards as they are learnt from: multiplied, then clipped either way."""
    reward = reward if scale == 1.0 else reward * scale
    return reward if clip is None else reward.clamp(-clip, clip)


def replays(
    replay: SequenceReplay, fresh: Batch, *, ratio: float, fresh_fraction: float, generator: torch.Generator
) -> Iterator[Fragments]:
    """What to learn from again after a fresh rollout, `batch_size` columns a time.

    ratio: replayed env steps for each fresh one, on average: the number of replays is drawn from Poisson's
    distribution, as in Wang et al. 2017, algorithm 1 (arXiv:1611.01224). fresh_fraction: the share of the columns that
    are out of the fresh rollout. Nothing before the memory is ready.
    """
    if ratio <= 0 or not replay.ready:
        return
    width = replay.memory.batch_size
    mean = ratio * int(fresh.valid.sum()) / (width * len(fresh.reward))
    for _ in range(int(torch.poisson(torch.tensor(mean), generator=generator))):
        usable = fresh.valid.any(0).nonzero().squeeze(1)
        kept = min(round(fresh_fraction * width), width - 1, len(usable))
        drawn = replay.sample(width - kept, generator)
        old = Fragments(without_invalid(drawn.batch), drawn.weight if replay.memory.prioritized else None, drawn.index)
        chosen = usable[torch.randperm(len(usable), generator=generator)[:kept]] if kept else usable[:0]
        yield _joined(fresh, chosen, old) if kept else old


def _joined(fresh: Batch, chosen: Tensor, old: Fragments) -> Fragments:
    """Some fresh columns, of weight 1, then the old ones."""
    columns = {name: torch.cat([getattr(fresh, name)[:, chosen], getattr(old.batch, name)], 1) for name in FIELDS}
    extras = {name: torch.cat([tensor[:, chosen], old.batch.extras[name]], 1) for name, tensor in fresh.extras.items()}
    weight = None if old.weight is None else torch.cat([torch.ones(len(chosen)), old.weight])
    return Fragments(Batch(**columns, extras=extras), weight, old.index)
