"""How the bytes of a bank are trusted, and what a stranger's file may be.

A whole file is trusted by its SHA-256. A part of one is trusted by a tree of two levels: the hashes of its 64 KiB blocks
are kept, 32 bytes each, in `hashes.safetensors`; and of these, again, each 64 KiB has its hash in `bank.json`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CorruptBank

HASHES = "hashes.safetensors"
BLOCK = 1 << 16
PER_GROUP = BLOCK // 32
SUFFIXES = {".safetensors": 1 << 42, ".json": 64 << 20, ".jsonl": 1 << 30, ".md": 4 << 20, ".png": 16 << 20, ".txt": 16 << 20}
"""The kinds of files a bank may hold, and how large each may be."""
MAX_FILES = 4096
MAX_SIDE = 1 << 42
MAX_MANIFEST = 4 << 20
MAX_PICTURES = 16 << 20
MAX_LINE = 1 << 20
MAX_HEADER = 16 << 20
MAX_TENSORS = 10_000
MAX_DEPTH = 32
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"), "U8": np.dtype("u1"), "BF16": np.dtype("<u2")}
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
"""Names that Windows keeps for devices, whatever follows the first dot."""


def checked_name(name: str) -> str:
    """A file name from a stranger: plain, relative, of a kind a bank may hold, on POSIX and on Windows."""
    path = PurePosixPath(name)
    plain = all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,120}", part) and part[-1] != "." for part in path.parts)
    device = any(part.partition(".")[0].lower() in DEVICES for part in path.parts)
    if not plain or device or str(path) != name or path.suffix not in SUFFIXES or len(path.parts) > 3:
        raise CorruptBank(f"expected a plain relative name ending in {', '.join(sorted(SUFFIXES))}, got {name!r:.200}")
    return name


def is_plain_name(name: str) -> bool:
    """Whether a bank may hold a file of this name."""
    try:
        return checked_name(name) == name
    except CorruptBank:
        return False


def checked_files(files: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `bank.json` says of the other files, each with a size, a SHA-256 and perhaps the hashes of its groups of blocks."""
    names = [checked_name(name) for name in files]
    if len(names) > MAX_FILES or len({name.lower() for name in names}) < len(names):
        raise CorruptBank(f"expected at most {MAX_FILES} files whose names differ by more than case, got {len(names)}")
    for name, record in files.items():
        size, groups = record["size"], record.get("blocks", [])
        sound = type(size) is int and 0 <= size <= SUFFIXES[PurePosixPath(name).suffix] and isinstance(groups, list)
        if not sound or not all(isinstance(h, str) and re.fullmatch("[0-9a-f]{64}", h) for h in (record["sha256"], *groups)):
            raise CorruptBank(f"expected a fitting size and the SHA-256 of {name} in bank.json, got {record!r:.200}")
    return {name: dict(record) for name, record in files.items()}


def strict_json(text: bytes, what: str) -> Any:
    """JSON without NaN, duplicate keys or absurd nesting."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a pair of surrogates could not be written again
    except (ValueError, RecursionError) as error:
        raise CorruptBank(f"{what} is not valid JSON: {error}") from None
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        nested = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))]
        level = [inner for values in nested for inner in values]
    if level:
        raise CorruptBank(f"{what} is nested deeper than {MAX_DEPTH}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as `bank.json` records them."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def contained(folder: Path, name: str) -> Path:
    """A file of a bank that is there, is a file, and lies in its folder or where the Hub's cache keeps what it links to."""
    path = folder / name
    if not path.is_file():
        raise CorruptBank(f"{name} is missing from {folder.name}; download the bank again, or write it with save_pretrained")
    homes = [os.path.realpath(folder)]
    if folder.parent.name == "snapshots":
        homes += [os.path.realpath(cache / "blobs") for cache in folder.absolute().parents[1:3]]  # its own, and the shared one
    real = os.path.realpath(path)
    if not any(real.startswith(home + os.sep) for home in homes):
        raise CorruptBank(f"{name} links to a place outside of {folder.name}; replace the link by the file")
    return path


