"""K-FAC against exact Fisher matrices, by brute force, and what an optimizer owes its user."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional

from longrein.learn.distributions import Categorical, DiagonalGaussian
from longrein.learn.kfac import KFAC, kfac_for, model_log_prob


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def filled(module: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    """The module in float64, with weights that no other test has seen."""
    module.double()
    generator = seeded(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, scale, generator=generator)
    return module


def mlp(seed: int = 1) -> nn.Module:
    return filled(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.LeakyReLU(0.1, inplace=True), nn.Linear(4, 3)),
        seed,
    )


def convolutional(seed: int = 2) -> nn.Module:
    layers = [nn.Conv2d(2, 3, 3, 2, 1), nn.Tanh(), nn.Conv2d(3, 2, 2, dilation=2), nn.Tanh(), nn.Flatten()]
    return filled(nn.Sequential(*layers, nn.Linear(8, 3)), seed)


def choose(net: nn.Module, rows: Tensor, action: Tensor) -> Tensor:
    return Categorical(net(rows)).log_prob(action)


def observed(kfac: KFAC, net: nn.Module, rows: Tensor, action: Tensor) -> None:
    with kfac.recording():
        kfac.observe(choose(net, rows, action))


def gradients_of_each_row(net: nn.Module, rows: Tensor, action: Tensor) -> dict[str, Tensor]:
    """d log p(action|row) / d parameter, one row at a time: [N, ...]."""

    def one(parameters: dict[str, Tensor], row: Tensor, choice: Tensor) -> Tensor:
        output = functional_call(net, parameters, (row.unsqueeze(0),))
        return output.log_softmax(-1)[0].gather(0, choice.unsqueeze(0)).sum()

    return vmap(grad(one), (None, 0, 0))(dict(net.named_parameters()), rows, action)


# ------------------------------------------------------------------------------------------------------- statistics


def test_factors_are_those_of_brute_force_gradients() -> None:
    net, rows = mlp(), normal(32, 3)
    action = torch.randint(3, (32,), generator=seeded())
    each = gradients_of_each_row(functional_net(net), rows, action)
    kfac = KFAC(net)
    observed(kfac, net, rows, action)
    for name in ("0", "2", "4"):
        inputs, gradients = kfac.factors()[name]
        g = each[f"{name}.bias"]  # [N, O]: the bias is the output itself
        # Each row's gradient is the outer product g a^T, so that a = M^T g / |g|^2.
        matrix = torch.cat([each[f"{name}.weight"], g.unsqueeze(2)], 2)
        a = torch.einsum("noi,no->ni", matrix, g) / g.square().sum(1, keepdim=True)
        torch.testing.assert_close(gradients, g.T @ g / 32)
        torch.testing.assert_close(inputs, a.T @ a / 32)


def functional_net(net: nn.Module) -> nn.Module:
    """The same with no activation in place, which vmap cannot follow."""
    other = copy.deepcopy(net)
    for module in other.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    return other


def test_the_product_of_one_row_is_its_exact_fisher_block() -> None:
    # With N = 1 nothing is averaged, so A (x) S is vec(g a^T) vec(g a^T)^T to the last digit.
    net, rows, action = mlp(), normal(1, 3), torch.tensor([2])
    each = gradients_of_each_row(functional_net(net), rows, action)
    kfac = KFAC(net)
    observed(kfac, net, rows, action)
    for name, (inputs, gradients) in kfac.factors().items():
        matrix = torch.cat([each[f"{name}.weight"][0], each[f"{name}.bias"][0].unsqueeze(1)], 1)
        columns = matrix.T.reshape(-1)  # column by column, as vec is
        torch.testing.assert_close(torch.kron(inputs, gradients), torch.outer(columns, columns))


def test_factors_of_convolutions_are_those_of_brute_force() -> None:
    net, rows = convolutional(), normal(6, 2, 7, 7)
    action = torch.randint(3, (6,), generator=seeded())
    kfac = KFAC(net)
    observed(kfac, net, rows, action)
    outputs = []
    x = rows
    for layer in net:  # type: ignore[attr-defined]  # a Sequential
        given, x = x, layer(x)
        if isinstance(layer, nn.Conv2d):
            x.retain_grad()
            outputs.append((layer, given.detach(), x))
    Categorical(x).log_prob(action).sum().backward()
    for name, (layer, given, output) in zip(("0", "2"), outputs, strict=True):
        count, _, height, width = output.shape
        pad, step, reach = layer.padding[0], layer.stride[0], layer.dilation[0]
        padded = functional.pad(given, (pad,) * 4)
        a, s = torch.zeros(()).double(), torch.zeros(()).double()
        for n in range(count):
            for i in range(height):
                for j in range(width):
                    down = slice(i * step, i * step + reach * (layer.kernel_size[0] - 1) + 1, reach)
                    across = slice(j * step, j * step + reach * (layer.kernel_size[1] - 1) + 1, reach)
                    patch = torch.cat([padded[n, :, down, across].reshape(-1), torch.ones(1).double()])
                    a = a + torch.outer(patch, patch)
                    s = s + torch.outer(output.grad[n, :, i, j], output.grad[n, :, i, j])
        inputs, gradients = kfac.factors()[name]
        torch.testing.assert_close(inputs, a / count)  # a sum over positions
        torch.testing.assert_close(gradients, s / (count * height * width))  # a mean over them


def test_one_position_is_a_linear_layer_and_its_block_is_exact() -> None:
    net = filled(nn.Sequential(nn.Conv2d(2, 3, 4), nn.Flatten()), 4)
    rows, action = normal(1, 2, 4, 4), torch.tensor([1])
    each = gradients_of_each_row(net, rows, action)
    kfac = KFAC(net)
    observed(kfac, net, rows, action)
    matrix = torch.cat([each["0.weight"][0].flatten(1), each["0.bias"][0].unsqueeze(1)], 1)
    columns = matrix.T.reshape(-1)
    torch.testing.assert_close(torch.kron(*kfac.factors()["0"]), torch.outer(columns, columns))


def test_a_convolution_whose_patches_tell_nothing_has_its_exact_fisher() -> None:
    # KFC takes the derivatives at two positions for uncorrelated, and for independent of the patches. Both hold for
    # outputs y ~ N(s, 1), whose derivatives are noise. Here the noise is all 16 sign patterns of 4 positions, whose
    # second moments are those of a white normal exactly.
    net = filled(nn.Sequential(nn.Conv2d(1, 1, 2, 2, bias=False), nn.Flatten()))
    image = normal(3, 1, 4, 4)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)  # [16, 4]
    rows, noise = image.repeat_interleave(16, 0), signs.repeat(3, 1)
    kfac = KFAC(net)
    with kfac.recording():
        kfac.observe((net(rows) * noise).sum(1))
    inputs, gradients = kfac.factors()["0"]
    patches = functional.unfold(image, 2, stride=2).transpose(1, 2)  # [3, 4 positions, 4 pixels]
    each = torch.einsum("st,ntp->nsp", signs, patches).flatten(0, 1)  # each row's gradient of the weight
    torch.testing.assert_close(torch.kron(inputs, gradients), each.T @ each / 48)


def test_a_layer_used_at_several_positions_counts_them_as_positions() -> None:
    # The same pixels as a 1x1 convolution and as a Linear on [N, T, F]: the same layer, so the same block.
    conv = filled(nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten()), 3)
    linear = filled(nn.Sequential(nn.Linear(3, 2), nn.Flatten()), 3)
    pixels = normal(5, 3, 2, 2)
    sequence = pixels.flatten(2).transpose(1, 2)
    one, two, three = KFAC(conv), KFAC(linear), KFAC(linear)
    with one.recording():
        one.observe(conv(pixels).square().sum(1))
    with two.recording():
        two.observe(linear(sequence).square().sum(1))
    with three.recording():
        three.observe(sum(linear(sequence[:, t]).square().sum(1) for t in range(4)))  # type: ignore[arg-type]
    for other in (two, three):
        torch.testing.assert_close(one.factors()["0"], other.factors()["0"])


def test_statistics_do_not_know_the_loss() -> None:
    rows, action = normal(16, 3), torch.randint(3, (16,), generator=seeded())
    factors = []
    for scale in (1.0, 100.0):
        net = mlp()
        kfac = KFAC(net)
        with kfac.recording():
            log_prob = choose(net, rows, action)
            kfac.observe(log_prob)
            assert all(parameter.grad is None for parameter in net.parameters())
            (log_prob * scale).mean().backward()  # even in here
        (choose(net, rows, action) * scale).mean().backward()
        net(rows)  # nor are they taken in acting
        factors.append(kfac.factors())
    assert len(factors[0]) == 3
    torch.testing.assert_close(factors[0], factors[1], rtol=0, atol=0)


def test_hooks_are_there_only_while_recording() -> None:
    net = mlp()
    kfac = KFAC(net)
    layers = [module for module in net.modules() if isinstance(module, nn.Linear)]
    with kfac.recording():
        assert all(layer._forward_hooks for layer in layers)
    with pytest.raises(ZeroDivisionError), kfac.recording():
        1 / 0
    assert not any(layer._forward_hooks for layer in layers)
    with pytest.raises(RuntimeError, match="recording"):
        kfac.observe(choose(net, normal(2, 3), torch.tensor([0, 1])))


def test_the_average_begins_as_a_mean_and_then_decays() -> None:
    net = filled(nn.Linear(1, 1, bias=False))
    kfac = KFAC(net, decay=0.6)
    seen = []
    for x in (1.0, 2.0, 3.0, 4.0):
        with kfac.recording():
            kfac.observe(net(torch.full((1, 1), x).double()).sum(1))
        seen.append(float(kfac.factors()[""][0]))
    # 1; (1 + 4) / 2; decay min(1 - 1/3, .6) = .6: .6 * 2.5 + .4 * 9; .6 * 5.1 + .4 * 16
    assert seen == pytest.approx([1.0, 2.5, 5.1, 9.46])


def test_a_factor_that_is_not_finite_is_left_out() -> None:
    net, action = mlp(), torch.zeros(4, dtype=torch.int64)
    kfac = KFAC(net)
    observed(kfac, net, normal(4, 3), action)
    before = {name: (a.clone(), s.clone()) for name, (a, s) in kfac.factors().items()}
    observed(kfac, net, torch.full((4, 3), torch.nan).double(), action)
    torch.testing.assert_close(kfac.factors(), before, rtol=0, atol=0)
    assert kfac.skipped == 6


# ------------------------------------------------------------------------------------------------------------- steps


def warm(net: nn.Module, **settings: Any) -> KFAC:
    """No cold phase, no momentum, no trust region, hardly any damping: the plain natural gradient."""
    plain = {"lr": 1.0, "cold_updates": 0, "momentum": 0.0, "damping": 1e-12, "kl_clip": 1e30}
    return KFAC(net, **plain | settings)  # type: ignore[arg-type]


def before_and_after(net: nn.Module, kfac: KFAC) -> dict[str, Tensor]:
    """What a step adds to each parameter."""
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    kfac.step()
    return {name: parameter.detach() - before[name] for name, parameter in net.named_parameters()}


def test_a_linear_gaussian_model_gets_its_exact_natural_gradient() -> None:
    # y ~ N(W x + b, I): the Fisher matrix of (W, b) is E[x x^T] (x) I, with a 1 appended to x.
    net = filled(nn.Linear(3, 2))
    rows, target = normal(64, 3, seed=1), normal(64, 2, seed=2)

    def means(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(net, parameters, (row,))

    jacobian = vmap(jacrev(means), (None, 0))(dict(net.named_parameters()), rows)
    jacobian = torch.cat([jacobian["weight"].flatten(2), jacobian["bias"]], 2)  # [N, 2, 8]
    fisher = torch.einsum("noi,noj->ij", jacobian, jacobian) / 64
    kfac = warm(net)
    # Noise of exactly unit second moments, in place of ever so many draws.
    noise = normal(64, 2, seed=3)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / 64)).T
    with kfac.recording():
        mean = net(rows)
        kfac.observe(-0.5 * (mean - (mean.detach() + noise)).square().sum(1))
    (0.5 * (mean - target).square().sum(1)).mean().backward()
    gradient = torch.cat([net.weight.grad.flatten(), net.bias.grad])  # type: ignore[union-attr]  # just made
    exact = torch.linalg.solve(fisher, gradient)
    made = before_and_after(net, kfac)
    torch.testing.assert_close(-torch.cat([made["weight"].flatten(), made["bias"]]), exact, rtol=1e-6, atol=1e-9)
    # For a model that is linear, one natural step of the likelihood's own loss is Newton's: least squares.
    design = torch.cat([rows, torch.ones(64, 1).double()], 1)
    best = torch.linalg.lstsq(design, target).solution
    torch.testing.assert_close(torch.cat([net.weight, net.bias.unsqueeze(1)], 1).T.detach(), best, rtol=1e-6, atol=1e-9)


def test_samples_of_the_model_converge_to_it() -> None:
    net = filled(nn.Linear(3, 2))
    rows = normal(100_000, 3, seed=1)
    kfac = KFAC(net)
    with kfac.recording():
        mean = net(rows)
        kfac.observe(model_log_prob(DiagonalGaussian(mean, torch.zeros(2).double()), generator=seeded(5)))
    torch.testing.assert_close(kfac.factors()[""][1], torch.eye(2).double(), atol=0.02, rtol=0)


def test_damping_is_exact_tikhonov() -> None:
    net, rows = filled(nn.Linear(3, 2)), normal(8, 3)
    kfac = warm(net, damping=0.3)
    with kfac.recording():
        output = net(rows)
        kfac.observe((output * normal(8, 2, seed=9)).sum(1))
    output.square().sum(1).mean().backward()
    gradient = torch.cat([net.weight.grad, net.bias.grad.unsqueeze(1)], 1)  # type: ignore[list-item, union-attr]
    inputs, gradients = kfac.factors()[""]
    whole = torch.kron(inputs, gradients) + 0.3 * torch.eye(8).double()
    exact = torch.linalg.solve(whole, gradient.T.reshape(-1)).reshape(4, 2).T
    made = before_and_after(net, kfac)
    torch.testing.assert_close(-torch.cat([made["weight"], made["bias"].unsqueeze(1)], 1), exact)


def measured_kl(net: nn.Module, kappa: float) -> float:
    """KL(old || new) of a categorical policy, after one policy gradient step that the trust region cuts."""
    rows = normal(512, 3)
    kfac = warm(net, kl_clip=kappa, damping=0.01)
    for seed in range(20):  # statistics of many samples of one and the same policy
        with kfac.recording():
            old = Categorical(net(rows))
            kfac.observe(model_log_prob(old, generator=seeded(seed)))
    advantage = rows[:, 0] * 3 + normal(512, seed=4)
    kfac.zero_grad()
    (-old.log_prob(old.sample(seeded(30))) * advantage).mean().backward()
    kfac.step()
    assert float(kfac.nu) < 1
    assert float(kfac.predicted_kl) == pytest.approx(kappa / 2)
    with torch.no_grad():
        return float((old.log_probs.exp() * (old.log_probs - Categorical(net(rows)).log_probs)).sum(1).mean())


@pytest.mark.parametrize("kappa", [1e-4, 1e-3, 1e-2])
def test_the_measured_kl_is_half_of_the_clip(kappa: float) -> None:
    assert measured_kl(filled(nn.Linear(3, 4), 3), kappa) == pytest.approx(kappa / 2, rel=0.25)
    # Between layers the Fisher matrix is taken for 0. Where all three push alike the KL is three times as large, at
    # most: the norm of a sum of three equal vectors, against the root of the sum of their squares.
    layers = [nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)]
    assert 0.5 < measured_kl(filled(nn.Sequential(*layers), 3), kappa) / (kappa / 2) < 3


def test_one_scale_for_all_layers() -> None:
    rows, action = normal(64, 3), torch.randint(3, (64,), generator=seeded())
    made = {}
    for kappa in (1e30, 1e-5):
        net = mlp()
        kfac = warm(net, kl_clip=kappa, damping=0.01)
        with kfac.recording():
            log_prob = choose(net, rows, action)
            kfac.observe(log_prob)
        log_prob.mean().backward()
        made[kappa] = before_and_after(net, kfac), float(kfac.nu)
    (free, one), (cut, nu) = made[1e30], made[1e-5]
    assert one == 1.0
    assert nu < 1
    for name, step in free.items():
        torch.testing.assert_close(cut[name], nu * step)


def test_the_step_does_not_see_a_linear_map_of_the_inputs() -> None:
    rows, action = normal(256, 3), torch.randint(3, (256,), generator=seeded())
    mapping = normal(3, 3, seed=6) + 2 * torch.eye(3).double()
    plain, mapped = mlp(), mlp()
    with torch.no_grad():
        first = mapped[0]  # type: ignore[index]  # a Sequential
        first.weight.copy_(first.weight @ torch.linalg.inv(mapping))  # x -> M x, so W -> W M^-1: the same function
    outputs = []
    for net, given in ((plain, rows), (mapped, rows @ mapping.T)):
        kfac = warm(net, kl_clip=1e-2, damping=1e-9)
        for _ in range(3):
            with kfac.recording():
                log_prob = choose(net, given, action)
                kfac.observe(log_prob)
            kfac.zero_grad()
            (log_prob * rows[:, 1]).mean().backward()
            kfac.step()
        outputs.append(net(given))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(outputs[0], mlp()(rows), atol=1e-2)


def test_momentum_and_rate() -> None:
    # One weight, x = 1, so A = S = 1 and the natural gradient of s is 1 / (1 + lambda) = 0.5.
    net = filled(nn.Linear(1, 1, bias=False))
    kfac = warm(net, lr=0.2, momentum=0.9, damping=1.0)
    moved = []
    for _ in range(3):
        with kfac.recording():
            output = net(torch.ones(1, 1).double())
            kfac.observe(output.sum(1))
        kfac.zero_grad()
        output.sum().backward()
        moved.append(float(before_and_after(net, kfac)["weight"]))
    # lr (1 - momentum) = 0.02, times 0.5, 0.5 * 1.9, 0.5 * 2.71
    assert moved == pytest.approx([-0.01, -0.019, -0.0271])


def test_the_cold_phase_is_plain_gradients_of_limited_norm() -> None:
    net = filled(nn.Linear(1, 1, bias=False))
    kfac = warm(net, lr=0.2, momentum=0.9, damping=1.0, cold_updates=2, max_grad_norm=0.5)
    moved = []
    for _ in range(3):
        with kfac.recording():
            output = net(torch.ones(1, 1).double())
            kfac.observe(output.sum(1))
        kfac.zero_grad()
        (7 * output).sum().backward()
        moved.append(float(before_and_after(net, kfac)["weight"]))
    # 0.02 times 0.5, 0.5 * 1.9; then natural, 7 / 2, with a momentum that begins anew.
    assert moved == pytest.approx([-0.01, -0.019, -0.07])


def test_decompositions_wait() -> None:
    net = filled(nn.Linear(1, 1, bias=False))
    kfac = warm(net, damping=0.0, inverse_every=2)
    moved = []
    for x in (1.0, 2.0, 2.0):
        with kfac.recording():
            kfac.observe(net(torch.full((1, 1), x).double()).sum(1))
        kfac.zero_grad()
        net(torch.ones(1, 1).double()).sum().backward()
        moved.append(float(before_and_after(net, kfac)["weight"]))
    # A is 1, (1 + 4) / 2, (1 + 4 + 4) / 3, and looked at in the first and the third.
    assert moved == pytest.approx([-1.0, -1.0, -1 / 3])


class Odd(nn.Module):
    """What K-FAC cannot hold, around what it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 2)
        self.log_std = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, x: Tensor) -> DiagonalGaussian:
        return DiagonalGaussian(self.frozen(self.last(self.norm(torch.tanh(self.first(x))))), self.log_std)


