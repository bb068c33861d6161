"""Vectors at several sites whose strength each token decides: `g(x) = clamp(x @ r + b, 0, 1)`, read once at the first site.

Trained on the prompted model's next-token distribution, and to leave ordinary text as it is: token-gated strengths that mimic
the prompt lift steering above prompting in published comparisons. The gate starts as the discriminant between answers in a
chat and ordinary text.
"""

from collections.abc import Sequence

from torch import Tensor

from ..levers import Lever, Task
from ..objectives import optimise, told, untouched
from ..readouts import Readout, discriminant
from .difference_of_means import direction

EVERYWHERE = True
STEPS = 24
RATE = 0.3
GATE_RATE = 0.02
"""A gate that moves as fast as the vectors closes before they have learned anything."""


def first_gate(task: Task) -> Readout:
    """Opens between a quarter and three quarters of the way from ordinary text to answers."""
    site = task.sites[0]
    answers = (task.positive[site].mean(0) + task.negative[site].mean(0)) / 2
    between = discriminant(site, answers, task.reference[site].mean(0), task.reference[site])
    return Readout(site, 2 * between.read, 2 * between.bias - 0.5)


def fit(task: Task) -> Lever:
    sites, gate = task.sites, first_gate(task)
    start = [(direction(task, site) * task.norms[site] * 0.12 / len(sites) ** 0.5, RATE) for site in sites]

    def build(tensors: Sequence[Tensor]) -> Lever:
        *vectors, read, bias = tensors
        return Lever(moves=dict(zip(sites, vectors, strict=True)), gate=Readout(gate.site, read, bias))

    return optimise(
        task,
        [*start, (gate.read, GATE_RATE), (gate.bias, GATE_RATE)],
        build,
        told(task),
        steps=STEPS,
        retain=untouched(task),
        what="gated",
    )
