"""A batch as named columns, as memories keep it, and whether another one fits. Knows names and forms, no memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from longrein.learn.batch import FIELDS, Batch

Forms = Mapping[str, tuple[torch.Size, torch.dtype]]
"""Of each column its shape, without time and environments, and its dtype."""


def columns_of(batch: Batch) -> dict[str, Tensor]:
    """A batch's fields, and its extras as `extras.{name}`."""
    columns = {name: getattr(batch, name) for name in FIELDS}
    return columns | {f"extras.{name}": extra for name, extra in batch.extras.items()}


def alike(columns: Mapping[str, NDArray[Any]], held: Mapping[str, NDArray[Any]]) -> bool:
    """Whether columns [T, B, ...] have the names, forms and dtypes of those held [S, B, ...]."""
    return columns.keys() == held.keys() and all(
        column.shape[1:] == held[name].shape[1:] and column.dtype == held[name].dtype
        for name, column in columns.items()
    )


def forms_of(columns: Mapping[str, Tensor], leading: int) -> Forms:
    """Of each column, its shape behind `leading` dimensions, and its dtype."""
    return {name: (column.shape[leading:], column.dtype) for name, column in columns.items()}


def check(columns: Mapping[str, Tensor], streams: int, expected: int, forms: Forms) -> None:
    """Raise ValueError unless columns [T, B, ...] are of `expected` environments and have these forms."""
    if streams != expected:
        raise ValueError(f"the memory holds {expected} environments, got a batch of {streams}: streams would be mixed")
    got = forms_of(columns, 2)
    for name in sorted(got.keys() | forms.keys()):
        if got.get(name) != forms.get(name):
            raise ValueError(f"{name}: expected {forms.get(name)} as in the first batch, got {got.get(name)}")
