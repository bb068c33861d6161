"""One vector at one site, trained until the model, asked plainly, predicts tokens as it does when asked for the concept.

Context distillation (Snell et al. 2022, arXiv 2209.15189) into a vector v: the least
`KL(p(. | asked for it) || p_v(. | asked plainly))` on the answers that asking for it gives.
"""

from collections.abc import Sequence

from torch import Tensor

from ..levers import Lever, Task
from ..objectives import optimise, told
from .difference_of_means import direction

STEPS = 24
RATE = 0.3


def fit(task: Task) -> Lever:
    start = direction(task, task.site) * task.norms[task.site] * 0.12

    def build(tensors: Sequence[Tensor]) -> Lever:
        return Lever(moves={task.site: tensors[0]})

    return optimise(task, [(start, RATE)], build, told(task), steps=STEPS, what="distilled")
