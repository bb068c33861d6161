"""Activations on disk: safetensors files of bounded size, and batches of them in an order that mixes documents.

A folder holds `index.json` and `00000.safetensors`, …. Every shard has, row by row in the order of reading, one tensor
`[rows, D]` a site, and `documents`, `positions` (in the document) and, where rows are tokens, `ids`. A row's document
never has a lower number than the row before.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ...errors import BadRecipe, UnknownFormat, nearest
from ..store import save, whole

FORMAT = 1
LABELS = ("documents", "positions", "ids")
"""What is known of a row beside its activations, int32."""
HEADER = 4096
"""Bytes allowed for the head of a shard."""


class Shelf:
    """A folder to which shards are added one by one, each whole or not at all. `settings` determine all of them."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder, self.settings = folder, json.loads(json.dumps(settings))
        self.entries: list[dict[str, Any]] = []
        if (folder / "index.json").is_file():
            index = _index(folder)
            if other := sorted(k for k in {*index["settings"], *settings} if index["settings"].get(k) != self.settings.get(k)):
                raise BadRecipe(f"{folder.name} was recorded with other {', '.join(other)}; use another folder, or delete it")
            self.entries = index["shards"]

    @property
    def rows(self) -> int:
        return sum(entry["rows"] for entry in self.entries)

    def has(self, number: int, source: str) -> bool:
        """Whether shard `number` is there and was made from `source`, a digest. The last one, which may have been cut short by
        the number of tokens, may be made again from more."""
        if number >= len(self.entries):
            return False
        entry = self.entries[number]
        if entry["source"] != source and number < len(self.entries) - 1:
            raise BadRecipe(f"{self.folder.name}/{entry['file']} is of other texts; use another folder, or delete this one")
        if entry["source"] == source and _is_whole(self.folder, entry):
            return True
        self.entries[number:] = []
        return False

    def put(self, source: str, tensors: Mapping[str, Tensor]) -> None:
        """Add the next shard."""
        name, documents = f"{len(self.entries):05}.safetensors", tensors["documents"]
        save(self.folder / name, tensors)
        size = (self.folder / name).stat().st_size
        entry = {"file": name, "rows": len(documents), "bytes": size, "source": source}
        self.entries.append(entry | {"first": int(documents[0]), "last": int(documents[-1])})
        written = json.dumps({"format": FORMAT, "settings": self.settings, "shards": self.entries}, indent=1, sort_keys=True)
        with whole(self.folder / "index.json") as part:
            part.write_text(written + "\n", encoding="utf-8")


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.is_file():
        raise BadRecipe(f"expected activations in {folder.name!r}, found no index.json; record them by harvest(...)")
    index = json.loads(path.read_text(encoding="utf-8"))
    if index.get("format") != FORMAT:
        raise UnknownFormat(f"{folder.name} has format {index.get('format')}, this steerlib reads {FORMAT}; record it again")
    return index


