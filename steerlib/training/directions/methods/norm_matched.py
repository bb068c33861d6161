"""Difference of means, added in proportion to each token's own length."""

from ..levers import Lever, Task
from .difference_of_means import direction


def fit(task: Task) -> Lever:
    return task.at(direction(task, task.site), norm=task.norms[task.site])
