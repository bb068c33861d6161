"""How foreign files are found and read. They are data from strangers: nothing in them is ever run."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..bank import trust
from ..errors import BadBank, CorruptBank

MAX_JSON = 1 << 28
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types of weights that a bank stores."""


def resolve(name: str | os.PathLike[str], patterns: Sequence[str], *, folder: str = "", **options: Any) -> Path:
    """A file or folder that exists, else the files of a Hub repository whose names fit; `folder` is a part of either.

    `options` are those of `huggingface_hub.snapshot_download`.
    """
    if ".." in Path(folder).parts or Path(folder).is_absolute():
        raise BadBank(f"expected a folder inside the bank, got {folder!r}")
    if (path := Path(name)).exists():
        return path / folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadBank(f"expected a file, a folder or a Hub id org/name, got {str(name)!r}")
    from huggingface_hub import snapshot_download

    inside = [f"{folder}/*{pattern}".lstrip("/") for pattern in patterns]
    return Path(snapshot_download(str(name), allow_patterns=inside, **options)) / folder


def units(path: Path, *names: str) -> list[Path]:
    """Folders at `path` or below that hold files of all these names; one of the files stands for its folder."""
    if path.is_file():
        folders = [path.parent] if path.name in names else []
    else:
        folders = [file.parent for file in path.rglob(names[0])]
    return sorted(folder for folder in folders if all((folder / name).is_file() for name in names))


def text(path: Path) -> str:
    """A text file of bearable size."""
    if path.stat().st_size > MAX_JSON:
        raise CorruptBank(f"{path.name} has {path.stat().st_size} bytes, expected at most {MAX_JSON}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptBank(f"{path.name} is no text: {error}") from None


def settings(path: Path) -> dict[str, Any]:
    """A JSON object."""
    found = trust.strict_json(text(path).encode(), path.name)
    if not isinstance(found, dict):
        raise CorruptBank(f"expected an object in {path.name}, got {type(found).__name__}")
    return found


def safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptBank(f"{path.name} is no safetensors file: {error}") from None


def pickled(path: Path) -> Any:
    """A torch file of tensors and plain values; one that would run code is refused, and not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a stranger's file may fail in any way
        what = str(error).partition("\n")[0]
        raise CorruptBank(
            f"{path.name} holds other things than tensors and plain values, and was not run: {what:.200}"
        ) from None


def arrays(path: Path) -> dict[str, Tensor]:
    """A NumPy archive of plain arrays."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:  # noqa: BLE001 - a stranger's file may fail in any way
        raise CorruptBank(f"{path.name} is no archive of plain arrays: {error!s:.200}") from None


def part(tensors: Mapping[str, Any], name: str, axes: int) -> Tensor:
    """A tensor of so many axes, of a type that a bank stores, whose values are all there."""
    tensor = tensors.get(name)
    if (
        not isinstance(tensor, Tensor)
        or tensor.layout != torch.strided
        or tensor.dtype not in STORED.values()
        or tensor.ndim != axes
    ):
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        listing = ", ".join(sorted(map(str, tensors)))
        raise CorruptBank(f"expected {name!r} as {axes} axes of {', '.join(STORED)}, got {got}; the file has {listing}")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CorruptBank(f"{name!r} claims {tuple(tensor.shape)} values, which the file does not hold")
    return tensor.detach().contiguous()


def turned(tensors: Mapping[str, Any], name: str) -> Tensor:
    """A matrix whose columns are latents, as rows."""
    return part(tensors, name, 2).T.contiguous()


def check_sides(path: Path, tensors: Mapping[str, Any], name: str, sides: tuple[Any, Any]) -> None:
    """Raise where a matrix has other sides than the settings beside it say; None: they do not say."""
    shape = tuple(part(tensors, name, 2).shape)
    if any(said not in (None, side) for said, side in zip(sides, shape, strict=True)):
        raise CorruptBank(f"the settings of {path.name!r} say that {name!r} has sides {sides}, it has {shape}")


def whole(values: Mapping[str, Any], name: str) -> int:
    """A positive whole number."""
    number = values.get(name)
    if type(number) is not int or number < 1:
        raise CorruptBank(f"expected {name!r} as a positive whole number, got {number!r}")
    return number
