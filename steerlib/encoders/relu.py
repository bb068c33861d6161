"""ReLU: every positive potential is kept (Bricken et al. 2023, "Towards Monosemanticity")."""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from .objective import Cost, Objective, Weights
from .sparse import Sparse


def cost(w: Weights, x: Tensor, y: Tensor, root: float, scale: float) -> Cost:  # noqa: ARG001
    """L1 of readings, each times the length of what it writes, in root variances (Anthropic, April 2024 update)."""
    z = (x @ w["encoder"].T + w["bias"]).relu()
    return Cost(y - z @ w["decoder"], z, (z * w["decoder"].norm(dim=-1)).sum() / root)


class ReLU(Sparse):
    """`z = max(p, 0)`.

    Args: those of `Sparse`.

    >>> import torch
    >>> encoder = ReLU(encoder=torch.eye(2), bias=torch.zeros(2), decoder=torch.eye(2))
    >>> encoder.encode(torch.tensor([3.0, -1.0]))
    tensor([3., 0.])
    """

    kind: ClassVar[str] = "relu"
    objective: ClassVar[Objective] = Objective(loss=cost, unit_rows=False, transcodes=True)

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return p.clamp(min=0)
