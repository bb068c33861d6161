"""A vector at every site that is tried, all trained together on the prompted model's next-token distribution."""

from ..levers import Lever, Task
from ..objectives import optimise, told
from .difference_of_means import direction

EVERYWHERE = True
STEPS = 24
RATE = 0.3


def fit(task: Task) -> Lever:
    sites = task.sites
    start = [(direction(task, site) * task.norms[site] * 0.12 / len(sites) ** 0.5, RATE) for site in sites]
    return optimise(
        task,
        start,
        lambda tensors: Lever(moves=dict(zip(sites, tensors, strict=True))),
        told(task),
        steps=STEPS,
        what="several layers",
    )
