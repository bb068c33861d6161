"""BatchTopK: trained to keep k latents of a token on average, read by one threshold (Bussmann et al. 2024, 2412.06410)."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from .base import fired
from .sparse import Sparse


class BatchTopK(Sparse):
    """`z = p where p > threshold, else 0`, with the mean, over training batches, of the least potential kept as threshold."""

    kind: ClassVar[str] = "batchtopk"

    def __init__(self, *, k: float, threshold: float, **others: Any):
        self.k, self.threshold = k, threshold
        super().__init__(**others)

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "k": self.k, "threshold": self.threshold}

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return fired(p, torch.full_like(p[..., :1], max(0.0, self.threshold)))

    def thresholds(self) -> Float[Tensor, " n"]:
        return torch.full((len(self.encoder),), self.threshold)
