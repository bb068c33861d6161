"""Matryoshka: latents in groups, the first of which reconstruct alone already (Bussmann et al. 2025, 2503.17547)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..errors import CorruptBank
from .objective import Objective
from .sparse import Sparse


class Matryoshka(Sparse):
    """Read like BatchTopK: `z = p where p > threshold, else 0`.

    Args: those of `Sparse`, and
        groups: Sizes of the groups, which add up to n; the most general latents come first.
        k: Latents that fire on a token, on average.
        threshold: Mean, over training batches, of the least potential that was kept.
    """

    kind: ClassVar[str] = "matryoshka"
    objective: ClassVar[Objective] = Objective(keeps="batch", grouped=True, settings=("groups", "k", "threshold"))

    groups: Sequence[int]
    k: float
    threshold: float

    def __post_init__(self) -> None:
        self.groups = list(self.groups)
        super().__post_init__()
        if sum(self.groups) != len(self.encoder) or min(self.groups) < 1:
            raise CorruptBank(f"expected groups that make up {len(self.encoder)} latents, got {self.groups}")

    @classmethod
    def of_rows(cls, settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
        return {**settings, "groups": [rows]}

    def first(self, groups: int) -> "Matryoshka":
        """The first groups alone: an encoder of fewer, more general latents."""
        n = sum(self.groups[:groups])
        tensors = {name: t if name in self.shared else t[:n] for name, t in self.to_tensors().items()}
        return Matryoshka.from_tensors(tensors, {**self.settings, "groups": self.groups[:groups]})
