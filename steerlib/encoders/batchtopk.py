"""BatchTopK: trained to keep k latents of a token on average, read by one threshold (Bussmann et al. 2024, 2412.06410)."""

from typing import ClassVar

from .objective import Objective
from .sparse import Sparse


class BatchTopK(Sparse):
    """`z = p where p > threshold, else 0`.

    Args: those of `Sparse`, and
        k: Latents that fire on a token, on average.
        threshold: Mean, over training batches, of the least potential that was kept.
    """

    kind: ClassVar[str] = "batchtopk"
    objective: ClassVar[Objective] = Objective(keeps="batch", settings=("k", "threshold"), transcodes=True)

    k: float
    threshold: float
