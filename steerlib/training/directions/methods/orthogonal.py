"""Difference of means, freed of what moves the other concepts: orthogonal to their directions in the metric of activations.

With K the directions to keep, S the covariance of activations on ordinary text and d the difference of means:

    d' = d - K^T (K S^-1 K^T)^-1 K S^-1 d

so that d' is uncorrelated, on ordinary text, with every direction kept (the oblique projection of LEACE, Belrose et al. 2023,
arXiv 2306.03819, for several directions).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..levers import Lever, Task
from ..readouts import metric
from .difference_of_means import direction


def without(d: Float[Tensor, " D"], keep: Float[Tensor, "k D"], inverse: Float[Tensor, "D D"]) -> Float[Tensor, " D"]:
    """The formula above."""
    if not len(keep):
        return d
    read = keep @ inverse
    return d - keep.T @ torch.linalg.solve(read @ keep.T, read @ d)


def fit(task: Task) -> Lever:
    site = task.site
    keep = task.keep.get(site, task.reference[site][:0])
    return task.at(without(direction(task, site), keep, metric(task.reference[site])))
