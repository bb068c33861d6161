"""Pictures and their factors from files: a folder, `.npz`, and the layouts of dSprites, 3D Shapes and MPI3D.

Of a file with more pictures than are asked for, some are drawn, always the same, and the rest is never held in memory. Nothing
in a file is run.
"""

import math
import zipfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BadEdit, MissingExtra

MOST, AT_ONCE = 20_000, 4096
"""Pictures that are read of a file at most, and rows that are looked at together."""
PICTURES, FACTORS = ("imgs", "images"), ("latents_classes", "factors", "labels")
"""What files of known layouts call pictures, and a table of factors."""
KNOWN = {"latents_classes": ("color", "shape", "scale", "orientation", "x", "y")}
"""Of dSprites, whose table has a name of its own."""
SHAPES3D = ("floor hue", "wall hue", "object hue", "scale", "shape", "orientation")
MPI3D = {
    1_036_800: (6, 6, 2, 3, 3, 40, 40),  # toy, realistic, real
    460_800: (4, 4, 2, 3, 3, 40, 40),  # complex
}
"""Values of each factor by number of pictures, which go through all combinations in order; the file holds nothing else."""
MPI3D_NAMES = ("color", "shape", "size", "height", "background", "horizontal", "vertical")


class Data(NamedTuple):
    """Inputs `[B, ...]`, and what is known of each, by name of factor."""

    inputs: Tensor
    factors: dict[str, list[Any]]


def read(path: Path, most: int = MOST) -> Data:
    """Pictures in a folder, or a file: `.npz` with `imgs` or `images` and a table of factors or a row of each by name, or `.h5`
    with `images` and `labels`.

    Bytes become 0 to 1, and channels come first; numbers with a point stay as they are. Factors that never change are left out.
    """
    if path.is_dir():
        found = Data(as_inputs(_folder(path)), {})
    else:
        found = (_h5 if path.suffix in (".h5", ".hdf5") else _npz)(path, most)
    return Data(found.inputs, {name: values for name, values in found.factors.items() if len({*values}) > 1})


def _folder(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise BadEdit(f"expected pictures in {path}, PNG, JPEG or WebP, got none")
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def _npz(path: Path, most: int) -> Data:
    with zipfile.ZipFile(path) as file:
        names = [name.removesuffix(".npy") for name in file.namelist()]
        held = next((name for name in PICTURES if name in names), None)
        if held is None:
            raise BadEdit(f"expected an array {' or '.join(PICTURES)} in {path}, got {', '.join(names)}")
        count, pictures = _some(file, held, most)
        rows, factors = chosen(count, most), {}
        for name in (n for n in names if n not in (held, "metadata")):  # of dSprites the latter is a pickle
            with file.open(f"{name}.npy") as member:
                values = np.lib.format.read_array(member, allow_pickle=False)  # type: ignore[arg-type]
            if values.ndim and len(values) == count and (values.ndim == 1 or name in FACTORS):
                kept = values[rows]
                factors |= (
                    {name: kept.tolist()} if values.ndim == 1 else _named(kept.reshape(len(rows), -1), KNOWN.get(name, ()))
                )
    if names == [held] and count in MPI3D:
        table = np.stack(np.unravel_index(rows, MPI3D[count]), 1)
        factors = _named(table, MPI3D_NAMES)
    return Data(as_inputs(pictures), factors)


def _h5(path: Path, most: int) -> Data:
    try:
        h5py = import_module("h5py")
    except ImportError:
        raise MissingExtra(f"reading {path.name} needs h5py: pip install h5py") from None
    with h5py.File(path) as file:
        held: Any = next((file[name] for name in PICTURES if name in file), None)
        if held is None:
            raise BadEdit(f"expected a data set {' or '.join(PICTURES)} in {path}, got {', '.join(file)}")
        rows = chosen(len(held), most)
        pictures = _kept(rows, len(held), lambda start, stop: held[start:stop])
        tables: dict[str, Any] = {name: file[name][:][rows] for name in FACTORS if name in file}
    names = SHAPES3D if "3dshapes" in path.stem else ()
    factors = {key: values for table in tables.values() for key, values in _named(table, names).items()}
    return Data(as_inputs(pictures), factors)


def chosen(count: int, most: int) -> NDArray[np.int64]:
    """Rows that are read, in order."""
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def _kept(rows: NDArray[np.int64], count: int, part: Callable[[int, int], Any]) -> NDArray[Any]:
    """Rows out of an array that is read in parts, from its beginning to its end."""
    found = []
    for start in range(0, count, AT_ONCE):
        stop = min(start + AT_ONCE, count)
        own = rows[np.searchsorted(rows, start) : np.searchsorted(rows, stop)] - start
        found.append(np.asarray(part(start, stop))[own])
    return np.concatenate(found)


def _some(file: zipfile.ZipFile, name: str, most: int) -> tuple[int, NDArray[Any]]:
    """How many rows an array in an archive has, and those that are read."""
    with file.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)  # type: ignore[arg-type]
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = header(member)  # type: ignore[arg-type]
        if is_fortran or dtype.hasobject or not shape:
            raise BadEdit(f"expected {name} of {file.filename} as numbers, a picture after the other, got {dtype}, {shape}")
        size = math.prod(shape[1:])

        def part(start: int, stop: int) -> NDArray[Any]:
            held = member.read((stop - start) * size * dtype.itemsize)
            return np.frombuffer(held, dtype).reshape(stop - start, *shape[1:])

        return shape[0], _kept(chosen(shape[0], most), shape[0], part)


def _named(table: NDArray[Any], names: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Columns by name, where there are as many names, else as `factor 0` and so on."""
    known = names if len(names) == table.shape[1] else [f"factor {k}" for k in range(table.shape[1])]
    return {name: column.tolist() for name, column in zip(known, table.T, strict=True)}


def as_inputs(values: NDArray[Any]) -> Tensor:
    """Pictures as a model takes them."""
    x = torch.as_tensor(values)
    x = x.float() / 255 if x.dtype == torch.uint8 and int(x.max()) > 1 else x.float()
    if x.ndim == 3:
        return x[:, None]
    return x.permute(0, 3, 1, 2).contiguous() if x.ndim == 4 and x.shape[-1] in (1, 3) else x
