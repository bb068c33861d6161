"""Transcoder: reads what goes into a part of the model and writes what comes out of it (Dunefsky et al. 2024, 2406.11944)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from ..errors import CorruptBank
from .base import fired
from .sparse import Sparse
from .topk import top


class Transcoder(Sparse):
    """Latents read at one site and write at a later one; `skip` is a linear part beside them (Paulo et al. 2025, 2501.18823).

    With `k` the k largest potentials are kept, otherwise those above `threshold` (0 for a ReLU).
    """

    kind: ClassVar[str] = "transcoder"
    tensors: ClassVar[tuple[str, ...]] = (*Sparse.tensors, "threshold")
    shared: ClassVar[tuple[str, ...]] = (*Sparse.shared, "skip")

    def __init__(
        self,
        *,
        threshold: Tensor,
        skip: Tensor | None = None,
        k: int | None = None,
        **others: Any,
    ):
        self.threshold, self.skip, self.k = threshold, skip, k
        super().__init__(**others)
        if skip is not None and skip.shape != (self.decoder.shape[1], self.encoder.shape[1]):
            raise CorruptBank(f"expected skip as [out, in], got {tuple(skip.shape)}")

    @classmethod
    def competes(cls, settings: Mapping[str, Any]) -> bool:
        return settings.get("k") is not None

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, **({} if self.k is None else {"k": self.k})}

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return fired(p, self.threshold.to(p).clamp(min=0)) if self.k is None else top(p, self.k)

    def thresholds(self) -> Float[Tensor, " n"]:
        return self.threshold

    def reconstruct(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D2"]:
        y = super().reconstruct(x)
        return y if self.skip is None else y + x.float() @ self.skip.T.to(x.device).float()
