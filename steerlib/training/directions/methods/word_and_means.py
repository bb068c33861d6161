"""The direction of the name's words and the difference of means, of equal length, added."""

from ..levers import Lever, Task
from . import word
from .difference_of_means import direction


def fit(task: Task) -> Lever:
    own = word.directions(task)[task.site][0]
    return task.at(own / own.norm() + direction(task, task.site))


control = word.control
