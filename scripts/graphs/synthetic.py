"""Data whose causes are known."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

ZIPF, CORRELATION, COMMON, BRANCHING = 0.5, 0.1, 8, 4
"""How fast rates fall; what roots share, and through how many common causes; children of a feature."""


class Superposed(NamedTuple):
    """More features than dimensions, and which of them make up each token."""

    x: Float[Tensor, "N D"]
    z: Float[Tensor, "N F"]
    dictionary: Float[Tensor, "F D"]
    """Unit rows: `x = z dictionary`."""
    parent: Int[Tensor, " F"]
    """Feature without which a feature never fires, or -1. Of the children of one, at most one fires on a token."""
    rates: Float[Tensor, " F"]
    """Share of tokens on which each fires."""


def superposed(
    tokens: int,
    *,
    features: int = 256,
    width: int = 64,
    roots: int | None = None,
    rates: tuple[float, float] = (0.1, 0.01),
    seed: int = 0,
) -> Superposed:
    """Sparse features in near-orthogonal directions, as in SAELens' SynthSAEBench.

    `roots` fire at Zipf rates, from the first of `rates` by `rank ** -ZIPF` but never below the second; `CORRELATION` of what
    decides it they share through some common causes. The other features hang below them, `BRANCHING` to each, in order; each
    child has its share of the tokens of its parent. Default: every feature is a root.
    """
    generator = torch.Generator().manual_seed(seed)
    roots = features if roots is None else roots
    parent = torch.cat((torch.full((roots,), -1), torch.arange(features - roots) // BRANCHING))
    often = (rates[0] * torch.arange(1, roots + 1) ** -ZIPF).clamp(min=rates[1])
    loading = normalize(torch.randn(roots, COMMON, generator=generator), dim=-1)
    common = torch.randn(tokens, COMMON, generator=generator) @ loading.T
    own = torch.randn(tokens, roots, generator=generator)
    drive = CORRELATION**0.5 * common + (1 - CORRELATION) ** 0.5 * own
    fires = with_children(drive > torch.special.ndtri(1 - often), parent, generator)
    size = (1 + 0.3 * torch.randn(tokens, features, generator=generator)).clamp(min=0.1)
    z = fires * size
    dictionary = near_orthogonal(features, width, generator)
    return Superposed(z @ dictionary, z, dictionary, parent, fires.float().mean(0))


def near_orthogonal(features: int, width: int, generator: torch.Generator) -> Float[Tensor, "features width"]:
    """Unit rows pushed apart until no two are much alike: steps down the sum of fourth powers of cosines."""
    rows = normalize(torch.randn(features, width, generator=generator), dim=-1)
    for _ in range(200):
        cosines = (rows @ rows.T).fill_diagonal_(0)
        rows = normalize(rows - 0.5 * cosines**3 @ rows, dim=-1)
    return rows


def with_children(fires: Bool[Tensor, "N roots"], parent: Int[Tensor, " F"], generator: torch.Generator) -> Bool[Tensor, "N F"]:
    """Each feature that fires hands on to one of its children, if to any: each of `BRANCHING + 1` ends is as likely."""
    whole = torch.zeros(len(fires), len(parent), dtype=torch.bool)
    whole[:, : fires.shape[1]] = fires
    heir = torch.randint(BRANCHING + 1, whole.shape, generator=generator)
    for child in range(fires.shape[1], len(parent)):
        above, place = int(parent[child]), (child - fires.shape[1]) % BRANCHING
        whole[:, child] = whole[:, above] & (heir[:, above] == place)
    return whole
