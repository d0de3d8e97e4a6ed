"""K-FAC: natural gradients by Kronecker factors, for any network and any loss. Knows layers, no algorithm.

See "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", Martens and Grosse 2015
(arXiv:1503.05671), "A Kronecker-factored Approximate Fisher Matrix for Convolution Layers", Grosse and Martens 2016
(arXiv:1602.01407), and "Scalable Trust-region Method for Deep RL", Wu et al. 2017 (arXiv:1708.05144), section 3.

Each layer's output is s = W a, the bias being one more column of W and a 1 in a; g = d log p(y) / d s for one sample y
that the model itself draws. The layer's Fisher block is taken for A (x) S, with A = E[a a^T] and S = E[g g^T].

    with kfac.recording():
        distribution, value = policy(observation)                             # one pass, for both
        kfac.observe(model_log_prob(distribution, value, generator=generator))   # statistics: no loss in them
    kfac.zero_grad()
    loss(distribution, value).backward()
    kfac.step()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from longrein.learn.distributions import Distribution
from longrein.learn.eager import Adam, Eager

FLOOR = 1e-6  # eigenvalues below this are taken for 0, as in ACKTR's code: in float32 they are rounding
DOUBLE_UP_TO = (
    1024  # rows of a factor that is decomposed in float64 on the CPU; larger ones as they are, where they are
)
CHUNK = 1 << 24  # numbers of unfolded patches held at once: 64 MiB


class KFAC(Eager, torch.optim.Optimizer):
    """Momentum SGD on natural gradients within a trust region, for the Linear and Conv2d layers of a module.

    Every other trainable parameter of the module (`others`) is left to Adam, and so is a weight that two layers share,
    a convolution in groups, or one with padding that is not of zeros.
    `recording` has hooks in place; outside of it there are none, so acting costs nothing and a copy has none.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.25,
        *,
        momentum: float = 0.9,
        damping: float = 0.01,
        kl_clip: float = 0.001,
        decay: float = 0.99,
        inverse_every: int = 10,
        cold_updates: int = 10,
        max_grad_norm: float = 0.5,
        fallback_lr: float = 1e-3,
    ) -> None:
        """lr: eta, the share of a natural gradient that is gone in the long run. momentum: of the steps.

        damping: added to the eigenvalues of the Fisher matrix (Tikhonov). kl_clip: kappa; the step's quadratic KL,
        in nats, is at most half of it. decay: of the factors' running averages. inverse_every: updates between
        decompositions. cold_updates: first updates, by plain SGD with gradients of norm max_grad_norm at most, in which
        statistics gather. fallback_lr: Adam's, for `others`, while lr is what it is here; it changes in proportion.
        """
        layers = _layers(module)
        held = {id(parameter) for layer in layers for parameter in layer.parameters}
        named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self._layers = layers
        self._names = {parameter: name for name, parameter in named if id(parameter) in held}
        self.others = [name for name, parameter in named if id(parameter) not in held]
        defaults = {"lr": lr, "momentum": momentum, "damping": damping, "kl_clip": kl_clip}
        super().__init__([parameter for _, parameter in named], defaults)
        rest = [parameter for _, parameter in named if id(parameter) not in held]
        self._fallback = Adam(rest, lr=fallback_lr, eps=1e-5, fused=True) if rest else None
        self._fallback_share = fallback_lr / lr if lr > 0 else 0.0
        self._decay = decay
        self._inverse_every = inverse_every
        self._cold_updates = cold_updates
        self._max_grad_norm = max_grad_norm
        self._seen: list[tuple[_Layer, Tensor, GradientEdge]] | None = None  # calls of the pass that is being recorded
        self.updates = 0  # steps taken
        self.skipped = 0  # factors that were not finite, and so were left as they had been
        self.nu = torch.ones(())  # scale of the last step: 1 within the trust region, less where it was cut
        self.predicted_kl = torch.zeros(())  # quadratic KL of the last natural step, in nats; 0 while cold

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch what each layer is given while this is held; call the network and then `observe` in it."""
        self._seen = []
        handles = [layer.module.register_forward_hook(self._watch(layer)) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen = None

    def observe(self, log_prob: Tensor) -> None:
        """Take in statistics from log_prob [N]: of one sample for each row, drawn from the model's own output.

        Rows that do not count must not have been given to the network. No parameter's `grad` is touched, and the
        graph is kept for the loss. A layer that is called several times for a row counts them as positions (KFC).
        Raises RuntimeError outside of `recording`.
        """
        if self._seen is None:
            raise RuntimeError("observe: what the layers were given is known only within recording()")
        calls = self._seen
        # The sum: each sample's own gradient arrives at full size. That of a mean would be N times too small.
        grads = torch.autograd.grad(
            log_prob.sum(), [edge for _, _, edge in calls], retain_graph=True, allow_unused=True
        )
        sums: dict[_Layer, tuple[Tensor, Tensor, int]] = {}
        with torch.no_grad():
            for (layer, given, _), grad in zip(calls, grads, strict=True):
                if grad is None:  # this call had no part in log_prob
                    continue
                inputs, gradients, rows = layer.gram(given, grad)
                if layer in sums:
                    more = sums[layer]
                    inputs, gradients, rows = inputs + more[0], gradients + more[1], rows + more[2]
                sums[layer] = inputs, gradients, rows
            for layer, (inputs, gradients, rows) in sums.items():
                # KFC, eq. 29 to 31: the number of positions is in A, and S is a mean over them.
                self.skipped += not layer.inputs.take(inputs / log_prob.numel(), self._decay)
                self.skipped += not layer.gradients.take(gradients / rows, self._decay)

    def precondition(self) -> None:
        """Turn the layers' gradients into natural ones, cut to the trust region; `step` does this by itself.

        For those who apply gradients elsewhere, as A3C does: to shared weights. It counts as an update.
        Raises RuntimeError for a layer with a gradient that no statistics were ever taken of.
        """
        group = self.param_groups[0]
        layers = [layer for layer in self._layers if layer.has_gradient]
        if self.updates < self._cold_updates:
            nn.utils.clip_grad_norm_([p for layer in layers for p in layer.parameters], self._max_grad_norm)
            self.nu, self.predicted_kl = torch.ones(()), torch.zeros(())
        else:
            if (self.updates - self._cold_updates) % self._inverse_every == 0:
                for layer in layers:
                    layer.decompose()
            self._natural(layers, group["lr"], group["damping"], group["kl_clip"])
        self.updates += 1

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update by the gradients that `backward` left. Raises RuntimeError as `precondition` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group = self.param_groups[0]
        if self.updates == self._cold_updates:
            self.state.clear()  # plain gradients were on another scale than natural ones are
        self.precondition()
        moved = [p for layer in self._layers for p in layer.parameters if p.grad is not None]
        if moved:
            momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in moved]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, [p.grad for p in moved if p.grad is not None])
            torch._foreach_add_(moved, momenta, alpha=-group["lr"] * (1 - group["momentum"]))
        if self._fallback is not None:
            self._fallback.param_groups[0]["lr"] = group["lr"] * self._fallback_share
            self._fallback.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """All that decides the future: factors, their decompositions, momenta, counters, settings, Adam's state."""
        return {
            "settings": {name: value for name, value in self.param_groups[0].items() if name != "params"},
            "factors": {
                layer.name: {"inputs": layer.inputs.state_dict(), "gradients": layer.gradients.state_dict()}
                for layer in self._layers
            },
            "momenta": {
                name: self.state[parameter]["momentum"]
                for parameter, name in self._names.items()
                if "momentum" in self.state.get(parameter, {})
            },
            "fallback": None if self._fallback is None else self._fallback.state_dict(),
            "updates": self.updates,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state. Raises KeyError when the layers differ."""
        self.param_groups[0].update(state_dict["settings"])
        for layer in self._layers:
            layer.inputs.load_state_dict(state_dict["factors"][layer.name]["inputs"])
            layer.gradients.load_state_dict(state_dict["factors"][layer.name]["gradients"])
        self.state.clear()
        for parameter, name in self._names.items():
            if name in state_dict["momenta"]:
                self.state[parameter]["momentum"] = state_dict["momenta"][name].clone()
        if self._fallback is not None:
            self._fallback.load_state_dict(state_dict["fallback"])
        self.updates = state_dict["updates"]
        self.skipped = state_dict["skipped"]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """A and S of each layer that statistics were taken of, by the layer's name."""
        return {
            layer.name: (layer.inputs.value, layer.gradients.value)
            for layer in self._layers
            if layer.inputs.value is not None and layer.gradients.value is not None
        }

    def _watch(self, layer: _Layer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if self._seen is not None and output.requires_grad:  # a pass without a graph has no gradients
                # The edge, not the output: an activation that works in place changes that.
                self._seen.append((layer, given[0].detach(), get_gradient_edge(output)))

        return hook

    @torch.no_grad()
    def _natural(self, layers: list[_Layer], lr: float, damping: float, kl_clip: float) -> None:
        """Gradients G -> nu dW, with one nu for all layers: their steps are one step of one model."""
        gradients = [layer.gradient() for layer in layers]
        steps = [layer.natural(gradient, damping) for layer, gradient in zip(layers, gradients, strict=True)]
        if not steps:
            return
        # <G, dW> = dW^T (F + damping) dW, so half of it times eta^2 is the step's KL, and a little more.
        quadratic = lr**2 * torch.stack([(g * s).sum() for g, s in zip(gradients, steps, strict=True)]).sum()
        self.nu = (kl_clip / quadratic.clamp(min=1e-30)).sqrt().clamp(max=1.0)
        self.predicted_kl = 0.5 * self.nu.square() * quadratic
        for layer, step in zip(layers, steps, strict=True):
            layer.write(step * self.nu)


def kfac_for(*parts: nn.Module | nn.Parameter | None, lr: float, **settings: Any) -> KFAC:
    """A K-FAC for some modules and parameters that learn together: a torso, its heads, a log_std. None is left out.

    For algorithms that offer it in place of their optimizer. settings: as KFAC's. Networks that share nothing, as a
    policy and a critic of its own, should have one each: a trust region is that of one model.
    """
    whole = nn.Module()
    for position, part in enumerate(parts):
        if isinstance(part, nn.Parameter):
            whole.register_parameter(str(position), part)
        elif part is not None:
            whole.add_module(str(position), part)
    return KFAC(whole, lr, **settings)


def model_log_prob(
    distribution: Distribution | None = None,
    value: Tensor | None = None,
    *,
    value_noise: float = 1.0,
    action: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log-likelihood [N] of what the model itself draws for each row: what `KFAC.observe` is to be given.

    See Wu et al. 2017, section 3.1: a policy draws an action, and a critic a value from N(V, value_noise^2), in reward
    units, independently. action [N, ...]: already drawn from this very distribution, as a policy's own fresh actions
    are; None draws. Actions of replay or of an older policy are not the model's, and must not be given.
    Raises ValueError when there is neither a distribution nor a value.
    """
    total: Tensor | None = None
    if distribution is not None:
        if action is None:
            with torch.no_grad():  # a Gaussian's sample would carry its mean's gradient
                action = distribution.sample(generator)
        total = distribution.log_prob(action)
    if value is not None:
        noise = torch.empty_like(value).normal_(generator=generator)
        drawn = value.detach() + value_noise * noise
        fit = -0.5 * ((value - drawn) / value_noise).square()
        total = fit if total is None else total + fit
    if total is None:
        raise ValueError("model_log_prob: a model has a distribution, a value or both")
    return total


# ---------------------------------------------------------------------------------------------------------- layers


class _Factor:
    """A or S: a running average of second moments, and its eigenvalues and eigenvectors when last decomposed."""

    def __init__(self) -> None:
        self.value: Tensor | None = None  # [D, D]
        self.count = 0  # batches in it
        self.eigenvalues: Tensor | None = None  # [D]
        self.eigenvectors: Tensor | None = None  # [D, D], in columns

    def take(self, new: Tensor, decay: float) -> bool:
        """Take in one batch's moments; False, and nothing changes, when they are not finite."""
        if not bool(new.isfinite().all()):
            return False
        self.count += 1
        if self.value is None:
            self.value = new.clone()
        else:
            # Martens and Grosse 2015, section 5: a plain mean of the first batches, and then a decaying one.
            self.value.lerp_(new, 1 - min(1 - 1 / self.count, decay))
        return True

    def decompose(self) -> None:
        """Bring eigenvalues and eigenvectors up to date; as they were where that fails even with jitter."""
        if self.value is None:
            return
        matrix = self.value
        if len(matrix) <= DOUBLE_UP_TO:
            matrix = matrix.to("cpu", torch.float64)
        for share in (0.0, 1e-6, 1e-3):
            jitter = torch.zeros_like(matrix).fill_diagonal_(share * float(matrix.diagonal().mean()))
            try:
                eigenvalues, eigenvectors = torch.linalg.eigh(matrix + jitter if share else matrix)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # torch's stub lacks it
                continue
            self.eigenvalues = torch.where(eigenvalues < FLOOR, 0.0, eigenvalues).to(self.value)
            self.eigenvectors = eigenvectors.to(self.value)
            return

    def state_dict(self) -> dict[str, Any]:
        """Tensors and a count."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for name in vars(self):
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)


class _Layer:
    """One Linear or Conv2d, its two factors, and its weight and bias as one matrix [outputs, inputs (+ 1)]."""

    def __init__(self, name: str, module: nn.Linear | nn.Conv2d) -> None:
        self.name = name
        self.module = module
        self.weight = module.weight
        self.bias = module.bias if module.bias is not None and module.bias.requires_grad else None
        self.inputs = _Factor()
        self.gradients = _Factor()

    @property
    def parameters(self) -> list[Tensor]:
        """Weight, and bias where it is trained."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def has_gradient(self) -> bool:
        """Whether the last backward reached it."""
        return self.weight.grad is not None

    def gram(self, given: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, int]:
        """Inputs and gradients of the outputs -> sums over all rows and positions of a a^T and g g^T, and their number.

        Linear: [..., F], [..., O]. Conv2d: [N, C, H, W], [N, O, H', W'].
        """
        if isinstance(self.module, nn.Conv2d):
            return self._patches(self.module, given, grad)
        a = given.reshape(-1, given.shape[-1]).to(grad.dtype)
        g = grad.reshape(-1, grad.shape[-1])
        return self._square(a), g.T @ g, len(g)

    def _patches(self, layer: nn.Conv2d, given: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, int]:
        g = grad.movedim(1, -1).reshape(-1, grad.shape[1])
        size = self.weight[0].numel()
        rows = max(1, CHUNK // (size * (len(g) // len(given))))
        total = g.new_zeros(size + (self.bias is not None), size + (self.bias is not None))
        for part in torch.split(given, rows):
            patches = functional.unfold(
                part, layer.kernel_size, layer.dilation, padding=_numbers(layer), stride=layer.stride
            )
            total += self._square(patches.transpose(1, 2).reshape(-1, size).to(g.dtype))
        return total, g.T @ g, len(g)

    def _square(self, a: Tensor) -> Tensor:
        if self.bias is not None:
            a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        return a.T @ a

    def decompose(self) -> None:
        """Bring both decompositions up to date."""
        self.inputs.decompose()
        self.gradients.decompose()

    def gradient(self) -> Tensor:
        """The loss's gradient, as one matrix [outputs, inputs (+ 1)]."""
        assert self.weight.grad is not None
        matrix = self.weight.grad.flatten(1)
        if self.bias is None:
            return matrix
        column = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([matrix, column.unsqueeze(1)], 1)

    def natural(self, gradient: Tensor, damping: float) -> Tensor:
        """(A (x) S + damping)^-1 times the gradient, exactly, by eigenvectors. Raises RuntimeError without factors."""
        if self.inputs.eigenvalues is None or self.gradients.eigenvalues is None:
            # Its first statistics may be younger than the last decomposition.
            self.decompose()
        da, qa = self.inputs.eigenvalues, self.inputs.eigenvectors
        ds, qs = self.gradients.eigenvalues, self.gradients.eigenvectors
        if da is None or qa is None or ds is None or qs is None:
            raise RuntimeError(
                f"layer {self.name!r} has a gradient of the loss, but no finite statistics: "
                "observe() a log_prob that depends on it, or leave it out of this K-FAC"
            )
        return qs @ ((qs.T @ gradient @ qa) / (torch.outer(ds, da) + damping)) @ qa.T

    def write(self, step: Tensor) -> None:
        """A matrix [outputs, inputs (+ 1)] -> the gradients of weight and bias."""
        columns = step.shape[1] - (self.bias is not None)
        self.weight.grad = step[:, :columns].reshape_as(self.weight).contiguous()
        if self.bias is not None:
            self.bias.grad = step[:, columns].contiguous()


def _layers(module: nn.Module) -> list[_Layer]:
    """The layers whose Fisher blocks factor. A subclass may compute anything, so only the two classes themselves."""
    owners = Counter(id(parameter) for part in module.modules() for parameter in part.parameters(recurse=False))
    layers = []
    for name, part in module.named_modules():
        if type(part) is nn.Linear or (type(part) is nn.Conv2d and _plain(part)):
            assert isinstance(part, nn.Linear | nn.Conv2d)
            shared = any(owners[id(parameter)] > 1 for parameter in part.parameters(recurse=False))
            if part.weight.requires_grad and not shared:
                layers.append(_Layer(name, part))
    return layers


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _numbers(layer: nn.Conv2d) -> tuple[int, ...]:
    assert not isinstance(layer.padding, str), "a layer with padding by name is not ours"
    return layer.padding
