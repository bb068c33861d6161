"""What training needs to know of a kind of encoder, beside the class that uses it.

N tokens   n latents   D width of what is read   D2 width of what is written   p potentials   z readings
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxtyping import Float
from torch import Tensor

Weights = dict[str, Tensor]
"""Parameters by name: `encoder`, `bias`, `decoder`, `decoder_bias`, perhaps `skip`, and those of the kind."""


class Cost(NamedTuple):
    """What a batch costs: `(|rest|^2 + beside) / variance + price * paid`; the price rises during training.

    `rest` is what the reconstruction lacks, `paid` is summed over tokens, `beside` are squares of a second reconstruction.
    """

    rest: Float[Tensor, "N D2"]
    code: Float[Tensor, "N n"]
    paid: Float[Tensor, ""]
    beside: Float[Tensor, ""] | None = None


Loss = Callable[[Weights, Tensor, Tensor, float, float], Cost]
"""From weights, what is read `[N, D]`, what is to be written `[N, D2]`, the root of its variance, and the root mean square of
what is read. The decoder's bias is taken off already."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a kind is trained: its latents compete, or each is paid for where it fires.

    Args:
        keeps: Of a kind whose latents compete, among what the largest potentials are kept: `k` of each "token", or `k` times
            the number of tokens of the whole "batch". Only what is kept is computed with.
        grouped: Whether the first groups of latents learn to reconstruct alone as well.
        loss: Of any other kind, the cost of a batch. It is differentiated by autograd.
        begin: First values of the kind's own parameters, from zeros `[n]` and the root mean square of what is read.
        finish: From parameters to the tensors of the finished encoder.
        potentials: Names of the tensors that change with the scale of the readings.
        settings: Which of `k`, `groups` and `threshold` the finished encoder stores.
        unit_rows: Whether the decoder's rows are kept at length 1.
        transcodes: Whether latents may be read at one site and written at another.
    """

    keeps: Literal["token", "batch"] | None = None
    grouped: bool = False
    loss: Loss | None = None
    begin: Callable[[Tensor, float], Weights] = lambda *_: {}
    finish: Callable[[Weights], Weights] = dict
    potentials: tuple[str, ...] = ("bias",)
    settings: tuple[str, ...] = ()
    unit_rows: bool = True
    transcodes: bool = False
