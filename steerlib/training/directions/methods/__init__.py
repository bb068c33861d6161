"""Ways to find a lever, one a file: `fit(task) -> Lever`. A new method is one file in this folder.

Its name is the file's, with hyphens: `norm_matched.py` is `norm-matched`. The first line of the file says what it does.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

METHODS: dict[str, ModuleType] = {
    found.name.replace("_", "-"): import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)
}
"""By name, in alphabetical order."""


def is_everywhere(method: str) -> bool:
    """Whether a method gives one lever for all sites, whichever it is tried at; its file says `EVERYWHERE = True`."""
    return getattr(METHODS[method], "EVERYWHERE", False)
