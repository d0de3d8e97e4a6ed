"""Optimizers by name, and the RMSProp that A3C's authors and TensorFlow mean. Knows tensors, no network."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from longrein.errors import SpecError
from longrein.learn.eager import Eager, eager

# LBFGS wants to evaluate the loss itself, SparseAdam sparse gradients, Muon matrices only.
_UNFIT = {"optimizer", "lbfgs", "sparseadam", "muon"}


def make_optimizer(name: str, params: Iterable[Tensor], lr: float, **settings: Any) -> torch.optim.Optimizer:
    """An optimizer: `rmsprop_tf`, or one of torch.optim by its name in any case (adam, sgd, rmsprop, adamw ...).

    settings: the optimizer's own keywords. Fused or foreach where it can be, unless a setting says otherwise.
    Raises SpecError for an unknown name, or a setting that the optimizer does not take.
    """
    known = optimizer_classes()
    if name.lower() not in known:
        near = get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "one of " + ", ".join(known)
        raise SpecError("agent.algorithm.optimizer", f"there is no optimizer {name!r}", hint=hint)
    maker = known[name.lower()]
    keywords = inspect.signature(maker).parameters
    for setting in settings:
        if setting not in keywords or setting in ("params", "lr"):
            takes = ", ".join(key for key in keywords if key not in ("params", "lr"))
            raise SpecError(
                "agent.algorithm.optimizer_settings", f"{name} has no setting {setting!r}", hint=f"one of {takes}"
            )
    params = list(params)
    faster = {} if {"fused", "foreach"} & settings.keys() else _faster(keywords, len(params))
    try:
        return maker(params, lr=lr, **faster, **settings)
    except (ValueError, TypeError) as error:
        raise SpecError("agent.algorithm.optimizer_settings", f"{name}: {error}") from error


def optimizer_classes() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """What `make_optimizer` knows: {name in lower case: class}."""
    found: dict[str, Callable[..., torch.optim.Optimizer]] = {"rmsprop_tf": RMSpropTF}
    for name, value in vars(torch.optim).items():
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and name.lower() not in _UNFIT:
            found[name.lower()] = eager(value)
    return found


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step use this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The statistics of each parameter as they are before the first step, which otherwise makes them.

    For rmsprop_tf, and for those of torch.optim whose statistics all start at 0 (adam, adamw, rmsprop, sgd).
    Leaves the optimizer without gradients; its parameters stay as they are.
    """
    if isinstance(optimizer, RMSpropTF):
        optimizer.prepare()
    else:
        rates = [group["lr"] for group in optimizer.param_groups]
        for parameter in _parameters(optimizer):
            parameter.grad = torch.zeros_like(parameter)
        set_lr(optimizer, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    states = []
    for parameter in _parameters(optimizer):
        state = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
        for value in state.values():
            if not isinstance(optimizer, RMSpropTF):
                value.zero_()
        states.append(state)
    return states


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _faster(keywords: Iterable[str], tensors: int) -> dict[str, bool]:
    if "fused" in keywords:
        return {"fused": True}
    # For one tensor alone, foreach is the slower: it groups tensors first.
    return {"foreach": tensors > 1} if "foreach" in keywords else {}


def rmsprop_tf_(
    params: list[Tensor],
    gradients: list[Tensor],
    square_averages: list[Tensor],
    *,
    lr: float,
    alpha: float,
    eps: float,
) -> None:
    """One step of RMSProp with epsilon inside the root, in place.

    See "Asynchronous Methods for Deep RL", Mnih et al. 2016, eq. S2 and S3 (arXiv:1602.01783):
    g <- alpha g + (1 - alpha) d^2, then theta <- theta - lr d / sqrt(g + eps).
    """
    torch._foreach_mul_(square_averages, alpha)
    torch._foreach_addcmul_(square_averages, gradients, gradients, 1 - alpha)
    root = torch._foreach_add(square_averages, eps)
    torch._foreach_sqrt_(root)
    torch._foreach_addcdiv_(params, gradients, root, -lr)


class RMSpropTF(Eager, torch.optim.Optimizer):
    """RMSProp as TensorFlow has it: epsilon inside the root, and averages of squares that start at 1.

    torch.optim.RMSprop has sqrt(g) + eps and starts at 0, so that its first step is lr / sqrt(1 - alpha) in every
    direction: with the settings of A2C's authors ten times lr. That is another optimizer, and A2C learns worse by it.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 7e-4,
        alpha: float = 0.99,
        eps: float = 1e-5,
        momentum: float = 0.0,
        initial: float = 1.0,
    ) -> None:
        """alpha: weight of the past in the averages; initial: where these start; momentum: of the step, after it."""
        if not 0 <= alpha < 1 or eps < 0 or not 0 <= momentum < 1 or initial < 0:
            raise ValueError(f"alpha {alpha}, momentum {momentum} from 0 to below 1; eps {eps}, initial {initial} >= 0")
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum, "initial": initial})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step along the gradients; a parameter without one stays. Raises nothing; overloads left to torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            self._begin(params, group)
            squares = [self.state[p]["square_average"] for p in params]
            gradients = [p.grad for p in params]
            plain = {"alpha": group["alpha"], "eps": group["eps"]}
            if group["momentum"] == 0:
                rmsprop_tf_(params, gradients, squares, lr=group["lr"], **plain)
                continue
            velocities = [self.state[p]["velocity"] for p in params]
            torch._foreach_mul_(velocities, group["momentum"])
            rmsprop_tf_(velocities, gradients, squares, lr=-group["lr"], **plain)
            torch._foreach_sub_(params, velocities)
        return loss

    def prepare(self) -> None:
        """Begin the averages now, rather than at the first step."""
        for group in self.param_groups:
            self._begin(group["params"], group)

    def _begin(self, params: Sequence[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["square_average"] = torch.full_like(p, group["initial"])
                if group["momentum"] > 0:
                    self.state[p]["velocity"] = torch.zeros_like(p)


def views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Numbers [P] as views in the forms of parameters, one after the other."""
    pieces = torch.split(flat, [p.numel() for p in parameters])
    return [piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)]


