"""Loss and gradient of encoders that pay for what fires: ReLU, JumpReLU and Gated, by autograd over whole codes.

Letters as in `sparse_step`. All losses are |y - y^|^2 / (N V) and a price times what fires, each token's mean.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .encoder_recipe import EncoderRecipe
from .sparse_step import Outcome

BANDWIDTH = 0.05
"""Width of the window through which a JumpReLU's threshold learns, where activations are as long as the root of their width."""
Weights = dict[str, Tensor]
Loss = tuple[Float[Tensor, "N D2"], Float[Tensor, "N n"], Tensor]
"""What the reconstruction lacks, the code, and the price of it, summed over tokens."""


class Step(torch.autograd.Function):
    """1 where p > theta, whose derivative by theta is -1/w in a window of width w around it (2407.14435, equation 11)."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(p, theta)
        ctx.width = width
        return (p > theta).to(p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        p, theta = ctx.saved_tensors
        near = ((p - theta).abs() < ctx.width / 2).to(p)
        return None, -(grads[0] * near).sum(0) / ctx.width, None


class Jump(torch.autograd.Function):
    """p where p > theta, else 0; its derivative by theta is -theta/w in that window (2407.14435, equation 10)."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(p, theta)
        ctx.width = width
        return p * (p > theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        p, theta = ctx.saved_tensors
        near = ((p - theta).abs() < ctx.width / 2).to(p)
        return grads[0] * (p > theta), -(grads[0] * near).sum(0) * theta / ctx.width, None


def relu_loss(w: Weights, x: Tensor, y: Tensor, root: float, scale: float) -> Loss:  # noqa: ARG001
    """L1 of readings, each times the length of what it writes, in root variances (Anthropic, April 2024 update)."""
    z = (x @ w["encoder"].T + w["bias"]).relu()
    return y - z @ w["decoder"], z, (z * w["decoder"].norm(dim=-1)).sum() / root


def jumprelu_loss(w: Weights, x: Tensor, y: Tensor, root: float, scale: float) -> Loss:  # noqa: ARG001
    """The number of latents that fire (2407.14435)."""
    p, theta, width = (x @ w["encoder"].T + w["bias"]).relu(), w["log_threshold"].exp(), BANDWIDTH * scale
    z = Jump.apply(p, theta, width)
    return y - z @ w["decoder"], z, Step.apply(p, theta, width).sum()


def gated_loss(w: Weights, x: Tensor, y: Tensor, root: float, scale: float) -> Loss:  # noqa: ARG001
    """L1 of the gate's potentials, in root variances (2404.16014); what the gate alone lacks is added in `dense_step`."""
    u = x @ w["encoder"].T
    gate = (u + w["gate_bias"]).relu()
    z = (u * w["log_scale"].exp() + w["bias"]).relu() * (gate > 0)
    return y - z @ w["decoder"], z, gate.sum() / root


def gate_alone(w: Weights, x: Tensor, y: Tensor) -> Tensor:
    """Squares of what the gate's potentials lack as a code of their own, read by a decoder that does not learn from it."""
    return (y - (x @ w["encoder"].T + w["gate_bias"]).relu() @ w["decoder"].detach()).square().sum()


LOSSES: dict[str, Callable[[Weights, Tensor, Tensor, float, float], Loss]] = {
    "relu": relu_loss,
    "jumprelu": jumprelu_loss,
    "gated": gated_loss,
}


def dense_step(
    recipe: EncoderRecipe,
    weights: Weights,
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "N D2"] | None,
    *,
    unit: float,
    tokens: int,
    price: float,
    scale: float,
) -> Outcome:
    """One batch of `tokens`, or a process's part of it. `unit` is their N V, `scale` the root mean square of x."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    with torch.enable_grad():
        centred = x - leaves["decoder_bias"] if y is None else x
        target = centred if y is None else y - leaves["decoder_bias"]
        if y is not None and "skip" in leaves:
            target = target - x @ leaves["skip"].T
        rest, z, paid = LOSSES[recipe.kind](leaves, centred, target, (unit / tokens) ** 0.5, scale)
        error = rest.square().sum() / unit
        loss = error + price * paid / tokens
        if recipe.kind == "gated":
            still = leaves["decoder_bias"].detach()
            loss = loss + gate_alone(leaves, centred, x - still if y is None else y - still) / unit
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    if recipe.kind != "relu":
        decoder = weights["decoder"]
        found["decoder"] -= (found["decoder"] * decoder).sum(-1, keepdim=True) * decoder
    return Outcome(found, (z.detach() > 0).sum(0).float(), error.detach(), loss.detach(), error.new_zeros(()))