def test_other_parameters_are_adams_and_named() -> None:
    net = filled(Odd())
    kfac = KFAC(net, 0.5, fallback_lr=1e-2, cold_updates=0)
    assert kfac.others == ["log_std", "norm.weight", "norm.bias"]
    kfac.param_groups[0]["lr"] = 0.25  # half of what it was, so Adam's is as well
    rows = normal(32, 3)
    with kfac.recording():
        distribution = net(rows)
        kfac.observe(model_log_prob(distribution, generator=seeded()))
    distribution.log_prob(normal(32, 2, seed=8)).mean().neg().backward()
    made = before_and_after(net, kfac)
    for name in kfac.others:  # Adam's first step is its rate, whatever the gradient
        torch.testing.assert_close(made[name].abs(), torch.full_like(made[name], 5e-3), rtol=0.02, atol=0)
    assert set(kfac.factors()) == {"first", "last"}
    assert not made["frozen.weight"].any()
    assert made["first.weight"].any()


def test_weights_that_two_layers_share_are_adams() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(2, 2, 1, groups=2))
    net[1].weight = net[0].weight
    assert KFAC(net).others == ["0.weight", "0.bias", "1.bias", "3.weight", "3.bias"]


def test_a_layer_without_statistics_is_not_passed_over() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    kfac = KFAC(net, cold_updates=0)
    with kfac.recording():
        kfac.observe(net[0](torch.ones(2, 3)).sum(1))
    net(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="layer '1' has a gradient"):
        kfac.step()


