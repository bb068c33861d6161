"""Ablations that leave a latent nothing to read: the shortest further change, after what it writes was taken away.

    r_k (y + d) + b_k <= theta_k   every ablated latent stays below its threshold, and so reads 0
    r_j d = 0                      directions that were given a value keep it

A latent that is below its threshold is left alone until the change of others lifts it above. Where tokens are normalised before
they are read, r_k is divided by a length that changes with y. So the change is repeated, a fixed number of times: whether it is
done could only be asked by waiting for the device.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from .edit import Change, EditTensors

ROUNDS = 8
"""Of which one is enough where tokens are not normalised and no latent lifts another one."""
RIDGE = 1e-6
"""Added to the products of rows of length 1, so that two latents with one row can be solved for."""


def emptied(
    edits: EditTensors,
    x: Float[Tensor, "B N D"],
    change: Change,
    exact: Float[Tensor, "B N K"],
    kept: Float[Tensor, "B N K"],
    lengths: Callable[[Tensor], "Tensor | None"],
) -> Change:
    """The change after which latents read 0, or, where only a part of the edit is let through, no more than is left of them.

    `exact` is 1 where a latent is ablated so, `kept` where a direction has to keep its reading; `lengths` tells what tokens are
    divided by.
    """
    size = edits.read.norm(dim=-1).clamp(min=1e-30)
    rows = edits.read / size[:, None]
    y = x.float() + change.delta
    left, held = change.before + change.moved, y @ edits.read.T
    most = torch.where(left > edits.threshold, left, edits.threshold) - edits.bias
    rounded = (2 * torch.finfo(x.dtype).eps + 1e-6) * (y.square() @ edits.read.square().T).sqrt().detach()
    on = kept
    for _ in range(ROUNDS):
        by, reads = lengths(y), y @ edits.read.T
        over = reads - (most if by is None else most * by)
        on = torch.maximum(on, exact * (over > -rounded))
        miss = on * torch.where(kept > 0, held - reads, -over - 2 * rounded) / size
        both = on[..., :, None] * on[..., None, :]
        system = (rows @ rows.T) * both + torch.diag_embed(1 - on + RIDGE)
        y = y + torch.linalg.solve_ex(system, miss[..., None])[0][..., 0] @ rows  # whose error is not waited for
    return change._replace(delta=y - x.float())
