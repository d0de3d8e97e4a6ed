"""Layers without a start of their own: what they are, and that nobody's random numbers are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from longrein.learn.networks import orthogonal, unset
from longrein.learn.recurrent import Core
from longrein.learn.torsos import convolution


@pytest.mark.parametrize(
    ("kind", "settings"), [(nn.Linear, (3, 2)), (nn.Conv2d, (3, 2, 3, 1, 1)), (nn.GRU, (3, 2)), (nn.LSTM, (3, 2))]
)
def test_an_unset_layer_is_torchs_own_and_draws_nothing(kind: type[nn.Module], settings: tuple[Any, ...]) -> None:
    before = torch.get_rng_state()
    layer = unset(kind, *settings)
    assert torch.equal(before, torch.get_rng_state())
    other = kind(*settings)
    assert type(layer) is kind
    assert repr(layer) == repr(other)
    layer.load_state_dict(other.state_dict())  # as many weights, by the same names
    given = torch.ones(2, 3, 4, 4) if kind is nn.Conv2d else torch.ones(2, 3)
    one, two = layer(given), other(given)
    torch.testing.assert_close(one, two)


def test_a_generators_weights_are_the_same_whoever_makes_the_layer() -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    weight = nn.init.orthogonal_(torch.empty(4, 5), 2.0, generator=generator())
    assert torch.equal(orthogonal(5, 4, 2.0, generator()).weight, weight)
    weight = nn.init.orthogonal_(torch.empty(6, 3, 2, 2), 2**0.5, generator=generator())
    assert torch.equal(convolution(3, 6, 2, 1, generator=generator()).weight, weight)
    weight = nn.init.orthogonal_(torch.empty(12, 5), 1.0, generator=generator())
    core = Core("gru", 5, 4, generator())
    assert torch.equal(dict(core.layer.named_parameters())["weight_ih_l0"], weight)
    assert not any(p.any() for name, p in core.layer.named_parameters() if name.startswith("bias"))