def check_whole(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Raise unless a file is there, whole and unaltered."""
    path = contained(folder, checked_name(name))
    size = path.stat().st_size
    if size != record["size"] or describe(path)["sha256"] != record["sha256"]:
        found = "its bytes differ" if size == record["size"] else f"it has {size} bytes, bank.json says {record['size']}"
        raise CorruptBank(
            f"{name} is not the file that bank.json describes (truncated or altered: {found}); download the bank again. If you "
            "edited it, take that back; labels, amounts and the card change by bank.with_concepts(...).save_pretrained(folder)"
        )


def strays(folder: Path, names: Iterable[str]) -> list[str]:
    """Files in the folder of a bank that are none of these; hidden ones are left out."""
    there = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = {*names}
    return [path.as_posix() for path in there if path.as_posix() not in listed and not any(p[0] in "._" for p in path.parts)]


def block_hashes(path: Path) -> bytes:
    """SHA-256 of every block of a file, one after the other."""
    with path.open("rb") as file:
        return b"".join(hashlib.sha256(block).digest() for block in iter(lambda: file.read(BLOCK), b""))


def group_hashes(blocks: bytes) -> list[str]:
    """SHA-256 of every 64 KiB of block hashes."""
    return [hashlib.sha256(blocks[i : i + BLOCK]).hexdigest() for i in range(0, len(blocks), BLOCK)]


Read = Callable[[str, Mapping[str, Any], int, int, str | None], bytes]
"""Reads a file of a bank: its name, what `bank.json` says of it, first and last byte, and the hash by which a cache may know
them. Whoever asks checks what comes."""


class Tensors:
    """A safetensors file read by position: only the blocks that hold the asked-for rows, each checked when first read."""

    def __init__(self, read: Read, name: str, record: Mapping[str, Any], hashes: "Tensors | None" = None):
        """`hashes` are those of its blocks; without them bytes are not checked here."""
        self.name, self.size = name, record["size"]
        self._read, self._hashes = partial(read, name, record), hashes
        self._groups: tuple[str, ...] = tuple(record.get("blocks", ()))
        self._checked: dict[int, bytes] = {}
        length = int.from_bytes(self._bytes(0, min(8, self.size)), "little")
        if not 2 <= length <= min(MAX_HEADER, self.size - 8):
            raise CorruptBank(f"{name} has no valid safetensors header")
        header = strict_json(self._bytes(8, 8 + length), name)
        if not isinstance(header, dict) or len(header) > MAX_TENSORS:
            raise CorruptBank(f"expected at most {MAX_TENSORS} named tensors in {name}, got {header!r:.100}")
        header.pop("__metadata__", None)
        self.header = {key: self._entry(key, entry, 8 + length) for key, entry in header.items()}
        self._check_cover(8 + length)

    def _entry(self, key: str, entry: Any, base: int) -> tuple[str, tuple[int, ...], int]:
        """Dtype, shape and first byte of a tensor, all within the file."""
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = all(type(n) is int and 0 <= n <= MAX_SIDE for n in (*shape, start, stop)) and len(shape) <= 8
            sound = sound and math.prod(side or 1 for side in shape) <= MAX_SIDE
            sound = sound and stop - start == math.prod(shape) * DTYPES[dtype].itemsize and base + stop <= self.size
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CorruptBank(f"tensor {key!r:.100} in {self.name} does not fit the file")
        return dtype, shape, base + start

    def _check_cover(self, base: int) -> None:
        """Tensors lie one after the other, and nothing between, over or after them."""
        for dtype, shape, start in sorted(self.header.values(), key=lambda entry: (entry[2], math.prod(entry[1]))):
            if start != base:
                raise CorruptBank(f"tensors in {self.name} overlap or leave a gap at byte {min(start, base)}")
            base += math.prod(shape) * DTYPES[dtype].itemsize
        if base != self.size:
            raise CorruptBank(f"{self.name} has {self.size - base} bytes that belong to no tensor")

    def rows(self, key: str, first: int, last: int) -> Tensor:
        """Rows `first` up to `last` of a tensor, in its own dtype; raises on values not finite."""
        if key not in self.header:
            raise CorruptBank(f"{self.name} has no tensor {key!r}; it has {', '.join(sorted(self.header))}")
        dtype, shape, base = self.header[key]
        if not shape or not 0 <= first <= last <= shape[0]:
            raise CorruptBank(f"{self.name} has {shape[0] if shape else 0} rows of {key!r}, asked for {first} to {last}")
        width = DTYPES[dtype].itemsize * math.prod(shape[1:])
        raw = self._bytes(base + first * width, base + last * width)
        tensor = torch.from_numpy(np.frombuffer(raw, DTYPES[dtype]).copy()).reshape(last - first, *shape[1:])
        if dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CorruptBank(f"{key!r} in {self.name} has values that are not finite in rows {first} to {last}")
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor; `(0,)` for one that the file does not have."""
        return self.header[key][1] if key in self.header else (0,)

    def all(self, key: str) -> Tensor:
        """A whole tensor."""
        return self.rows(key, 0, (self.shape(key) or (0,))[0])

    def _bytes(self, start: int, stop: int) -> bytes:
        """Bytes of the file, each block checked against its hash when it is first read."""
        if self._hashes is None:
            return self._read(start, stop, None)
        first, last = start // BLOCK, -(-stop // BLOCK)
        whole = b"".join(self._block(i) for i in range(first, last))
        return whole[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, i: int) -> bytes:
        if i not in self._checked:
            expected = self._expected(i)
            block = self._read(i * BLOCK, min((i + 1) * BLOCK, self.size), expected)
            if hashlib.sha256(block).hexdigest() != expected:
                raise CorruptBank(f"{self.name} was altered (block {i}); download the bank again")
            if len(self._checked) >= 16:
                self._checked.clear()
            self._checked[i] = block
        return self._checked[i]

    def _expected(self, i: int) -> str:
        """The hash that a block has to have, from the tree."""
        assert self._hashes is not None
        group, place = divmod(i, PER_GROUP)
        dtype, shape, base = self._hashes.header.get(self.name, ("U8", (0, 32), 0))
        if dtype != "U8" or shape[1:] != (32,) or i >= shape[0] or group >= len(self._groups):
            raise CorruptBank(f"{self.name} has no hash for block {i}; download the bank again")
        start, stop = base + group * BLOCK, base + min((group + 1) * PER_GROUP, shape[0]) * 32
        hashes = self._hashes._read(start, stop, self._groups[group])
        if hashlib.sha256(hashes).hexdigest() != self._groups[group]:
            raise CorruptBank(f"the hashes of {self.name} were altered (group {group}); download the bank again")
        return hashes[place * 32 :][:32].hex()
