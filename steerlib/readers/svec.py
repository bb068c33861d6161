"""Steering vectors of IBM's activation-steering (Lee et al. 2024, 2409.05907): JSON in `.svec`, a vector for each layer.

`directions[L]` [D] is added to what block L is given, where that library adds it.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CorruptBank
from . import files, repeng
from .foreign import Foreign
from .table import Table

FILES = (".svec",)
SETTINGS = Table(read="directions model_type", aside="explained_variances")


def units(path: Path) -> list[Path]:
    """Files of one concept each."""
    return [path] if path.suffix in FILES else sorted(path.glob("*.svec")) if path.is_dir() else []


def read(path: Path, title: str, *, ignore: Iterable[str] = ()) -> Foreign:  # noqa: ARG001
    """A concept for each file, named after it, that moves all its layers at once; its unit is the vectors themselves."""
    found = {file.stem: files.settings(file) for file in units(path)}
    for name, values in found.items():
        SETTINGS.check(Path(name), values, tuple(ignore))
    model = str(next(iter(found.values())).get("model_type", ""))
    vectors = {name: _vectors(name, values.get("directions")) for name, values in found.items()}
    return repeng.of_layers(vectors, {"model_hint": model}, "layers.{}.input")


def _vectors(name: str, directions: object) -> dict[int, Tensor]:
    if not isinstance(directions, dict):
        raise CorruptBank(f"expected vectors by layer under 'directions' of {name!r}, got {type(directions).__name__}")
    try:
        return {
            int(layer): files.part({layer: torch.tensor(row)}, layer, 1) for layer, row in directions.items() if int(layer) >= 0
        }
    except (TypeError, ValueError) as error:
        raise CorruptBank(f"expected rows of numbers by layer under 'directions' of {name!r}: {error}") from None
