"""Which latents tell texts with an attribute from texts without it, and how well the best few of them do together.

z  readings of texts, each the mean over its tokens [T, n]     y  whether a text has the attribute [T]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ..encoders import Sparse
from ..errors import BadRecipe, MissingExtra
from .representation import l0, random_encoder

SIZES = (1, 5, 20)
"""Latents that a probe may look at."""
LEAST = 4
"""Texts of each kind that a probe can learn from and be tested on."""


def selection(z: Float[Tensor, "T n"], y: Bool[Tensor, " T"]) -> Float[Tensor, " n"]:
    """Correlation of every latent with the attribute: the difference of its mean readings, in standard deviations, times
    sqrt(share with * share without). 0 for a latent that reads the same everywhere.

    It orders latents as the F statistic does, one of the rankings of Gurnee et al. 2023 (2305.01610), and keeps the sign.
    """
    rest, label = z.double() - z.double().mean(0), y.double() - y.double().mean()
    return (normalize(rest, dim=0) * normalize(label, dim=0)[:, None]).sum(0).float()


def halves(y: Bool[Tensor, " T"]) -> Bool[Tensor, " T"]:
    """Which texts to learn from: every other one of each kind; the rest is for testing."""
    place = torch.where(y, y.cumsum(0), (~y).cumsum(0))
    return place % 2 == 1


def sparse_probe(z: Float[Tensor, "T n"], y: Bool[Tensor, " T"], k: int) -> float:
    """Share of the texts held out that logistic regression tells apart by the k latents that tell most on the others
    (k-sparse probing, Gurnee et al. 2023)."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("probing needs scikit-learn: pip install 'steerlib[eval]'") from None
    learn = halves(y)
    chosen = selection(z[learn], y[learn]).abs().argsort(descending=True, stable=True)[:k]
    own = z[:, chosen].double()
    own = (own - own[learn].mean(0)) / own[learn].std(0).clamp(min=1e-9)
    model = LogisticRegression(max_iter=1000).fit(own[learn].numpy(), y[learn].numpy())
    return float(model.score(own[~learn].numpy(), y[~learn].numpy()))


@dataclass(frozen=True)
class Probes:
    """Accuracy on texts held out, by how many latents a probe looks at; 0.5 is chance where both kinds are equally many.

    `channels`: the same of the activations' own channels; `control`: of a random dictionary that keeps as many latents;
    `dense`: of all channels together.
    """

    latents: dict[int, float]
    channels: dict[int, float]
    control: dict[int, float]
    dense: float


class Attribute(NamedTuple):
    """Activations of texts that have something, and of texts that do not."""

    x: Sequence[Float[Tensor, "tokens D"]]
    y: Bool[Tensor, " T"]

    @classmethod
    def of(cls, positive: Sequence[Tensor], negative: Sequence[Tensor]) -> "Attribute":
        """Texts of both kinds."""
        if min(len(positive), len(negative)) < LEAST or not all(map(len, (*positive, *negative))):
            raise BadRecipe(
                f"expected {LEAST} texts or more with an attribute and as many without, of two tokens or more each, got "
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

    def probes(self, encoder: Sparse, *, seed: int = 0) -> Probes:
        """How well latents tell, beside channels and a random dictionary."""
        whole = torch.cat(list(self.x))
        control = random_encoder(encoder, whole, max(1, round(l0(encoder.encode(whole)))), seed=seed)
        means = torch.stack([x.mean(0) for x in self.x])

        def of(z: Tensor) -> dict[int, float]:
            return {k: sparse_probe(z, self.y, k) for k in SIZES}

        return Probes(
            latents=of(self.readings(encoder)),
            channels=of(means),
            control=of(self.readings(control)),
            dense=sparse_probe(means, self.y, means.shape[1]),
        )
