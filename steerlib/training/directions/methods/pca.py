"""First principal component of the pairs' differences, with the sign of their mean (Zou et al. 2023, arXiv 2310.01405)."""

import torch

from ..levers import Lever, Task


def fit(task: Task) -> Lever:
    difference = task.positive[task.site] - task.negative[task.site]  # not centred: their common part is looked for
    direction = torch.linalg.svd(difference, full_matrices=False).Vh[0]
    return task.at(direction * torch.sign(direction @ difference.mean(0)))
