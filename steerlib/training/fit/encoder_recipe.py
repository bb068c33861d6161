"""What determines a sparse encoder, apart from the activations it is trained on."""

from dataclasses import dataclass
from typing import Literal, get_args

from ...encoders import KINDS
from ...encoders.objective import Objective
from ...errors import BadRecipe

Precision = Literal["fp32", "bf16"]
Normalisation = Literal["none", "scale", "std", "whiten"]


def objectives() -> dict[str, Objective]:
    """How each kind that can be trained is trained, by name."""
    return {name: kind.objective for name, kind in sorted(KINDS.items()) if kind.objective is not None}


def transcoding() -> str:
    """Names of the kinds whose latents may be read at one site and written at another, for messages."""
    return ", ".join(name for name, objective in objectives().items() if objective.transcodes)


@dataclass(frozen=True, kw_only=True)
class EncoderRecipe:
    """A frozen description of one encoder. Where the source gives pairs, it becomes a transcoder.

    Args:
        kind: A kind of `steerlib.encoders` that has an objective: topk, batchtopk, matryoshka, relu, jumprelu or gated.
        latents: How many.
        k: Latents that fire on a token; for `batchtopk` and `matryoshka` on average over the batch. Other kinds ignore it.
        skip: Whether a transcoder has a linear part beside its latents (Paulo et al. 2025, 2501.18823).
        groups: Sizes of the groups of a `matryoshka`, the most general first; default: a 16th, an 8th, a quarter and the rest.
        sparsity: What kinds without competition pay: `relu` and `gated` for each token's sum of readings, in root variances,
            `jumprelu` for each latent that fires: the share of the variance that it has to explain.
        sparsity_warmup: Share of the steps over which that price rises from 0.
        rate: Learning rate of Adam; default `2e-4 / sqrt(latents / 2**14)` (Gao et al. 2024, 2406.04093).
        warmup: Share of the steps over which the rate rises from 0.
        decay: Share of the steps over which it falls to 0 at the end.
        auxk: Weight of the loss that revives dead latents of the competing kinds: they reconstruct what the others leave;
            0: none.
        k_aux: Dead latents that take part in it on a token.
        dead_after: Tokens without firing after which a latent counts as dead.
        batch: Tokens of a step, over all processes; one number for all encoders of a pass.
        precision: Of the product that picks the latents of the competing kinds; their readings, gradients and weights are
            float32.
        normalise: What activations are brought to: as they are; mean length root of width; each channel to mean 0 and
            deviation 1; or all of them to mean 0 and covariance 1. It is folded into the finished encoder.
        seed: Of the first weights.

    >>> EncoderRecipe(kind="topk", latents=4096, k=32).check()
    """

    kind: str = "batchtopk"
    latents: int
    k: int = 32
    skip: bool = False
    groups: tuple[int, ...] = ()
    sparsity: float = 0.0
    sparsity_warmup: float = 0.1
    rate: float | None = None
    warmup: float = 0.02
    decay: float = 0.2
    auxk: float = 1 / 32
    k_aux: int = 256
    dead_after: int = 1_000_000
    batch: int = 4096
    precision: Precision = "fp32"
    normalise: Normalisation = "scale"
    seed: int = 0

    def check(self) -> None:
        """Raise `BadRecipe` for what cannot work."""
        choices = {"kind": tuple(objectives()), "precision": get_args(Precision), "normalise": get_args(Normalisation)}
        for field, known in choices.items():
            if getattr(self, field) not in known:
                raise BadRecipe(f"expected {field} to be one of {', '.join(known)}, got {getattr(self, field)!r}")
        if min(self.latents, self.batch, self.k_aux, self.dead_after) < 1 or not 0 < self.k <= self.latents:
            raise BadRecipe(f"expected positive sizes and at most {self.latents} latents a token, got {self}")
        if sum(self.sizes) != self.latents or min(self.sizes) < 1:
            raise BadRecipe(f"expected groups that make up {self.latents} latents, got {self.sizes}")
        if self.objective.loss is not None and self.sparsity <= 0:
            raise BadRecipe(f"expected a positive sparsity for kind {self.kind!r}, got {self.sparsity}")
        shares = (self.warmup, self.decay, self.sparsity_warmup)
        if min(shares) < 0 or max(shares) > 1 or self.auxk < 0 or (self.rate is not None and self.rate <= 0):
            raise BadRecipe(f"expected shares from 0 to 1 and a positive rate, got {self}")

    @property
    def objective(self) -> Objective:
        """How its kind is trained."""
        found = KINDS[self.kind].objective
        assert found is not None
        return found

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the groups; one for kinds without."""
        if not self.objective.grouped:
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
