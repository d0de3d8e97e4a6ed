"""torch's optimizers without what they do for torch.compile. Knows statistics and steps, no names and no algorithm.

The first call of nearly every method of torch's optimizers imports torch._dynamo: 35 MB, and a second of start-up. Each
step then asks it again, and is put into a record for the profiler, which costs as much as a small step itself. Nothing
here is compiled or profiled, so that these classes leave that out. What a step gives, settings, statistics and state
dicts are torch's own: a save of the one loads into the other. Hooks of steps are never called.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longrein.learn.arrays import Arrays, Views

_ONE = torch.tensor(1.0)  # torch makes a tensor of a plain number for each tensor that it is added to


class Eager:
    """A parent to stand before torch.optim.Optimizer: its methods, as torch has them below its wrappers."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients: None in their place, or else zeros."""
        for group in self.param_groups:
            for p in group["params"]:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad.requires_grad_(False).zero_()

    def _patch_step_function(self) -> None:
        """Leave `step` as it is: torch would put it into its record here."""


def eager(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A class of torch.optim as it is here."""
    if kind is torch.optim.Adam:
        return Adam
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (Eager, kind), {"step": step, "__doc__": kind.__doc__, "__module__": __name__})


class Adam(Eager, torch.optim.Adam):
    """torch.optim.Adam, whose fused step goes straight to its one operation: a quarter of the time for few numbers."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step along the gradients; a parameter without one stays. Overloads are left to torch."""
        if not all(group["fused"] and _alike(group["params"]) for group in self.param_groups):
            return _plain_adam(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._step(group)
        return loss

    def _step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        if not all(self.state[p] for p in params):  # the first step
            init: Callable[..., bool] = self._init_group  # torch annotates it as its parent's
            init(group, [], [], [], [], [], [])
        states = [self.state[p] for p in params]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, _ONE, alpha=1.0)
        step = torch._fused_adamw_ if group.get("decoupled_weight_decay") else torch._fused_adam_
        step(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
        )


def quick_adam(optimizer: Adam, views: Views[Arrays]) -> None:
    """`step` of an optimizer of one parameter with few numbers, by NumPy: torch takes as long to begin each operation.

    views: the optimizer's own, to look at what it steps.
    """
    (group,) = optimizer.param_groups
    (parameter,) = group["params"]
    state = optimizer.state[parameter]
    if not state or parameter.grad is None or group["weight_decay"] or group["amsgrad"] or group["maximize"]:
        optimizer.step()
        return
    value, gradient, mean, square, step = views.of(
        [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    )
    step += 1.0
    (beta1, beta2), steps = group["betas"], float(step)
    mean += (1.0 - beta1) * (gradient - mean)
    square *= beta2
    gradient = gradient * gradient
    gradient *= 1.0 - beta2
    square += gradient
    root = np.sqrt(square)
    root /= math.sqrt(1.0 - beta2**steps)
    root += group["eps"]
    np.divide(mean, root, out=root)
    root *= group["lr"] / (1.0 - beta1**steps)
    value -= root


_plain_adam: Callable[..., float | None] = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


def _alike(params: list[Tensor]) -> bool:
    """Whether one operation can take them all: one type of numbers, on one device."""
    return len(params) == 1 or len({(p.dtype, p.device) for p in params}) <= 1
