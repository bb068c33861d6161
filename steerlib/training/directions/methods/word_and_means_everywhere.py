"""`word-and-means` at every site that is tried, together: the same change, spread over the layers."""

from ..levers import Lever, Task
from . import word, word_and_means

EVERYWHERE = True


def fit(task: Task) -> Lever:
    return _everywhere([word_and_means.fit(task.elsewhere(site)) for site in task.sites])


def control(task: Task) -> Lever:
    """The same of a random word."""
    return _everywhere([word.control(task.elsewhere(site)) for site in task.sites])


def _everywhere(levers: list[Lever]) -> Lever:
    return Lever(moves={site: move for lever in levers for site, move in lever.moves.items()})
