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
        decoder: `[n, D]`, the directions d, or one vector for each.
        mean: `[n]`, what is taken off so that z is 0 on average on reference data; 0 where nothing was measured.

    >>> encoder = Directions(torch.tensor([[2.0, 0.0]]))
    >>> encoder.encode(torch.tensor([3.0, 5.0])), encoder.decode(torch.tensor([1.5]))
    (tensor([1.5000]), tensor([3., 0.]))
    """

    kind: ClassVar[str] = "directions"
    tensors: ClassVar[tuple[str, ...]] = ("decoder", "mean")

    def __init__(self, decoder: Float[Tensor, "n D"] | Sequence[Tensor], mean: Float[Tensor, " n"] | None = None):
        self._given, self._mean = decoder, torch.zeros(len(decoder)) if mean is None else mean
        whole = _stacked(decoder)
        if whole.ndim != 2 or not whole.isfinite().all() or (whole.norm(dim=-1) == 0).any():
            raise CorruptBank(f"expected finite, non-zero directions [n, D], got a tensor {tuple(whole.shape)}")
        if self.mean.shape != whole.shape[:1] or not self.mean.isfinite().all():
            raise CorruptBank(f"expected {len(whole)} finite means, got {tuple(self.mean.shape)}")
        learns = whole.requires_grad or self._mean.requires_grad or any(row.requires_grad for row in decoder)
        self._fixed = None if learns else (whole, _dual(whole))

    @property
    def learns(self) -> bool:
        return self._fixed is None

    @property
    def decoder(self) -> Float[Tensor, "n D"]:
        """The directions d."""
        return _stacked(self._given) if self._fixed is None else self._fixed[0]

    @property
    def encoder(self) -> Float[Tensor, "n D"]:
        """`d / |d|^2`."""
        return _dual(self.decoder) if self._fixed is None else self._fixed[1]

    @property
    def mean(self) -> Float[Tensor, " n"]:
        """What is taken off readings."""
        return self._mean.float()

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
        chosen, low = list(indices), torch.full((len(indices),), -inf)
        if self._fixed is not None:
            return Rows(self.encoder[chosen], -self.mean[chosen], self.decoder[chosen], low)
        d = _stacked([self._given[k] for k in chosen])  # where each learns
        return Rows(_dual(d), -self.mean.to(d.device)[chosen], d, low.to(d.device))


def _stacked(decoder: Tensor | Sequence[Tensor]) -> Tensor:
    return (
        decoder.float() if isinstance(decoder, Tensor) else torch.stack([row.float().to(decoder[0].device) for row in decoder])
    )


def _dual(decoder: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
    return decoder / decoder.square().sum(-1, keepdim=True)
