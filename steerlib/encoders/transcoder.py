"""Transcoder: reads what goes into a part of the model and writes what comes out of it (Dunefsky et al. 2024, 2406.11944)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from ..errors import CorruptBank
from .sparse import Sparse
from .topk import top


class Transcoder(Sparse):
    """Latents are read at one site and written at a later one: `y^ = z D + b_d + x S^T`.

    Args: those of `Sparse`, where the decoder's width D2 may differ from the encoder's, and
        threshold: `[n]`; `z = p where p > threshold, else 0`.
        k: If given, the k largest potentials are kept instead.
        skip: `[D2, D]`, S: a linear part beside the latents (Paulo et al. 2025, 2501.18823).
    """

    kind: ClassVar[str] = "transcoder"
    tensors: ClassVar[tuple[str, ...]] = (*Sparse.tensors, "threshold")
    shared: ClassVar[tuple[str, ...]] = (*Sparse.shared, "skip")

    threshold: Tensor
    skip: Tensor | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip is not None and self.skip.shape != (self.decoder.shape[1], self.encoder.shape[1]):
            raise CorruptBank(f"expected skip as [out, in], got {tuple(self.skip.shape)}")

    @classmethod
    def competes(cls, settings: Mapping[str, Any]) -> bool:
        return settings.get("k") is not None

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return super().select(p) if self.k is None else top(p, self.k)

    def reconstruct(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D2"]:
        y = super().reconstruct(x)
        return y if self.skip is None else y + x.float() @ self.skip.T.to(x.device).float()
