"""First principal component of the pairs' differences, with the sign of their mean (Zou et al. 2023, arXiv 2310.01405).

Classes of unequal sizes have no pairs: of these it is that of the differences of every text with it and every text without.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..levers import Lever, Task


def fit(task: Task) -> Lever:
    positive, negative = task.positive[task.site], task.negative[task.site]
    difference = positive - negative if len(positive) == len(negative) else every(positive, negative)
    direction = torch.linalg.svd(difference, full_matrices=False).Vh[0]  # not centred: their common part is looked for
    return task.at(direction * torch.sign(direction @ (positive.mean(0) - negative.mean(0))))


def every(positive: Float[Tensor, "n D"], negative: Float[Tensor, "m D"]) -> Float[Tensor, "k D"]:
    """Rows with the second moments of all n m differences, `Cov(positive) + Cov(negative) + d d^T`, d that of the means."""
    means = positive.mean(0), negative.mean(0)
    spread = [(x - mean) / len(x) ** 0.5 for x, mean in zip((positive, negative), means, strict=True)]
    return torch.cat((*spread, torch.sub(*means)[None]))