def look_at(parameters: Sequence[Tensor], flat: Tensor) -> None:
    """Make parameters views of these numbers [P]."""
    for p, piece in zip(parameters, views(flat, parameters), strict=True):
        p.data = piece


class FlatParameters:
    """Parameters, and their gradients, as views of one tensor each: an optimizer's step is then one operation.

    For the few small tensors of a policy on a CPU that halves the time of clipping and stepping. Give the optimizer
    [flat.whole], and call `zero_grad` here: setting a gradient to None would cut it off from the whole.
    Parameters that need no gradient are left as they are.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter]) -> None:
        params = [p for p in params if p.requires_grad]
        self.whole = torch.nn.Parameter(torch.cat([p.detach().reshape(-1) for p in params]))
        self.gradient = self.whole.grad = torch.zeros_like(self.whole)
        look_at(params, self.whole.data)
        for p, gradient in zip(params, views(self.gradient, params), strict=True):
            p.grad = gradient

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.gradient.zero_()

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """Scale the gradients to a global norm of `max_norm` at most; the norm before, a scalar."""
        norm: Tensor = self.gradient.norm()
        self.gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def quick_clip_(self, max_norm: float) -> float:
        """As `clip_`, of few parameters: in NumPy."""
        gradient = self.gradient.numpy()
        # Of more than 10,000 numbers OpenBLAS would ask other threads.
        parts = (gradient[begin : begin + 8192] for begin in range(0, len(gradient), 8192))
        norm = math.sqrt(sum(float(part.dot(part)) for part in parts))
        scale = max_norm / (norm + 1e-6)
        if scale < 1.0:
            gradient *= scale
        return norm
