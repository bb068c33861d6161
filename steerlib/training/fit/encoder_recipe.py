"""What determines a sparse encoder, apart from the activations it is trained on; the strings under fields are its manual."""

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import BadRecipe

Kind = Literal["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"]
Precision = Literal["fp32", "bf16"]
Normalisation = Literal["none", "scale", "std", "whiten"]

COMPETING = ("topk", "batchtopk", "matryoshka")
"""Kinds that keep a fixed number of latents; the others pay for each."""
TRANSCODING = ("topk", "batchtopk", "relu", "jumprelu")
"""Kinds whose latents may be read at one site and written at another."""


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """A frozen description of one encoder. Where the source gives pairs, it becomes a transcoder."""

    kind: Kind = "batchtopk"
    latents: int
    k: int = 32
    """Latents that fire on a token; for `batchtopk` and `matryoshka` on average over the batch. Other kinds ignore it."""
    skip: bool = False
    """Whether a transcoder has a linear part beside its latents (Paulo et al. 2025, 2501.18823)."""
    groups: tuple[int, ...] = ()
    """Sizes of the groups of a `matryoshka`, the most general first; default: a 16th, an 8th, a quarter and the rest."""
    sparsity: float = 0.0
    """What `relu` and `gated` pay for each token's sum of readings, in root variances, and `jumprelu` for each latent that
    fires: the share of the variance that it has to explain."""
    sparsity_warmup: float = 0.1
    """Share of the steps over which that price rises from 0."""
    rate: float | None = None
    """Learning rate of Adam; default `2e-4 / sqrt(latents / 2**14)` (Gao et al. 2024, 2406.04093)."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises from 0."""
    decay: float = 0.2
    """Share of the steps over which it falls to 0 at the end."""
    auxk: float = 1 / 32
    """Weight of the loss that revives dead latents of the competing kinds: they reconstruct what the others leave; 0: none."""
    k_aux: int = 256
    """Dead latents that take part in it on a token."""
    dead_after: int = 1_000_000
    """Tokens without firing after which a latent counts as dead."""
    batch: int = 4096
    """Tokens of a step, over all processes; one number for all encoders of a pass."""
    precision: Precision = "fp32"
    """Of the product that picks the latents of the competing kinds; their readings, gradients and weights are float32."""
    normalise: Normalisation = "scale"
    """What activations are brought to: mean length root of width, each channel to mean 0 and deviation 1, or all of them to
    mean 0 and covariance 1. It is folded into the finished encoder."""
    seed: int = 0

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        choices = {"kind": Kind, "precision": Precision, "normalise": Normalisation}
        for field, known in choices.items():
            if getattr(self, field) not in get_args(known):
                raise BadRecipe(f"expected {field} to be one of {', '.join(get_args(known))}, got {getattr(self, field)!r}")
        if min(self.latents, self.batch, self.k_aux, self.dead_after) < 1 or not 0 < self.k <= self.latents:
            raise BadRecipe(f"expected positive sizes and at most {self.latents} latents a token, got {self}")
        if sum(self.sizes) != self.latents or min(self.sizes) < 1:
            raise BadRecipe(f"expected groups that make up {self.latents} latents, got {self.sizes}")
        if self.kind not in COMPETING and self.sparsity <= 0:
            raise BadRecipe(f"expected a positive sparsity for kind {self.kind!r}, got {self.sparsity}")
        shares = (self.warmup, self.decay, self.sparsity_warmup)
        if min(shares) < 0 or max(shares) > 1 or self.auxk < 0 or (self.rate is not None and self.rate <= 0):
            raise BadRecipe(f"expected shares from 0 to 1 and a positive rate, got {self}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the groups; one for kinds without."""
        if self.kind != "matryoshka":
            return (self.latents,)
        first = tuple(max(1, self.latents // part) for part in (16, 8, 4))
        return self.groups or (*first, self.latents - sum(first))

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step: up in a line, flat, down in a line."""
        full = self.rate or 2e-4 / (self.latents / 2**14) ** 0.5
        rise = (step + 1) / max(1.0, self.warmup * steps)
        fall = (steps - step) / max(1.0, self.decay * steps)
        return full * min(1.0, rise, fall)

    def price_at(self, step: int, steps: int) -> float:
        """The price of firing at a step."""
        return self.sparsity * min(1.0, (step + 1) / max(1.0, self.sparsity_warmup * steps))
