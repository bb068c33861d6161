"""Linear directions: one vector per concept."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..devices import placed
from ..errors import CorruptBank
from .base import Encoder, Rows


class Directions(Encoder):
    """`z = <x, d> / |d|^2 - mean`, and `x` moves by `d` for each raw unit of `z`.

    Args:
        decoder: `[n, D]`, the directions d.
        mean: `[n]`, what is taken off so that z is 0 on average on reference data; 0 where nothing was measured.

    >>> encoder = Directions(torch.tensor([[2.0, 0.0]]))
    >>> encoder.encode(torch.tensor([3.0, 5.0])), encoder.decode(torch.tensor([1.5]))
    (tensor([1.5000]), tensor([3., 0.]))
    """

    kind: ClassVar[str] = "directions"
    tensors: ClassVar[tuple[str, ...]] = ("decoder", "mean")

    def __init__(self, decoder: Float[Tensor, "n D"], mean: Float[Tensor, " n"] | None = None):
        if decoder.ndim != 2 or not decoder.isfinite().all() or (decoder.norm(dim=-1) == 0).any():
            raise CorruptBank(f"expected finite, non-zero directions [n, D], got a tensor {tuple(decoder.shape)}")
        self.decoder = decoder.float()
        self.mean = torch.zeros(len(decoder)) if mean is None else mean.float()
        if self.mean.shape != decoder.shape[:1] or not self.mean.isfinite().all():
            raise CorruptBank(f"expected {len(decoder)} finite means, got {tuple(self.mean.shape)}")
        self.encoder = self.decoder / self.decoder.square().sum(-1, keepdim=True)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Directions":  # noqa: ARG003
        return cls(tensors["decoder"], tensors["mean"])

    def to_tensors(self) -> dict[str, Tensor]:
        return {"decoder": self.decoder, "mean": self.mean}

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        return x.float() @ placed(self.encoder, x.device).T - placed(self.mean, x.device)

    def decode(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D"]:
        return (z + placed(self.mean, z.device)) @ placed(self.decoder, z.device)

    def rows(self, indices: Sequence[int]) -> Rows:
        chosen = list(indices)
        return Rows(self.encoder[chosen], -self.mean[chosen], self.decoder[chosen], torch.full((len(chosen),), -inf))
