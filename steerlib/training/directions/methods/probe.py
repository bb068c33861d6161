"""A logistic regression that tells answers with the concept from answers without it, as a pattern in activations.

Its weights w are the detector; the pattern they detect is Cov w (Haufe et al. 2014), here with standardised coordinates
taken as uncorrelated.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....errors import MissingExtra
from ..levers import Lever, Task


def fit(task: Task) -> Lever:
    return task.at(pattern(task.positive[task.site], task.negative[task.site]))


def pattern(positive: Float[Tensor, "n D"], negative: Float[Tensor, "m D"]) -> Float[Tensor, " D"]:
    """The pattern that tells two sets of activations apart, of any length; each set counts as a whole."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingExtra("the probe needs scikit-learn: pip install 'steerlib[train]'") from None
    both = torch.cat((positive, negative))
    centre, scale = both.mean(0), both.std(0).clamp(min=1e-6)
    labels = [1] * len(positive) + [0] * len(negative)
    fitted: Any = LogisticRegression(C=0.1, max_iter=2000, class_weight="balanced").fit(
        ((both - centre) / scale).numpy(), labels
    )
    return torch.from_numpy(fitted.coef_[0]).float() * scale
