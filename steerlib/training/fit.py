"""Directions from contrast pairs. A method is one function: activations with and without a concept -> a direction."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import MissingExtra

Fit = Callable[[Tensor, Tensor], Tensor]


def difference_of_means(positive: Float[Tensor, "n D"], negative: Float[Tensor, "n D"]) -> Float[Tensor, " D"]:
    """Mean with the concept minus mean without it (DiffMean; Marks & Tegmark 2023, arXiv 2310.06824)."""
    return (positive - negative).mean(0)


def pca(positive: Float[Tensor, "n D"], negative: Float[Tensor, "n D"]) -> Float[Tensor, " D"]:
    """First principal component of the pairs' differences, with the sign of their mean (Zou et al. 2023, arXiv
    2310.01405). Differences are not centred: their common part is what is looked for."""
    difference = positive - negative
    direction = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    return direction * torch.sign(direction @ difference.mean(0))


def probe(positive: Float[Tensor, "n D"], negative: Float[Tensor, "n D"]) -> Float[Tensor, " D"]:
    """Weights of a logistic regression that tells the two apart, on standardised coordinates, mapped back."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("the probe needs scikit-learn: pip install 'steerlib[train]'") from None
    both = torch.cat((positive, negative))
    centre, scale = both.mean(0), both.std(0).clamp(min=1e-6)
    labels = [1] * len(positive) + [0] * len(negative)
    fitted: Any = LogisticRegression(C=0.1, max_iter=2000).fit(((both - centre) / scale).numpy(), labels)
    return torch.from_numpy(fitted.coef_[0]).float() * scale  # the direction in which activations differ, not the detector


METHODS: dict[str, Fit] = {"difference-of-means": difference_of_means, "pca": pca, "probe": probe}


def unit(direction: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """The same direction with length 1, so that raw coordinates are lengths."""
    return direction / direction.norm()
