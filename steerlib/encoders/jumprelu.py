"""JumpReLU: a potential is kept whole where it is above the latent's own threshold (Rajamanoharan et al. 2024, 2407.14435)."""

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from .base import fired
from .sparse import Sparse


class JumpReLU(Sparse):
    """`z = p where p > threshold, else 0`; strictly above, and never below 0."""

    kind: ClassVar[str] = "jumprelu"
    tensors: ClassVar[tuple[str, ...]] = (*Sparse.tensors, "threshold")

    def __init__(self, *, threshold: Tensor, **others: Any):
        self.threshold = threshold
        super().__init__(**others)

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return fired(p, self.threshold.to(p).clamp(min=0))

    def thresholds(self) -> Float[Tensor, " n"]:
        return self.threshold
