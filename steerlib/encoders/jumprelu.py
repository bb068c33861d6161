"""JumpReLU: a potential is kept whole where it is above the latent's own threshold (Rajamanoharan et al. 2024, 2407.14435)."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from .objective import Cost, Objective, Weights
from .sparse import Sparse

BANDWIDTH = 0.05
"""Width of the window through which a threshold learns, where activations are as long as the root of their width."""


class Jump(torch.autograd.Function):
    """p where p > theta, else 0; and 1 there, else 0. Their derivatives by theta are -theta/w and -1/w in a window of width w
    around it (equations 10 and 11)."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(p, theta)
        ctx.width = width
        return p * (p > theta), (p > theta).to(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        p, theta = ctx.saved_tensors
        near = ((p - theta).abs() < ctx.width / 2).to(p)
        by_value, by_count = ((grad * near).sum(0) for grad in grads)
        return grads[0] * (p > theta), -by_value * theta / ctx.width - by_count / ctx.width, None


def cost(w: Weights, x: Tensor, y: Tensor, root: float, scale: float) -> Cost:  # noqa: ARG001
    """The number of latents that fire."""
    p, theta = (x @ w["encoder"].T + w["bias"]).relu(), w["log_threshold"].exp()
    z, fires = Jump.apply(p, theta, BANDWIDTH * scale)
    return Cost(y - z @ w["decoder"], z, fires.sum())


def finished(w: Weights) -> Weights:
    """With thresholds in place of their logarithms, which were trained since those stay positive."""
    return {**{name: w[name] for name in w if name != "log_threshold"}, "threshold": w["log_threshold"].exp()}


class JumpReLU(Sparse):
    """`z = p where p > threshold, else 0`; strictly above, and never below 0.

    Args: those of `Sparse`, and
        threshold: `[n]`, in units of p.

    >>> eye, half = torch.eye(2), torch.full((2,), 0.5)
    >>> JumpReLU(encoder=eye, bias=torch.zeros(2), decoder=eye, threshold=half).encode(torch.tensor([0.5, 0.75]))
    tensor([0.0000, 0.7500])
    """

    kind: ClassVar[str] = "jumprelu"
    tensors: ClassVar[tuple[str, ...]] = (*Sparse.tensors, "threshold")
    objective: ClassVar[Objective] = Objective(
        loss=cost,
        begin=lambda zeros, scale: {"log_threshold": torch.full_like(zeros, BANDWIDTH * scale).log()},
        finish=finished,
        potentials=("bias", "threshold"),
        transcodes=True,
    )

    threshold: Tensor
