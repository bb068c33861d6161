"""Matryoshka: latents in groups, the first of which reconstruct alone already (Bussmann et al. 2025, 2503.17547)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CorruptBank
from .base import fired
from .sparse import Sparse


class Matryoshka(Sparse):
    """Read like BatchTopK; `groups` are the sizes of the groups, the most general latents first."""

    kind: ClassVar[str] = "matryoshka"

    def __init__(self, *, groups: Sequence[int], k: float, threshold: float, **others: Any):
        self.groups, self.k, self.threshold = list(groups), k, threshold
        super().__init__(**others)
        if sum(self.groups) != len(self.encoder) or min(self.groups) < 1:
            raise CorruptBank(f"expected groups that make up {len(self.encoder)} latents, got {self.groups}")

    @classmethod
    def of_rows(cls, settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
        return {**settings, "groups": [rows]}

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "groups": self.groups, "k": self.k, "threshold": self.threshold}

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return fired(p, torch.full_like(p[..., :1], max(0.0, self.threshold)))

    def thresholds(self) -> Float[Tensor, " n"]:
        return torch.full((len(self.encoder),), self.threshold)

    def first(self, groups: int) -> "Matryoshka":
        """The first groups alone: an encoder of fewer, more general latents."""
        n = sum(self.groups[:groups])
        tensors = {name: t if name in self.shared else t[:n] for name, t in self.to_tensors().items()}
        return Matryoshka.from_tensors(tensors, {**self.settings, "groups": self.groups[:groups]})