def test_parts_share_one_trust_region() -> None:
    torso, head, log_std = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.zeros(2))
    kfac = kfac_for(torso, head, log_std, None, lr=0.1, kl_clip=0.01)
    assert kfac.param_groups[0]["kl_clip"] == 0.01
    assert kfac.others == ["2"]
    with kfac.recording():
        kfac.observe(head(torso(torch.ones(2, 3))).sum(1))
    assert set(kfac.factors()) == {"0", "1"}


def test_values_are_samples_too() -> None:
    net = filled(nn.Linear(2, 1))
    rows = normal(50_000, 2)
    kfac = KFAC(net)
    with kfac.recording():
        kfac.observe(model_log_prob(value=net(rows).squeeze(1), value_noise=4.0, generator=seeded()))
    # The gradient of the log-likelihood is noise / 4^2 with a deviation of 4, so its second moment is 1 / 16.
    assert float(kfac.factors()[""][1]) == pytest.approx(1 / 16, rel=0.05)
    with pytest.raises(ValueError, match="or both"):
        model_log_prob()


def test_samples_carry_no_gradient() -> None:
    mean = torch.zeros(4, 2, requires_grad=True)
    model_log_prob(DiagonalGaussian(mean, torch.zeros(2)), generator=seeded()).sum().backward()
    noise = torch.empty(4, 2).normal_(generator=seeded())
    torch.testing.assert_close(mean.grad, noise)  # (a - mean) / 1; with its gradient it would be 0


