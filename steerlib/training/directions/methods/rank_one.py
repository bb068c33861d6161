"""A rank-one intervention trained with the language-model loss: `x + (x @ r + b) v`, the factor kept between 0 and 1.

Trained to make the model predict answers that show the concept, after ReFT-r1 (Wu et al. 2025, arXiv 2501.17148), which trains
detector and direction together with the next-token loss.
"""

from collections.abc import Sequence

from torch import Tensor

from ..levers import Lever, Task
from ..objectives import optimise, shown
from ..readouts import Readout
from .difference_of_means import direction

STEPS = 24
RATE = 0.3
GATE_RATE = 0.02


def fit(task: Task) -> Lever:
    site = task.site
    d, n = direction(task, site), task.norms[site]
    both = (task.positive[site].mean(0) + task.negative[site].mean(0)) / 2

    def build(tensors: Sequence[Tensor]) -> Lever:
        vector, read, bias = tensors
        return Lever(moves={site: vector}, gate=Readout(site, read, bias))

    read = d / n
    start = [(d * n * 0.15, RATE), (read, GATE_RATE), (0.8 - read @ both, GATE_RATE)]
    return optimise(task, start, build, shown(task), steps=STEPS, what="rank one")
