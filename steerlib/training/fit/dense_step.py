"""Loss and gradient of encoders that pay for what fires, by autograd over whole codes. Letters as in `sparse_step`.

loss = (|y - y^|^2 + beside) / (N V) + price paid / N       paid, beside: see the `Cost` of each kind
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ...encoders.objective import Weights
from .encoder_recipe import EncoderRecipe
from .sparse_step import Outcome


def dense_step(
    recipe: EncoderRecipe,
    weights: Weights,
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "N D2"] | None,
    *,
    unit: float,
    tokens: int,
    price: float,
    scale: float,
) -> Outcome:
    """One batch of `tokens`, or a process's part of it. `unit` is their N V, `scale` the root mean square of x."""
    objective, leaves = recipe.objective, {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
    assert objective.loss is not None
    with torch.enable_grad():
        centred = x - leaves["decoder_bias"] if y is None else x
        target = centred if y is None else y - leaves["decoder_bias"]
        if y is not None and "skip" in leaves:
            target = target - x @ leaves["skip"].T
        rest, z, paid, beside = objective.loss(leaves, centred, target, (unit / tokens) ** 0.5, scale)
        error = rest.square().sum() / unit
        loss = error + price * paid / tokens
        if beside is not None:
            loss = loss + beside / unit
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    if objective.unit_rows:
        decoder = weights["decoder"]
        found["decoder"] -= (found["decoder"] * decoder).sum(-1, keepdim=True) * decoder
    return Outcome(found, (z.detach() > 0).sum(0).float(), error.detach(), loss.detach(), error.new_zeros(()))
