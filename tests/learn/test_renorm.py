"""Batch renormalization against its equations, and the ensemble against networks computed one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from torch import Tensor, nn

from longrein.learn.ensemble import Ensemble, Renorm, StackedLinear
from longrein.learn.renorm import BatchRenorm
from longrein.learn.torsos import Net


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scaled(norm: BatchRenorm) -> BatchRenorm:
    """With a gamma and a beta that are not 1 and 0."""
    with torch.no_grad():
        norm.gamma.mul_(1.7)
        norm.beta.add_(0.3)
    return norm


def test_by_hand() -> None:
    # Batch {1, 3}: mu_B = 2, var = 1, sigma_B = 1 (epsilon 0). Running mu = 0.5, sigma = 0.5.
    # r = 1 / 0.5 = 2, d = (2 - 0.5) / 0.5 = 3: y = (x - 2) * 2 + 3 = {1, 5}, which is (x - 0.5) / 0.5.
    norm = BatchRenorm(1, momentum=0.9, warmup=0, epsilon=0.0)
    norm.mean.fill_(0.5)
    norm.deviation.fill_(0.5)
    x = torch.tensor([[[1.0], [3.0]]])
    torch.testing.assert_close(norm(x, train=True).flatten(), torch.tensor([1.0, 5.0]))
    # mu = 0.9 * 0.5 + 0.1 * 2 = 0.65; sigma = 0.9 * 0.5 + 0.1 * 1 = 0.55.
    assert float(norm.mean) == pytest.approx(0.65)
    assert float(norm.deviation) == pytest.approx(0.55)
    torch.testing.assert_close(norm(x).flatten(), torch.tensor([0.35 / 0.55, 2.35 / 0.55]))


def test_the_corrections_are_clipped() -> None:
    # sigma_B / sigma = 1 / 0.1 = 10 -> r = 3; (2 - 0) / 0.1 = 20 -> d = 5: y = (x - 2) * 3 + 5.
    norm = BatchRenorm(1, warmup=0, epsilon=0.0)
    norm.deviation.fill_(0.1)
    x = torch.tensor([[[1.0], [3.0]]])
    torch.testing.assert_close(norm(x, train=True).flatten(), torch.tensor([2.0, 8.0]))
    # The other ends: sigma 100 -> r = 1/3; mu = 1000 -> d = (2 - 1000) / 100 = -9.98 -> -5.
    norm.deviation.fill_(100.0)
    norm.mean.fill_(1000.0)
    torch.testing.assert_close(norm(x, train=True).flatten(), torch.tensor([-5.0 - 1 / 3, -5.0 + 1 / 3]))


def test_warming_up_it_is_batch_normalization() -> None:
    norm, torch_norm = scaled(BatchRenorm(4, warmup=3, epsilon=1e-3)), nn.BatchNorm1d(4, eps=1e-3)
    with torch.no_grad():
        torch_norm.weight.mul_(1.7)
        torch_norm.bias.add_(0.3)
    for step in range(3):
        x = 3 * data(32, 4, seed=step) + 1
        torch.testing.assert_close(norm(x.unsqueeze(0), train=True)[0], torch_norm(x))
    assert int(norm.passes) == 3
    x = 3 * data(32, 4, seed=9) + 1
    assert not torch.allclose(norm(x.unsqueeze(0), train=True)[0], torch_norm(x), atol=1e-3)


def test_after_the_warm_up_training_agrees_with_use() -> None:
    # Within the clips, training gives what the running statistics give: that is the point of renormalization.
    norm = scaled(BatchRenorm(4, momentum=0.9, warmup=50))
    for step in range(60):
        norm(2 * data(1, 64, 4, seed=step) - 1, train=True)
    x = 2 * data(1, 64, 4, seed=99) - 1
    torch.testing.assert_close(norm(x), norm(x, train=True), atol=1e-5, rtol=1e-5)


def test_use_changes_nothing_and_is_row_by_row() -> None:
    norm = scaled(BatchRenorm(4))
    norm(data(1, 64, 4), train=True)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = data(1, 8, 4, seed=1)
    torch.testing.assert_close(norm(x)[:, :1], norm(x[:, :1]))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


def test_no_gradient_goes_through_the_corrections() -> None:
    norm = BatchRenorm(2, warmup=0).double()
    norm.mean.fill_(0.2)
    x = data(1, 8, 2).double().requires_grad_()
    with torch.no_grad():
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        r = (variance + norm.epsilon).sqrt() / norm.deviation
        d = (mean - norm.mean) / norm.deviation
    g = data(1, 8, 2, seed=5).double()
    (got,) = torch.autograd.grad((norm(x, train=True) * g).sum(), x)
    variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
    (wanted,) = torch.autograd.grad((((x - mean) / (variance + norm.epsilon).sqrt() * r + d) * g).sum(), x)
    torch.testing.assert_close(got, wanted)


def test_copies_are_normalised_apart() -> None:
    both, first = BatchRenorm(3, 2), BatchRenorm(3, 1)
    x = torch.stack([data(16, 3), 5 * data(16, 3, seed=1) + 2])
    torch.testing.assert_close(both(x, train=True)[:1], first(x[:1], train=True))
    torch.testing.assert_close(both.mean[:1], first.mean)


# ------------------------------------------------------------------------------------------------------------ ensemble


def reference(ensemble: Ensemble, x: Tensor, copy: int) -> Tensor:
    """One of the networks, layer by layer: x [N, F] -> [N, outputs]."""
    for layer in ensemble.layers:
        x = torch.relu(x @ layer.weight[copy] + layer.bias[copy])
    return x @ ensemble.last.weight[copy] + ensemble.last.bias[copy]


@pytest.mark.parametrize("outputs", [1, 3])
def test_each_network_is_computed_as_if_alone(outputs: int) -> None:
    net = Net(hidden=(16, 8), activation="relu")
    generator = torch.Generator().manual_seed(0)
    ensemble = Ensemble(Box(-1, 1, (3,)), net, inputs=2, outputs=outputs, generator=generator)
    observation, action = data(5, 3), data(5, 2, seed=1)
    out = ensemble(observation, action)
    assert out.shape == (2, 5, outputs)
    for copy in range(2):
        torch.testing.assert_close(out[copy], reference(ensemble, torch.cat([observation, action], 1), copy))
    torch.testing.assert_close(ensemble(observation, action, first=1), out[:1])
    assert not torch.equal(ensemble.last.weight[0], ensemble.last.weight[1])  # they share nothing


def test_layer_norm_is_that_of_torch() -> None:
    ensemble = Ensemble(Box(-1, 1, (3,)), Net(hidden=(16,), activation="relu", layer_norm=True))
    x, norm = data(5, 3), nn.LayerNorm(16)
    linear = ensemble.layers[0][0]
    with torch.no_grad():
        hidden = torch.relu(norm(x @ linear.weight[1] + linear.bias[1]))
        torch.testing.assert_close(ensemble(x)[1], hidden @ ensemble.last.weight[1])
    assert ensemble(x, first=1).shape == (1, 5, 1)


def test_a_layer_starts_orthogonal_in_each_copy() -> None:
    layer = StackedLinear(2, 4, 8, 2.0, torch.Generator().manual_seed(0))
    for weight in layer.weight:
        torch.testing.assert_close(weight @ weight.T, 4.0 * torch.eye(4))


def test_eyes_with_weights_are_not_shared() -> None:
    image = Box(0, 255, (36, 36, 3), np.uint8)
    net = Net(hidden=(8,), activation="relu")
    ensemble = Ensemble(image, net, inputs=1, generator=torch.Generator().manual_seed(0))
    assert len(ensemble.eyes) == 2
    assert len(Ensemble(Box(-1, 1, (3,)), net).eyes) == 1
    seen = torch.randint(0, 256, (4, 36, 36, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    out = ensemble(seen, data(4, 1))
    out[0].sum().backward()
    gradients = [[parameter.grad for parameter in eye.parameters()] for eye in ensemble.eyes]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])
    assert all(g is None or g.abs().sum() == 0 for g in gradients[1])
    parts = Dict(a=image, b=Box(-1, 1, (2,)))
    assert Ensemble(parts, net)(data(4, 36 * 36 * 3 + 2)).shape == (2, 4, 1)


def test_renormalised_layers_learn_their_statistics_in_training_alone() -> None:
    net = Net(hidden=(16,), activation="relu")
    ensemble = Ensemble(Box(-1, 1, (3,)), net, inputs=1, renorm=Renorm(0.5, 0), generator=torch.Generator())
    before = {name: value.clone() for name, value in ensemble.state_dict().items()}
    ensemble(data(32, 3), data(32, 1))
    assert all(torch.equal(value, before[name]) for name, value in ensemble.state_dict().items())
    ensemble(data(32, 3), data(32, 1), train=True)
    changed = {name for name, value in ensemble.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"norms.{i}.{name}" for i in (0, 1) for name in ("mean", "deviation", "passes")}
