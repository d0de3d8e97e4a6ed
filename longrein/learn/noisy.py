"""Linear layers whose weights carry learnt noise: exploration that depends on the state. Knows no algorithm.

See "Noisy Networks for Exploration", Fortunato et al. 2018 (arXiv:1706.10295). Whoever owns a network with such layers
decides when the noise changes, by `resample`; a layer never draws by itself. All rows of a batch share one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from longrein.errors import SpecError

KINDS = ("none", "independent", "factorised")


class NoisyLinear(nn.Module):
    """y = (M + S o E) x + (m + s o e), [N, inputs] -> [N, outputs]: means and deviations are learnt, E and e are noise.

    kind: `independent` draws every entry of E (eq. 9); `factorised` makes E = f(e_out) f(e_in)^T and e = f(e_out) of
    inputs + outputs numbers, with f(x) = sgn(x) sqrt|x| (eq. 10 and 11).
    sigma: S at the start; None takes the paper's, 0.017 or 0.5 / sqrt(inputs). Without noise until `resample`.
    """

    weight_noise: Tensor
    bias_noise: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kind: str = "factorised",
        sigma: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS[1:]:
            raise SpecError("noisy", f"{kind!r} is none", hint="one of " + ", ".join(KINDS))
        self.kind = kind
        self.quiet = False  # whether the means alone are used
        factorised = kind == "factorised"
        bound = math.sqrt((1.0 if factorised else 3.0) / inputs)
        if sigma is None:
            sigma = 0.5 / math.sqrt(inputs) if factorised else 0.017
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound, generator=generator))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma))
        # Factorised noise is kept as its inputs' part, a row [1, inputs]: the product is made when it is used.
        self.register_buffer("weight_noise", torch.zeros(1 if factorised else outputs, inputs))
        self.register_buffer("bias_noise", torch.zeros(outputs))

    def resample(self, generator: torch.Generator | None = None) -> None:
        """Draw other noise, in use from the next `forward` on."""
        for noise in (self.weight_noise, self.bias_noise):
            noise.normal_(generator=generator)
            if self.kind == "factorised":
                noise.copy_(noise.sign() * noise.abs().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        if self.quiet:
            return nn.functional.linear(x, self.weight, self.bias)
        noise = self.weight_noise
        if self.kind == "factorised":
            noise = self.bias_noise.unsqueeze(1) * noise
        weight = torch.addcmul(self.weight, self.weight_sigma, noise)
        return nn.functional.linear(x, weight, torch.addcmul(self.bias, self.bias_sigma, self.bias_noise))


def resample(module: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw other noise in every noisy layer of a module."""
    for layer in noisy_layers(module):
        layer.resample(generator)


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """No noise in a module's layers within this block, as evaluation has it; the sample they hold is kept."""
    layers = [layer for layer in noisy_layers(module) if not layer.quiet]
    for layer in layers:
        layer.quiet = True
    try:
        yield
    finally:
        for layer in layers:
            layer.quiet = False


def noisy_layers(module: nn.Module) -> list[NoisyLinear]:
    """Those of a module."""
    return [layer for layer in module.modules() if isinstance(layer, NoisyLinear)]
