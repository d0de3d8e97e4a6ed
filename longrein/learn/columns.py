"""Transitions as named columns, as stores keep them, and whether others fit. Knows names and forms, no store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longrein.learn.batch import EXTRAS, FIELDS, Batch, Transition

T = TypeVar("T")
Forms = Mapping[str, tuple[torch.Size, torch.dtype]]
"""Of each column its shape, without time and environments, and its dtype."""


@overload
def columns_of(rows: Batch) -> dict[str, Tensor]: ...


@overload
def columns_of(rows: Transition) -> dict[str, NDArray[np.generic]]: ...


def columns_of(rows: Batch | Transition) -> dict[str, Any]:
    """Fields by their names, and extras by "extras.NAME"."""
    columns = {name: getattr(rows, name) for name in FIELDS}
    return columns | {EXTRAS + name: extra for name, extra in rows.extras.items()}


def extras_in(columns: Mapping[str, T]) -> dict[str, T]:
    """The extras among columns, by their own names."""
    return {name.removeprefix(EXTRAS): column for name, column in columns.items() if name.startswith(EXTRAS)}


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
