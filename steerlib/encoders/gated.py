"""Gated: one bias decides whether a latent fires, another by how much (Rajamanoharan et al. 2024, 2404.16014)."""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from .base import Rows
from .objective import Cost, Objective, Weights
from .sparse import Sparse


def cost(w: Weights, x: Tensor, y: Tensor, root: float, scale: float) -> Cost:  # noqa: ARG001
    """L1 of the gate's potentials, in root variances; and what they lack as a code of their own, read by a decoder that does
    not learn from it."""
    u = x @ w["encoder"].T
    gate = (u + w["gate_bias"]).relu()
    z = (u * w["log_scale"].exp() + w["bias"]).relu() * (gate > 0)
    alone = (x @ w["encoder"].T + w["gate_bias"]).relu() @ w["decoder"].detach()
    return Cost(y - z @ w["decoder"], z, gate.sum() / root, (y.detach() - alone).square().sum())


class Gated(Sparse):
    """With `u = x E^T`: `z = max(exp(r) u + b, 0)` where `u + gate_bias > 0`, else 0.

    Args: those of `Sparse`, and
        gate_bias: `[n]`.
        log_scale: `[n]`, r: the logarithm of how much steeper the magnitude is than the gate.
    """

    kind: ClassVar[str] = "gated"
    tensors: ClassVar[tuple[str, ...]] = (*Sparse.tensors, "gate_bias", "log_scale")
    objective: ClassVar[Objective] = Objective(
        loss=cost,
        begin=lambda zeros, _: {"gate_bias": zeros.clone(), "log_scale": zeros.clone()},
        potentials=("bias", "gate_bias"),
    )

    gate_bias: Tensor
    log_scale: Tensor

    def potential(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        u = self.projected(x)
        return u * self.log_scale.to(u).exp() + self.bias.to(u)

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        u = self.projected(x)
        p = u * self.log_scale.to(u).exp() + self.bias.to(u)
        return p.clamp(min=0) * (u + self.gate_bias.to(u) > 0)

    def thresholds(self) -> Float[Tensor, " n"]:
        """`u > -gate_bias` in terms of p."""
        return self.bias.float() - self.log_scale.float().exp() * self.gate_bias.float()

    def rows(self, indices: Sequence[int]) -> Rows:
        chosen = list(indices)
        flat, steep = super().rows(chosen), self.log_scale[chosen].float().exp()
        bias = self.bias[chosen].float()
        return flat._replace(read=flat.read * steep[:, None], bias=(flat.bias - bias) * steep + bias)
