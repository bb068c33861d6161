"""Gated: one bias decides whether a latent fires, another by how much (Rajamanoharan et al. 2024, 2404.16014)."""

from collections.abc import Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from .base import Rows
from .sparse import Sparse


class Gated(Sparse):
    """With `u = x E^T`: `z = max(exp(r) u + b, 0)` where `u + gate_bias > 0`, else 0."""

    kind: ClassVar[str] = "gated"
    tensors: ClassVar[tuple[str, ...]] = (*Sparse.tensors, "gate_bias", "log_scale")

    def __init__(self, *, gate_bias: Tensor, log_scale: Tensor, **others: Any):
        """`log_scale` is r, the logarithm of how much steeper the magnitude is than the gate."""
        self.gate_bias, self.log_scale = gate_bias, log_scale
        super().__init__(**others)

    def potential(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        u = self.projected(x)
        return u * self.log_scale.to(u).exp() + self.bias.to(u)

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        u = self.projected(x)
        p = u * self.log_scale.to(u).exp() + self.bias.to(u)
        return p.clamp(min=0) * (u + self.gate_bias.to(u) > 0)

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return p.clamp(min=0) * (p > self.thresholds().to(p.device))

    def thresholds(self) -> Float[Tensor, " n"]:
        """`u > -gate_bias` in terms of p."""
        return self.bias.float() - self.log_scale.float().exp() * self.gate_bias.float()

    def rows(self, indices: Sequence[int]) -> Rows:
        chosen = list(indices)
        flat, steep = super().rows(chosen), self.log_scale[chosen].float().exp()
        bias = self.bias[chosen].float()
        return flat._replace(read=flat.read * steep[:, None], bias=(flat.bias - bias) * steep + bias)
