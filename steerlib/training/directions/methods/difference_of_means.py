"""Mean with the concept minus mean without it (Marks & Tegmark 2023, arXiv 2310.06824)."""

from jaxtyping import Float
from torch import Tensor

from ..levers import Lever, Task


def direction(task: Task, site: str) -> Float[Tensor, " D"]:
    """The direction at a site, of length 1."""
    one, other = task.positive[site], task.negative[site]
    # of pairs, what both have in common cancels before it is rounded
    difference = (one - other).mean(0) if len(one) == len(other) else one.mean(0) - other.mean(0)
    return difference / difference.norm()


def fit(task: Task) -> Lever:
    return task.at(direction(task, task.site))
