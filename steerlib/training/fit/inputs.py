"""The activations that encoders are trained on: where they come from, and what they are brought to first."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import BadRecipe
from .encoder_recipe import Normalisation

SAMPLE = 32_768
"""Tokens from which scale, variance and the first decoder bias come."""

Batch = Float[Tensor, "tokens D"] | tuple[Float[Tensor, "tokens D"], Float[Tensor, "tokens D2"]]
"""Activations; or, for a transcoder, what it reads and what it is to write."""


@runtime_checkable
class Source(Protocol):
    """Activations that can be read again from any batch on, always the same.

    `width` is the length of what is read, `len` the number of tokens; `batches(start, batch)` gives batches of `batch` tokens,
    from the `start`-th on.
    """

    @property
    def width(self) -> int: ...

    def __len__(self) -> int: ...

    def batches(self, start: int, batch: int) -> Iterator[Batch]: ...


class Tokens:
    """Activations in memory, dealt anew for each time through them."""

    def __init__(self, values: Float[Tensor, "tokens D"], *, target: Float[Tensor, "tokens D2"] | None = None, seed: int = 0):
        """`target` is what a transcoder is to write for each token."""
        if target is not None and len(target) != len(values):
            raise BadRecipe(f"expected as many targets as tokens, got {len(target)} and {len(values)}")
        self.values, self.target, self.seed, self.width = values, target, seed, values.shape[-1]

    def __len__(self) -> int:
        return len(self.values)

    def batches(self, start: int, batch: int) -> Iterator[Batch]:
        """Batches without end; what does not fill one is left out of its round."""
        each = len(self) // batch
        if not each:
            raise BadRecipe(f"expected {batch} tokens or more for one batch, got {len(self)}")
        dealt, order = -1, torch.empty(0)
        while True:
            turn, place = divmod(start, each)
            if turn != dealt:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
                dealt, order = turn, torch.randperm(len(self), generator=generator)
            chosen = order[place * batch : (place + 1) * batch]
            yield self.values[chosen] if self.target is None else (self.values[chosen], self.target[chosen])
            start += 1


def first_tokens(source: Source, batch: int) -> tuple[Float[Tensor, "tokens D"], Float[Tensor, "tokens D2"] | None]:
    """The sample, and its targets where the source has some."""
    found = list(islice(source.batches(0, batch), max(1, min(SAMPLE, len(source)) // batch)))
    if not found:
        raise BadRecipe(f"expected {batch} tokens or more for one batch, the source ended before")
    pairs = [pair(batch) for batch in found]
    targets = [y.float() for _, y in pairs if y is not None]
    return torch.cat([x.float() for x, _ in pairs]), torch.cat(targets) if targets else None


def pair(batch: Batch) -> tuple[Float[Tensor, "tokens D"], Float[Tensor, "tokens D2"] | None]:
    """What is read, and what is to be written if that is something else."""
    return (batch, None) if isinstance(batch, Tensor) else batch


class Affine(NamedTuple):
    """`x~ = (x - mean) M`, and back; M is a matrix, or the diagonal of one."""

    mean: Float[Tensor, " D"]
    forth: Float[Tensor, " D"] | Float[Tensor, "D D"]
    back: Float[Tensor, " D"] | Float[Tensor, "D D"]

    def __call__(self, x: Float[Tensor, "tokens D"]) -> Float[Tensor, "tokens D"]:
        return times(x - self.mean, self.forth)


def times(x: Float[Tensor, "rows D"], m: Float[Tensor, " D"] | Float[Tensor, "D D"]) -> Float[Tensor, "rows D"]:
    """x M."""
    return x * m if m.ndim == 1 else x @ m


def normalising(kind: Normalisation, x: Float[Tensor, "tokens D"]) -> Affine | None:
    """The map that brings such activations to scale; None: they are read as they are."""
    if kind == "none":
        return None
    if kind == "scale":
        by = (x.shape[-1] ** 0.5 / x.norm(dim=-1).mean()).expand(x.shape[-1]).contiguous()
        return Affine(torch.zeros_like(by), by, 1 / by)
    mean = x.mean(0)
    if kind == "std":
        deviation = x.std(0).clamp(min=1e-3 * float(x.std(0).mean()))
        return Affine(mean, 1 / deviation, deviation)
    values, vectors = torch.linalg.eigh((x - mean).T.double().cov())
    deviation = (values.clamp(min=0) + 1e-4 * values.mean()).sqrt()  # directions without variance stay small
    return Affine(mean, ((vectors / deviation) @ vectors.T).float(), ((vectors * deviation) @ vectors.T).float())


def geometric_median(x: Float[Tensor, "tokens D"], rounds: int = 64) -> Float[Tensor, " D"]:
    """The point whose distances to all tokens add up to least, by Weiszfeld's iteration (1937)."""
    middle = x.mean(0)
    for _ in range(rounds):
        weight = 1 / (x - middle).norm(dim=-1, keepdim=True).clamp(min=1e-8)
        middle = (x * weight).sum(0) / weight.sum()
    return middle
