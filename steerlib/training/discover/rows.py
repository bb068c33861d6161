"""What a graph is fitted to: readings of contexts as they are, and how they change when latents are ablated at random.

Everything is made in pieces that are kept in a folder, so that a run that was killed goes on where it was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import vstack

from ...errors import BadRecipe
from ...text import progress
from ..store import recorded, whole
from .systems import Codes, Contexts, System, csr, entries, thinned

ABLATED = 0.15
"""Share of all firings that random ablations set to 0."""
Make = Callable[[], Mapping[str, NDArray[Any]]]


class Level(NamedTuple):
    """A level over many contexts, `[units, latents]`."""

    z: Codes
    """Readings."""
    x: Codes
    """What went on less by the ablations, the level's own and what came of those before."""
    y: Codes
    """What it read less by those before."""


class Folder:
    """Results by name, each whole or not there; without a path, none is kept. `settings` are what all of them follow from.

    `accelerator` (accelerate's) shares the work among its processes, which then need a path in common.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], accelerator: Any = None):
        self.path, self.settings, self.accelerator = path, {**settings}, accelerator
        if path is None:
            if accelerator is not None and accelerator.num_processes > 1:
                raise BadRecipe("expected a folder that several processes share, got none; give folder=")
            return
        text, file = json.dumps(settings, indent=1, sort_keys=True) + "\n", path / "settings.json"
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            raise BadRecipe(f"{path.name} holds a graph of other settings; use another folder, or delete it")
        if not file.is_file() and (accelerator is None or accelerator.is_main_process):
            with whole(file) as part:
                part.write_text(text, encoding="utf-8")

    def under(self, name: str, more: Mapping[str, Any]) -> "Folder":
        """A folder in it, for results that follow from `more` settings."""
        return Folder(None if self.path is None else self.path / name, {**self.settings, **more}, self.accelerator)

    def all(self, jobs: Mapping[str, Make], what: str) -> list[dict[str, NDArray[Any]]]:
        """The results of jobs by name, those that are not kept yet made now, a part by each process."""
        rank, world = (0, 1) if self.accelerator is None else (self.accelerator.process_index, self.accelerator.num_processes)
        own = list(jobs)[rank::world]
        made = {name: self._kept(name, jobs[name]) for name in progress(own, what, disable=rank > 0 or len(own) < 4)}
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
        return [made[name] if name in made else self._kept(name, make) for name, make in jobs.items()]

    def _kept(self, name: str, make: Make) -> dict[str, NDArray[Any]]:
        if self.path is None:
            return dict(make())

        def tensors() -> dict[str, torch.Tensor]:
            return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in make().items()}

        return {key: value.numpy() for key, value in recorded(self.path / f"{name}.safetensors", tensors).items()}


def flat(name: str, z: Codes) -> dict[str, NDArray[Any]]:
    """Sparse readings as arrays."""
    arrays = {"data": z.data, "indices": z.indices, "indptr": z.indptr, "shape": np.array(z.shape)}
    return {f"{name}.{part}": array for part, array in arrays.items()}


def deep(name: str, arrays: Mapping[str, NDArray[Any]]) -> Codes:
    """Sparse readings from arrays."""
    data, indices, indptr, shape = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr", "shape"))
    return csr((data, indices, indptr), shape=tuple(map(int, shape)))


def observed(system: System, contexts: Contexts, folder: Folder) -> dict[str, Codes]:
    """Readings of every level."""

    def read(some: Contexts, _: int) -> dict[str, Codes]:
        return {name: reading.flows for name, reading in system.run(some).items()}

    return _collected(contexts, system.batch, folder, "reading", list(system.levels), read)


def ablated_at_random(system: System, contexts: Contexts, folder: Folder, *, seed: int = 0) -> dict[str, Level]:
    """Two runs of each context with the same random numbers: one as it is, one with a share `ABLATED` of all firings set to 0,
    drawn anew at every level and unit. What a level lost is what was taken there and what it lost by the levels before."""
    parts = [f"{name}/{part}" for name in system.levels for part in Level._fields]

    def both(some: Contexts, number: int) -> dict[str, Codes]:
        random = np.random.default_rng([seed, number])
        plain = system.run(some)
        less = system.run(some, {name: thinned(ABLATED, random) for name in system.levels})
        found = {}
        for name, reading in plain.items():
            found[f"{name}/z"] = reading.flows
            found[f"{name}/x"] = difference(reading.flows, less[name].flows)
            found[f"{name}/y"] = difference(reading.natural, less[name].natural)
        return found

    whole = _collected(contexts, system.batch, folder, "ablating", parts, both)
    return {name: Level(*(whole[f"{name}/{part}"] for part in Level._fields)) for name in system.levels}


def difference(a: Codes, b: Codes) -> Codes:
    """What one reading has more than another; rounding is nothing."""
    less = csr(a - b)
    return entries(less, np.where(np.abs(less.data) > 1e-6, less.data, 0))


def _collected(
    contexts: Contexts,
    batch: int,
    folder: Folder,
    what: str,
    parts: Sequence[str],
    run: Callable[[Contexts, int], Mapping[str, Codes]],
) -> dict[str, Codes]:
    """Run all contexts, some at a time."""
    starts = range(0, len(contexts), batch)

    def make(number: int) -> dict[str, NDArray[Any]]:
        some = contexts[starts[number] : starts[number] + batch]
        return {key: array for name, z in run(some, number).items() for key, array in flat(name, z).items()}

    pieces = folder.all({f"{what}-{number:05}": partial(make, number) for number in range(len(starts))}, what)
    return {part: csr(vstack([deep(part, arrays) for arrays in pieces])) for part in parts}
