"""Which latents tell texts with an attribute from texts without it.

z  readings of texts, each the mean over its tokens [T, n]     y  whether a text has the attribute [T]
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ..encoders import Sparse
from ..errors import BadRecipe


def selection(z: Float[Tensor, "T n"], y: Bool[Tensor, " T"]) -> Float[Tensor, " n"]:
    """Correlation of every latent with the attribute: the difference of its mean readings, in standard deviations, times
    sqrt(share with * share without). 0 for a latent that reads the same everywhere.

    It orders latents as the F statistic does, one of the rankings of Gurnee et al. 2023 (2305.01610), and keeps the sign.
    """
    rest, label = z.double() - z.double().mean(0), y.double() - y.double().mean()
    return (normalize(rest, dim=0) * normalize(label, dim=0)[:, None]).sum(0).float()


class Attribute(NamedTuple):
    """Activations of texts that have something, and of texts that do not."""

    x: Sequence[Float[Tensor, "tokens D"]]
    y: Bool[Tensor, " T"]

    @classmethod
    def of(cls, positive: Sequence[Tensor], negative: Sequence[Tensor]) -> "Attribute":
        """Texts of both kinds; four of each are the least that a probe can learn from and be tested on."""
        if min(len(positive), len(negative)) < 4 or not all(map(len, (*positive, *negative))):
            raise BadRecipe(
                f"expected four texts or more with an attribute and as many without, of two tokens or more each, got "
                f"{len(positive)} and {len(negative)}"
            )
        return cls([*positive, *negative], torch.tensor([True] * len(positive) + [False] * len(negative)))

    def readings(self, encoder: Sparse) -> Float[Tensor, "T n"]:
        """z: mean code of every text."""
        return torch.stack([encoder.encode(x).mean(0) for x in self.x])

    def best(self, encoder: Sparse, count: int) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
        """Latents that fire more on texts with the attribute, and their selection scores, best first."""
        score = selection(self.readings(encoder), self.y)
        found = score.topk(min(count, int((score > 0).sum())))
        return found.indices, found.values
