"""How good a dictionary is: what it keeps, how sparsely, and whether it found the truth where that is known.

x, x^  activations and their reconstruction [N, D]     z  code [N, n]     d  dictionary, one row a latent [n, D]
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ..encoders import Sparse, TopK
from ..errors import MissingExtra


def explained_variance(x: Float[Tensor, "N D"], kept: Float[Tensor, "N D"]) -> float:
    """`1 - sum |x - x^|^2 / sum |x - mean|^2` (1 - FVU; Gao et al. 2024, 2406.04093)."""
    x = x.double()
    return 1 - float((x - kept).square().sum() / (x - x.mean(0)).square().sum())


def l0(z: Float[Tensor, "N n"]) -> float:
    """Latents that fire on a token, on average."""
    return float((z != 0).sum(-1).double().mean())


def dead_share(z: Float[Tensor, "N n"]) -> float:
    """Share of latents that fire on no token."""
    return float((z == 0).all(0).double().mean())


def dense_share(z: Float[Tensor, "N n"]) -> float:
    """Share of latents that fire on more than a tenth of the tokens (SAEBench, 2503.09532)."""
    return float(((z != 0).double().mean(0) > 0.1).double().mean())


class Match(NamedTuple):
    """Truths and learned latents, one to one, with the largest sum of likenesses (Kuhn 1955); `mcc` is the mean likeness over
    all truths, of which those left over count 0."""

    truths: Int[Tensor, " pairs"]
    latents: Int[Tensor, " pairs"]
    likeness: Float[Tensor, " pairs"]
    mcc: float


def dictionary_match(truth: Float[Tensor, "m D"], learned: Float[Tensor, "n D"]) -> Match:
    """The best assignment by `|cos(d_i, d^_j)|`, as SAELens reports."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("matching dictionaries needs scipy: pip install 'steerlib[eval]'") from None
    likeness = (normalize(truth.double(), dim=-1) @ normalize(learned.double(), dim=-1).T).abs()
    truths, latents = map(torch.as_tensor, linear_sum_assignment(likeness.numpy(), maximize=True))
    found = likeness[truths, latents]
    return Match(truths, latents, found, float(found.sum() / len(likeness)))


def random_dictionary(n: int, width: int, seed: int = 0) -> Float[Tensor, "n D"]:
    """Random directions: the control for `dictionary_match`."""
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed + 7_919)), dim=-1)


def random_encoder(encoder: Sparse, x: Float[Tensor, "N D"], k: int, *, seed: int = 0) -> Sparse:
    """The control of an encoder: as many random directions around the mean of `x`, the k largest readings of each token kept,
    on the scale that explains most of `x`."""
    directions = random_dictionary(len(encoder.encoder), x.shape[1], seed)
    middle = x.mean(0)
    made = TopK(
        encoder=directions, bias=torch.zeros(len(directions)), decoder=directions, decoder_bias=middle, centred=True, k=k
    )
    rest, kept = x - middle, made.reconstruct(x) - middle
    by = float((rest * kept).sum() / kept.square().sum().clamp(min=1e-12))
    return TopK.from_tensors({**made.to_tensors(), "decoder": by * directions}, made.settings)


class Stability(NamedTuple):
    """How much of one encoder another found that was trained from another seed, and how much random directions, as many as
    the other has, would have."""

    mcc: float
    control: float


def stability(first: Sparse, second: Sparse, x: Float[Tensor, "N D"], *, seed: int = 0) -> Stability:
    """`dictionary_match` of the decoder rows of latents that fire on x (Paulo & Belrose 2025, 2501.16615; Song et al. 2025,
    2505.20254); dead ones would count as what no seed finds."""
    own, other = (encoder.decoder[(encoder.encode(x) > 0).any(0)].float() for encoder in (first, second))
    control = random_dictionary(len(other), own.shape[1], seed)
    return Stability(dictionary_match(own, other).mcc, dictionary_match(own, control).mcc)
