"""Codes of a quantiser: which entry of a code book a vector is."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..devices import placed
from ..errors import CorruptBank
from .base import Encoder, Rows


class Codebook(Encoder):
    """`z_k = 1` where entry k is the nearest, else 0; decoded, it is that entry.

    A code is one thing or another, so its amount is neither added to nor clamped: `sl.Swap` puts another in its place, exactly,
    and `sl.Patch` the codes of another run.

    Args:
        decoder: `[n, D]`, the entries.

    >>> book = Codebook(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    >>> book.encode(torch.tensor([[0.2, 0.1], [0.9, 0.8]]))
    tensor([[1., 0.],
            [0., 1.]])
    """

    kind: ClassVar[str] = "codebook"
    tensors: ClassVar[tuple[str, ...]] = ("decoder",)
    discrete: ClassVar[bool] = True

    def __init__(self, decoder: Float[Tensor, "n D"]):
        if decoder.ndim != 2 or not decoder.isfinite().all():
            raise CorruptBank(f"expected finite entries [n, D] of a code book, got a tensor {tuple(decoder.shape)}")
        self.decoder = decoder.float()

    @classmethod
    def competes(cls, settings: Mapping[str, Any]) -> bool:  # noqa: ARG003
        return True

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Codebook":  # noqa: ARG003
        return cls(tensors["decoder"])

    def to_tensors(self) -> dict[str, Tensor]:
        return {"decoder": self.decoder}

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        book = placed(self.decoder, x.device)
        nearest = torch.cdist(x.float().flatten(0, -2), book).argmin(-1)
        return torch.nn.functional.one_hot(nearest, len(book)).float().reshape(*x.shape[:-1], len(book))

    def decode(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D"]:
        return z @ placed(self.decoder, z.device)

    def rows(self, indices: Sequence[int]) -> Rows:
        """Alone, a row says how near its entry is beside one of zeros; which is nearest takes all of them."""
        entries = self.decoder[list(indices)]
        return Rows(entries, -entries.square().sum(-1) / 2, entries, torch.zeros(len(entries)))
