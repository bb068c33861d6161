"""Loss and gradient of encoders whose latents compete, where only what fires is computed with.

x  what is read [N, D]           E, b  encoder [n, D], [n]      c  decoder bias, taken off x and y where the encoder is centred
y  what is to be written [N, D2]    W  decoder, unit rows [n, D2]     S  linear part of a transcoder [D2, D], x S^T taken off y

p = x E^T + b, of which each token (or the batch) keeps the largest: M firings (latent, row, value)
y^_h = sum of value W[latent] over the firings of groups 1..h       (one group, but for Matryoshka)
loss = mean_h |y - y^_h|^2 / (N V) + auxk |y - y^ - e^|^2 / (N V)   V: variance; e^: what dead latents make of the rest

Firings lie in the order of rows, one row for each group and token, and N more for e^. The only product of size N n is p,
which exists a block of tokens at a time; weight gradients are sums over the same firings in the order of latents.
"""

import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from .encoder_recipe import EncoderRecipe

BLOCK, BLOCK_ASIDE = 1 << 23, 1 << 28
"""Numbers that exist at a time, on a CPU and elsewhere: few enough for a cache, enough to read weights seldom."""
SPARSE = ("cpu", "cuda")
"""Devices that multiply dense matrices where a sparse one has values."""
SHARES = 2
"""Of several processes that choose the largest of a batch together, how many times its share one may hold."""
Gather = Callable[[Tensor], Tensor]
"""A vector of every process, one behind another."""


class Firings(NamedTuple):
    """A sparse matrix, compressed by rows."""

    offsets: Int[Tensor, " rows+1"]
    latents: Int[Tensor, " M"]
    values: Float[Tensor, " M"]


class Outcome(NamedTuple):
    """The result of a step; everything but `least` is a sum over the tokens of this process."""

    gradients: dict[str, Tensor]
    """Of the loss, by parameter."""
    fired: Float[Tensor, " n"]
    """Tokens on which each latent fired."""
    error: Float[Tensor, ""]
    """Squares of what the reconstruction lacks, in variances of a token of the whole batch."""
    loss: Float[Tensor, ""]
    least: Float[Tensor, ""]
    """The least potential kept."""


def sparse_step(
    recipe: EncoderRecipe,
    weights: dict[str, Tensor],
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "N D2"] | None,
    *,
    unit: float,
    dead: Int[Tensor, " dead"] | None = None,
    gather: Gather | None = None,
) -> Outcome:
    """One batch, or a process's part of it. `unit` is N V of the whole batch; without `y` the encoder reconstructs x."""
    centred = x - weights["decoder_bias"] if y is None else x
    target = centred if y is None else y - weights["decoder_bias"]
    if y is not None and "skip" in weights:
        target = target - linear(x, weights["skip"])
    kept, spare, least = chosen(recipe, centred, weights["encoder"], weights["bias"], dead, gather)
    groups = len(recipe.sizes)
    if groups > 1:
        kept = grouped(kept, recipe.sizes)
    firings = kept if spare is None else joined((kept, spare))
    parts = decoded(firings, weights["decoder"]).unflatten(0, (-1, len(x)))
    rest = parts[:groups].cumsum_(0).sub_(target)
    error, loss = rest[-1].square().sum() / unit, rest.square().sum() / (unit * groups)
    if spare is not None:
        parts[groups].add_(rest[-1])
        loss = loss + recipe.auxk * parts[groups].square().sum() / unit
        parts[groups].mul_(2 * recipe.auxk / unit)
    rest.mul_(2 / (unit * groups))
    if groups > 1:
        rest.copy_(rest.flip(0).cumsum(0).flip(0))  # a group's latents take part in its own reconstruction and all later ones
    gradients, fired = pulled_back(firings, parts.flatten(0, 1), centred, weights, groups)
    gradients["decoder_bias"] = rest[0].sum(0)
    if "skip" in weights:
        gradients["skip"] = rest[0].T @ x
    if y is None:
        gradients["decoder_bias"] -= gradients["bias"] @ weights["encoder"]
    return Outcome(gradients, fired, error, loss, least)


# -- what fires ----------------------------------------------------------------------------------------------