def learn(net: nn.Module, kfac: KFAC, updates: int, start: int = 0) -> None:
    for index in range(start, start + updates):
        rows = normal(64, 3, seed=index)
        with kfac.recording():
            distribution = net(rows)
            kfac.observe(model_log_prob(distribution, generator=seeded(index)))
        kfac.zero_grad()
        distribution.log_prob(rows[:, :2]).mean().neg().backward()
        kfac.step()


@pytest.mark.parametrize("done", [3, 5, 8])
def test_going_on_from_a_save_is_going_on(done: int) -> None:
    # 5 cold updates, then a decomposition every 4: saved in the cold phase, at its end, and between two of them.
    one, two = filled(Odd()), filled(Odd(), 9)
    settings = {"cold_updates": 5, "inverse_every": 4, "kl_clip": 1e-3}
    first = KFAC(one, **settings)  # type: ignore[arg-type]
    learn(one, first, done)
    first.param_groups[0]["lr"] = 0.2
    saved = io.BytesIO()
    torch.save({"net": one.state_dict(), "kfac": first.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    second = KFAC(two, **settings)  # type: ignore[arg-type]
    two.load_state_dict(state["net"])
    second.load_state_dict(state["kfac"])
    for net, kfac in ((one, first), (two, second)):
        learn(net, kfac, 9, start=done)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert second.param_groups[0]["lr"] == 0.2
    assert second.updates == done + 9


def test_it_is_faster_than_gradient_descent_where_scales_differ() -> None:
    # Inputs of deviations 10, 1 and 0.03: gradient descent has one rate for all three.
    def fit(kind: str) -> float:
        net = mlp()
        rows = normal(512, 3) * torch.tensor([10.0, 1.0, 0.03])
        action = (rows[:, 2] * 30 > rows[:, 1]).long()
        optimizer: Any = (
            torch.optim.SGD(net.parameters(), 0.3) if kind == "sgd" else warm(net, kl_clip=1e-2, damping=1e-4)
        )
        for index in range(100):
            optimizer.zero_grad()
            if kind == "kfac":
                with optimizer.recording():
                    distribution = Categorical(net(rows))
                    optimizer.observe(model_log_prob(distribution, generator=seeded(index)))
            loss = -choose(net, rows, action).mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert fit("kfac") < 0.5 * fit("sgd")


def test_a_closure_is_called_with_gradients() -> None:
    net = nn.Linear(2, 1)
    kfac = KFAC(net)

    def closure() -> float:
        kfac.zero_grad()
        loss = net(torch.ones(1, 2)).sum()
        loss.backward()
        return float(loss.detach())

    assert kfac.step(closure) == pytest.approx(float(net(torch.ones(1, 2))), abs=0.2)
