"""One A3C worker in a process of its own, for the test that workers share their weights."""

from __future__ import annotations

import torch
from learn import probes

from longrein.learn.algorithms.a3c import A3C


def run(worker: A3C, updates: int, seed: int) -> None:
    """Train on a probe."""
    torch.set_num_threads(1)
    probes.batches(probes.vector(probes.Imitate, 2), worker, updates, seed)