def chosen(
    recipe: EncoderRecipe,
    x: Float[Tensor, "N D"],
    encoder: Float[Tensor, "n D"],
    bias: Float[Tensor, " n"],
    dead: Int[Tensor, " dead"] | None,
    gather: Gather | None,
) -> tuple[Firings, Firings | None, Float[Tensor, ""]]:
    """Firings, those of dead latents, and the least potential that was kept."""
    low = recipe.precision == "bf16"
    inputs = [t.bfloat16() if low else t for t in (x, encoder, bias)]
    apart = recipe.objective.keeps == "batch"
    rows = len(x) if apart else max(64, (BLOCK if x.is_cpu else BLOCK_ASIDE) // len(encoder))
    kept, spare = [], []
    for block in inputs[0].split(rows):
        p = linear(block, inputs[1], inputs[2])
        kept.append(largest(p, recipe.k * len(p) * (1 if gather is None else SHARES)) if apart else each(*top(p, recipe.k)))
        if dead is not None:
            values, indices = p[:, dead].topk(min(recipe.k_aux, len(dead)), sorted=False)
            spare.append(each(values, dead[indices]))
    found = [joined(parts) for parts in (kept, spare) if parts]
    least = found[0].values.min()
    if apart and gather is not None:
        least = gather(found[0].values).topk(recipe.k * recipe.batch).values.min()
    below = found[0].values < least
    if low:
        wide = [firings._replace(values=firings.values.float()) for firings in found]
        found = [part._replace(values=products(part, x, encoder) + bias[part.latents]) for part in wide]
    found = [firings._replace(values=firings.values.clamp(min=0)) for firings in found]
    return found[0]._replace(values=found[0].values.masked_fill(below, 0)), found[1] if spare else None, least.float()


def top(p: Float[Tensor, "N n"], k: int) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """The k largest of each row and where they are.

    They lie in those k columns of `p`, folded, whose maxima are largest; folded to a width near sqrt(n k), two short searches
    take the place of a long one.
    """
    n = p.shape[-1]
    fold = next((f for f in (32, 16, 8, 4) if n % f == 0 and f * f * k <= 2 * n), 1)
    if fold == 1 or not p.is_cpu:
        return p.topk(k, sorted=False)
    width = n // fold
    columns = p.unflatten(-1, (fold, width)).amax(1).topk(k, sorted=False).indices
    candidates = (columns[:, None] + width * torch.arange(fold)[:, None]).flatten(1)
    values, places = p.gather(1, candidates).topk(k, sorted=False)
    return values, candidates.gather(1, places)


def each(values: Float[Tensor, "N k"], indices: Int[Tensor, "N k"]) -> Firings:
    """As many firings in each row."""
    offsets = torch.arange(0, values.numel() + 1, values.shape[1], device=values.device)
    return Firings(offsets, indices.flatten(), values.flatten())


def largest(p: Float[Tensor, "N n"], count: int) -> Firings:
    """The `count` largest of the batch."""
    count = min(count, p.numel())
    flat, n = p.flatten(), p.shape[-1]
    candidates = None if not p.is_cpu else (flat > floor_of(p, count)).nonzero()[:, 0]
    if candidates is None or len(candidates) < count:
        places = flat.topk(count, sorted=False).indices
    else:
        places = candidates[flat[candidates].topk(count, sorted=False).indices]
    places = places.sort().values
    tokens = torch.arange(len(p) + 1, device=p.device)
    return Firings(torch.searchsorted(places, tokens * n), places % n, flat[places])


def floor_of(p: Float[Tensor, "N n"], count: int) -> Tensor:
    """A value that somewhat more than `count` of p exceed, judged by a part of the rows."""
    some = p[:: max(1, len(p) // 256)]
    return some.flatten().topk(min(some.numel(), int(1.5 * count * len(some) / len(p)) + 1)).values[-1]


def joined(parts: Sequence[Firings]) -> Firings:
    """Blocks of rows, one below another."""
    if len(parts) == 1:
        return parts[0]
    counts = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return Firings(offsets, torch.cat([part.latents for part in parts]), torch.cat([part.values for part in parts]))


def grouped(firings: Firings, sizes: Sequence[int]) -> Firings:
    """The same with a row for each group and token, group by group."""
    tokens, rows = len(firings.offsets) - 1, rows_of(firings)
    for end in accumulate(sizes[:-1]):
        rows += tokens * (firings.latents >= end)
    rows, order = rows.sort(stable=True)
    offsets = torch.searchsorted(rows, torch.arange(len(sizes) * tokens + 1, device=rows.device))
    return Firings(offsets, firings.latents[order], firings.values[order])


def rows_of(firings: Firings) -> Int[Tensor, " M"]:
    """The row of each firing."""
    rows = torch.arange(len(firings.offsets) - 1, device=firings.latents.device)
    return rows.repeat_interleave(firings.offsets.diff(), output_size=len(firings.latents))


# -- products over firings -----------------------------------------------------------------------------------


def decoded(firings: Firings, decoder: Float[Tensor, "n D2"]) -> Float[Tensor, "rows D2"]:
    """Sum of value W[latent] in each row."""
    latents, offsets, values = firings.latents, firings.offsets, firings.values
    return embedding_bag(latents, decoder, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def products(firings: Firings, rows: Float[Tensor, "rows D"], matrix: Float[Tensor, "n D"]) -> Float[Tensor, " M"]:
    """<row, matrix[latent]> of each firing."""
    if rows.device.type not in SPARSE:
        blocks = (part.split(BLOCK // rows.shape[-1]) for part in (rows_of(firings), firings.latents))
        return torch.cat([(rows[r] * matrix[i]).sum(-1) for r, i in zip(*blocks, strict=True)])
    with warnings.catch_warnings():  # torch calls this layout a beta
        warnings.simplefilter("ignore", UserWarning)
        where = torch.sparse_csr_tensor(
            firings.offsets, firings.latents, torch.zeros_like(firings.values), (len(rows), len(matrix)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(where, rows, matrix.T, beta=0.0).values()


def pulled_back(
    firings: Firings, pull: Float[Tensor, "rows D2"], x: Float[Tensor, "N D"], weights: dict[str, Tensor], groups: int
) -> tuple[dict[str, Tensor], Float[Tensor, " n"]]:
    """Gradients by parameter from `pull`, that by each row's sum; and the tokens on which each latent fired.

    The part of the decoder's gradient along its unit rows is taken out: it is `sum of value d loss / d value`.
    """
    fires = firings.values > 0
    by_value = products(firings, pull, weights["decoder"])
    by_potential = by_value * fires
    latents, order = firings.latents.sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(len(weights["bias"]) + 1, device=latents.device))
    rows = rows_of(firings)
    columns = torch.stack((by_potential, by_value * firings.values, fires & (rows < groups * len(x))), dim=1)
    sums = torch.segment_reduce(columns[order], "sum", offsets=starts, axis=0, unsafe=True)
    rows = rows[order]
    decoder = decoded(Firings(starts, rows, firings.values[order]), pull)
    decoder.addcmul_(sums[:, 1:2], weights["decoder"], value=-1)
    encoder = decoded(Firings(starts, rows % len(x), by_potential[order]), x)
    return {"encoder": encoder, "bias": sums[:, 0].contiguous(), "decoder": decoder}, sums[:, 2].contiguous()
