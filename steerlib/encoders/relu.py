"""ReLU: every positive potential is kept (Bricken et al. 2023, "Towards Monosemanticity")."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from .sparse import Sparse


class ReLU(Sparse):
    """`z = max(p, 0)`."""

    kind: ClassVar[str] = "relu"

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return p.clamp(min=0)
