"""Where banks come from, and how their bytes are trusted.

A whole file is trusted by its SHA-256. A part of one is trusted by a tree of two levels: the hashes of its 64 KiB blocks
are kept, 32 bytes each, in `hashes.safetensors`; and of these, again, each 64 KiB has its hash in `bank.json`.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import BadBank, CorruptBank

BLOCK = 1 << 16
SUFFIXES = {".safetensors", ".json", ".jsonl", ".md", ".png"}
MAX_HEADER = 16 << 20
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"), "U8": np.dtype("u1"), "BF16": np.dtype("<u2")}


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a bank: one that exists, else one shipped with steerlib, else a Hub repository."""
    if (folder := Path(name)).is_dir():
        return folder
    shipped = Path(str(files("steerlib.concept_banks"))) / str(name)
    if re.fullmatch(r"[A-Za-z0-9._-]+", str(name)) and (shipped / "bank.json").is_file():
        return shipped
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadBank(
            f"expected a folder, a shipped bank ({', '.join(shipped_banks())}) or a Hub id org/name, got {str(name)!r}"
        )
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[f"*{suffix}" for suffix in sorted(SUFFIXES)],
        )
    )


def shipped_banks() -> list[str]:
    """Names of the banks that come with steerlib."""
    root = Path(str(files("steerlib.concept_banks")))
    return sorted(folder.parent.name for folder in root.glob("*/bank.json"))


def checked_name(name: str) -> str:
    """A file name from a stranger: plain, relative, of a kind a bank may hold."""
    path = PurePosixPath(name)
    plain = all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,120}", part) for part in path.parts)
    if not plain or path.is_absolute() or path.suffix not in SUFFIXES or len(path.parts) > 3:
        raise CorruptBank(f"expected a plain relative name ending in {', '.join(sorted(SUFFIXES))}, got {name!r}")
    return str(path)


def strict_json(text: bytes, what: str) -> Any:
    """JSON without NaN, duplicate keys or absurd nesting."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptBank(f"{what} is not valid JSON: {error}") from None


def describe(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as `bank.json` records them."""
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_whole(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Raise unless a file is there, whole and unaltered."""
    path = folder / checked_name(name)
    if not path.is_file():
        raise CorruptBank(f"{name} is missing from {folder.name}; download the bank again")
    if path.stat().st_size != record["size"] or _sha256(path) != record["sha256"]:
        raise CorruptBank(f"{name} is not the file that bank.json describes (truncated or altered); download the bank again")


def block_hashes(path: Path) -> bytes:
    """SHA-256 of every block of a file, one after the other."""
    with path.open("rb") as file:
        return b"".join(hashlib.sha256(block).digest() for block in iter(lambda: file.read(BLOCK), b""))


def group_hashes(blocks: bytes) -> list[str]:
    """SHA-256 of every 64 KiB of block hashes."""
    return [hashlib.sha256(blocks[i : i + BLOCK]).hexdigest() for i in range(0, len(blocks), BLOCK)]


class Tensors:
    """A safetensors file read by position: only the blocks that hold the asked-for rows, each checked when first read."""

    def __init__(self, path: Path, size: int, blocks: "Tensors | None" = None, groups: tuple[str, ...] = (), key: str = ""):
        """`blocks` holds the block hashes under `key`, trusted by `groups`; without them bytes are not checked here."""
        self.path, self.size = path, size
        self._blocks, self._groups, self._key = blocks, groups, key
        self._checked: dict[int, bytes] = {}
        if not path.is_file() or path.stat().st_size != size:
            raise CorruptBank(f"{path.name} is missing or truncated; download the bank again")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CorruptBank(f"{path.name} has no valid safetensors header")
        header = strict_json(self._bytes(8, 8 + length), path.name)
        header.pop("__metadata__", None)
        self.header = {name: self._entry(name, entry, 8 + length) for name, entry in header.items()}

    def _entry(self, name: str, entry: Any, base: int) -> tuple[str, tuple[int, ...], int]:
        """Dtype, shape and first byte of a tensor, all within the file."""
        try:
            dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            count = 1
            for side in shape:
                count *= side
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
            sound = sound and stop - start == count * DTYPES[dtype].itemsize and base + stop <= self.size
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise CorruptBank(f"tensor {name!r} in {self.path.name} does not fit the file")
        return dtype, shape, base + start

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows `first` up to `last` of a tensor, in its own dtype; raises on values not finite."""
        if name not in self.header:
            raise CorruptBank(f"{self.path.name} has no tensor {name!r}; it has {', '.join(sorted(self.header))}")
        dtype, shape, base = self.header[name]
        if not 0 <= first <= last <= (shape[0] if shape else 0):
            raise CorruptBank(f"{self.path.name} has {shape[0] if shape else 0} rows of {name!r}, asked for {first} to {last}")
        width = DTYPES[dtype].itemsize * int(np.prod(shape[1:], dtype=np.int64))
        raw = self._bytes(base + first * width, base + last * width)
        tensor = torch.from_numpy(np.frombuffer(raw, DTYPES[dtype]).copy()).reshape(last - first, *shape[1:])
        if dtype == "BF16":
            tensor = tensor.view(torch.bfloat16)
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CorruptBank(f"{name!r} in {self.path.name} has values that are not finite in rows {first} to {last}")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; `(0,)` for one that the file does not have."""
        return self.header[name][1] if name in self.header else (0,)

    def all(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.shape(name)[0])

    def _bytes(self, start: int, stop: int) -> bytes:
        """Bytes of the file, each block checked against its hash when it is first read."""
        if self._blocks is None:
            with self.path.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        first, last = start // BLOCK, -(-stop // BLOCK)
        whole = b"".join(self._block(i) for i in range(first, last))
        return whole[start - first * BLOCK : stop - first * BLOCK]

    def _block(self, i: int) -> bytes:
        if i not in self._checked:
            with self.path.open("rb") as file:
                file.seek(i * BLOCK)
                block = file.read(BLOCK)
            per_group = BLOCK // 32
            group = i // per_group
            assert self._blocks is not None
            count = self._blocks.header[self._key][1][0] if self._key in self._blocks.header else 0
            if i >= count or group >= len(self._groups):
                raise CorruptBank(f"{self.path.name} has no hash for block {i}; download the bank again")
            hashes = self._blocks.rows(self._key, group * per_group, min((group + 1) * per_group, count)).numpy().tobytes()
            expected = hashes[(i - group * per_group) * 32 :][:32]
            if hashlib.sha256(hashes).hexdigest() != self._groups[group] or hashlib.sha256(block).digest() != expected:
                raise CorruptBank(f"{self.path.name} was altered (block {i}); download the bank again")
            if len(self._checked) >= 16:
                self._checked.clear()
            self._checked[i] = block
        return self._checked[i]