def _is_whole(folder: Path, entry: Mapping[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


class Shards:
    """Recorded activations. The last documents, a share `held_out` of all, are in no training batch."""

    def __init__(self, folder: str | os.PathLike[str], *, held_out: float = 0.0):
        self.folder = Path(folder)
        index = _index(self.folder)
        self.settings: dict[str, Any] = index["settings"]
        self.entries: list[dict[str, Any]] = index["shards"]
        if broken := [entry["file"] for entry in self.entries if not _is_whole(self.folder, entry)]:
            raise BadRecipe(f"{self.folder.name}: {', '.join(broken)} missing or cut short; record again, and it is made anew")
        if not 0 <= held_out < 1:
            raise BadRecipe(f"expected a share of documents to hold out from 0 up to 1, got {held_out}")
        self.kept_documents = math.ceil(round(self.documents * (1 - held_out), 6))
        if not self.training:
            raise BadRecipe(f"nothing is left to train on: {held_out:.0%} of {self.documents} documents held out")

    def __len__(self) -> int:
        """Rows in all: tokens, held-out ones included."""
        return sum(entry["rows"] for entry in self.entries)

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.settings["sites"])

    def width(self, site: str) -> int:
        """Length of an activation at a site."""
        if site not in self.settings["sites"]:
            raise BadRecipe(f"{self.folder.name} has no site {site!r}; {nearest(site, self.sites)}")
        return self.settings["sites"][site]

    @property
    def documents(self) -> int:
        """Documents that rows may come from."""
        return self.entries[-1]["last"] + 1

    @cached_property
    def training(self) -> int:
        """Rows that batches are made of; those behind them are held out."""
        return sum(rows for _, rows in self.training_shards)

    @cached_property
    def training_shards(self) -> list[tuple[int, int]]:
        """Shards by number, and how many of their first rows are for training."""
        found = []
        for number, entry in enumerate(self.entries):
            if entry["last"] < self.kept_documents:
                found.append((number, entry["rows"]))
            elif entry["first"] < self.kept_documents:
                found.append((number, int((self.load(number, ["documents"])["documents"] < self.kept_documents).sum())))
        return found

    def load(self, number: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors of one shard: sites, `documents`, `positions`, `ids`."""
        with safe_open(self.folder / self.entries[number]["file"], framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}

    def batches(
        self, names: str | Sequence[str], start_step: int, batch: int, *, seed: int = 0, epochs: int | None = None, mix: int = 8
    ) -> Iterator[Any]:
        """Training batches from step `start_step` on, `[batch, D]` each, as they are stored; by name if several are asked for.

        Rows of `mix` shards, which are in memory together, are shuffled at a time; which shards, and how, is drawn anew each
        epoch. A batch may begin in one epoch and end in the next; after `epochs` (None: never) there are no more whole ones.
        """
        if not 0 < batch <= self.training or start_step < 0 or mix < 1:
            raise BadRecipe(
                f"expected a batch of at most the {self.training} rows for training, a start of 0 or more and shards to mix, "
                f"got batch={batch}, start_step={start_step}, mix={mix}"
            )
        mixed = Mixed(self, self._known(names), seed, mix)
        steps = math.inf if epochs is None else epochs * self.training // batch

        def generate() -> Iterator[Any]:
            step = start_step
            while step < steps:
                yield _as_asked(names, mixed.rows(step * batch, batch))
                step += 1

        return generate()

    def source(self, site: str, *, target: str | None = None, **how: Any) -> "SiteSource":
        """A site, and for a transcoder the site it is to write, as encoders are fitted to; `how` is that of `batches`."""
        return SiteSource(self, site, target, how)

    def in_order(self, names: str | Sequence[str], batch: int, start: int = 0, stop: int | None = None) -> Iterator[Any]:
        """Rows `start` to `stop` as they were read, at most `batch` at a time. Held-out ones begin at row `training`."""
        known, before, stop = self._known(names), 0, len(self) if stop is None else stop
        for number, entry in enumerate(self.entries):
            low, high = max(start - before, 0), min(stop - before, entry["rows"])
            loaded = self.load(number, known) if low < high else {}
            for i in range(low, high, batch):
                yield _as_asked(names, {name: x[i : min(i + batch, high)].clone() for name, x in loaded.items()})
            before += entry["rows"]

    def _known(self, names: str | Sequence[str]) -> list[str]:
        asked = [names] if isinstance(names, str) else list(names)
        for name in asked:
            if name not in LABELS:
                self.width(name)
        return asked


@dataclass(frozen=True, eq=False)
class SiteSource:
    """Training batches of one site, or of one and another."""

    shards: Shards
    site: str
    target: str | None
    how: Mapping[str, Any]

    @property
    def width(self) -> int:
        return self.shards.width(self.site)

    def __len__(self) -> int:
        return self.shards.training

    def batches(self, start: int, batch: int) -> Iterator[Any]:
        """Batches without end, from the `start`-th on: activations, or those of both sites."""
        if self.target is None:
            yield from self.shards.batches(self.site, start, batch, **self.how)
        else:
            for found in self.shards.batches([self.site, self.target], start, batch, **self.how):
                yield found[self.site], found[self.target]


def _as_asked(names: str | Sequence[str], found: dict[str, Tensor]) -> Tensor | dict[str, Tensor]:
    return found[names] if isinstance(names, str) else found


class Mixed:
    """All training rows in an endless order, epoch after epoch, that can be entered anywhere."""

    def __init__(self, shards: Shards, names: Sequence[str], seed: int, mix: int):
        self.shards, self.names, self.seed, self.mix = shards, names, seed, mix
        self.start, self.order, self.tensors = 0, torch.empty(0, dtype=torch.long), dict[str, Tensor]()

    def rows(self, place: int, count: int) -> dict[str, Tensor]:
        """`count` rows from a place in the order."""
        parts = []
        while count:
            if not self.start <= place < self.start + len(self.order):
                self._load(place)
            chosen = self.order[place - self.start : place - self.start + count]
            parts.append({name: x[chosen] for name, x in self.tensors.items()})
            place, count = place + len(chosen), count - len(chosen)
        return {name: torch.cat([part[name] for part in parts]) for name in self.names}

    def _load(self, place: int) -> None:
        """Bring the pool of shards that a place lies in to memory: its first place, its order and its rows."""
        self.order, self.tensors = self.order[:0], {}  # free the old one first
        epoch, inside = divmod(place, self.shards.training)
        start = place - inside
        for number, members in enumerate(self._pools(epoch)):
            size = sum(rows for _, rows in members)
            if place < start + size:
                order = np.random.default_rng([self.seed, epoch, number]).permutation(size)
                self.tensors = self._gathered(members, size)
                self.start, self.order = start, torch.from_numpy(order)
                return
            start += size
        raise AssertionError("a place lies in one of an epoch's pools")

    def _pools(self, epoch: int) -> list[list[tuple[int, int]]]:
        """The epoch's shards in pools of at most `mix`, as equal as can be."""
        shards = self.shards.training_shards
        order = np.random.default_rng([self.seed, epoch]).permutation(len(shards))
        return [[shards[i] for i in part] for part in np.array_split(order, math.ceil(len(shards) / self.mix))]

    def _gathered(self, members: Sequence[tuple[int, int]], size: int) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        start = 0
        for number, rows in members:
            for name, x in self.shards.load(number, self.names).items():
                whole.setdefault(name, x.new_empty(size, *x.shape[1:]))[start : start + rows] = x[:rows]
            start += rows
        return whole
