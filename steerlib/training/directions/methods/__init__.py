"""Ways to find a lever, one a file: `fit(task) -> Lever`. A new method is one file in this folder.

Its name is the file's, with hyphens: `norm_matched.py` is `norm-matched`. The first line of the file says what it does.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ....errors import BadBank, BadRecipe, WrongWidth

Find = Callable[[Tensor, Tensor], Any]
"""From mean activations of texts with a concept, `[n, D]`, and of texts without it, `[m, D]`, to its vector `[D]`."""
METHODS: dict[str, Any] = {
    found.name.replace("_", "-"): import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)
}
"""By name, in alphabetical order."""


@contextmanager
def beside(own: Mapping[str, Find]) -> Iterator[None]:
    """Inside the block, functions are methods too, under these names."""

    def entry(find: Find) -> Any:
        return SimpleNamespace(fit=lambda task: task.at(vector_of(find, task.positive[task.site], task.negative[task.site])))

    if taken := sorted(own.keys() & METHODS.keys()):
        raise BadRecipe(f"{', '.join(taken)}: a method of steerlib is called so; give yours another name")
    METHODS.update({name: entry(find) for name, find in own.items()})
    try:
        yield
    finally:
        for name in own:
            del METHODS[name]


def vector_of(find: Find, positive: Float[Tensor, "n D"], negative: Float[Tensor, "m D"]) -> Float[Tensor, " D"]:
    """What a function finds; raises `WrongWidth` or `BadBank` where that is no vector, or one that is still to learn."""
    found = torch.as_tensor(find(positive, negative))
    if found.shape != positive.shape[1:]:
        raise WrongWidth(f"expected a vector of {positive.shape[1]} from the method, got {tuple(found.shape)}")
    if found.requires_grad:
        raise BadBank("the method gave a vector that requires gradients; give it to ConceptBank.from_directions, or detach it")
    return found.float()


def is_everywhere(method: str) -> bool:
    """Whether a method gives one lever for all sites, whichever it is tried at; its file says `EVERYWHERE = True`."""
    return getattr(METHODS[method], "EVERYWHERE", False)
