"""What a graph is fitted to: readings of contexts as they are, and how they change when latents are ablated at random.

Everything is made in pieces that are kept in a folder, so that a run that was killed goes on where it was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse import vstack
from tqdm.auto import tqdm

from ..errors import BadRecipe
from ..evaluation.systems import Codes, Contexts, System, csr, entries, thinned

CONTEXTS = 2048
"""Contexts run together."""


class Level(NamedTuple):
    """A level over many contexts, `[units, latents]`."""

    z: Codes
    """Readings."""
    x: Codes
    """What went on less by the ablations, the level's own and what came of those before."""
    y: Codes
    """What it read less by those before."""


class Folder:
    """Results by name, each whole or not there; without a path, none is kept. `settings` are what all of them follow from."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]):
        self.path = path
        if path is None:
            return
        path.mkdir(parents=True, exist_ok=True)
        text, file = json.dumps(settings, indent=1, sort_keys=True) + "\n", path / "settings.json"
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            raise BadRecipe(f"{path.name} holds a graph of other settings; use another folder, or delete it")
        file.write_text(text, encoding="utf-8")

    def kept(self, name: str, make: Callable[[], Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
        """Arrays that were kept under a name, or are made now."""
        if self.path is None:
            return dict(make())
        file = self.path / f"{name}.safetensors"
        if not file.is_file():
            save_file({key: np.ascontiguousarray(value) for key, value in make().items()}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return load_file(file)


def flat(name: str, z: Codes) -> dict[str, NDArray[Any]]:
    """Sparse readings as arrays."""
    arrays = {"data": z.data, "indices": z.indices, "indptr": z.indptr, "shape": np.array(z.shape)}
    return {f"{name}.{part}": array for part, array in arrays.items()}


def deep(name: str, arrays: Mapping[str, NDArray[Any]]) -> Codes:
    """Sparse readings from arrays."""
    data, indices, indptr, shape = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr", "shape"))
    return csr((data, indices, indptr), shape=tuple(map(int, shape)))


def observed(system: System, contexts: Contexts, folder: Folder, *, what: str = "reading") -> dict[str, Codes]:
    """Readings of every level."""
    return _collected(contexts, folder, what, list(system.levels), lambda some, _: _read(system, some))


def _read(system: System, contexts: Contexts) -> dict[str, Codes]:
    return {name: reading.flows for name, reading in system.run(contexts).items()}


def ablated_at_random(
    system: System, contexts: Contexts, folder: Folder, *, share: float = 0.15, seed: int = 0
) -> dict[str, Level]:
    """Two runs of each context with the same chance: as it is, and with a `share` of all firings taken away, at every level
    and unit by a draw of its own. What a level lost is what was taken there and what it lost by the levels before."""
    parts = [f"{name}/{part}" for name in system.levels for part in Level._fields]

    def both(some: Contexts, number: int) -> dict[str, Codes]:
        random = np.random.default_rng([seed, number])
        plain = system.run(some)
        less = system.run(some, {name: thinned(share, random) for name in system.levels})
        found = {}
        for name, reading in plain.items():
            found[f"{name}/z"] = reading.flows
            found[f"{name}/x"] = difference(reading.flows, less[name].flows)
            found[f"{name}/y"] = difference(reading.natural, less[name].natural)
        return found

    whole = _collected(contexts, folder, "ablating", parts, both)
    return {name: Level(*(whole[f"{name}/{part}"] for part in Level._fields)) for name in system.levels}


def difference(a: Codes, b: Codes) -> Codes:
    """What one reading has more than another; rounding is nothing."""
    less = csr(a - b)
    return entries(less, np.where(np.abs(less.data) > 1e-6, less.data, 0))


def _collected(
    contexts: Contexts,
    folder: Folder,
    what: str,
    parts: Sequence[str],
    run: Callable[[Contexts, int], Mapping[str, Codes]],
) -> dict[str, Codes]:
    """Run all contexts, some at a time."""
    pieces: dict[str, list[Codes]] = {part: [] for part in parts}
    starts = range(0, len(contexts), CONTEXTS)
    for number, start in enumerate(tqdm(starts, desc=what, leave=False, disable=len(starts) < 4)):
        some = contexts[start : start + CONTEXTS]

        def make(some: Contexts = some, number: int = number) -> dict[str, NDArray[Any]]:
            return {key: array for name, z in run(some, number).items() for key, array in flat(name, z).items()}

        arrays = folder.kept(f"{what}-{number:05}", make)
        for part in parts:
            pieces[part].append(deep(part, arrays))
    return {part: csr(vstack(found)) for part, found in pieces.items()}
