"""Results on disk, each whole or not at all: what a run needs to stop at any moment and to go on later.

A result is written beside its place, under the same name with `.part` behind it, and moved there when it is complete. So a file
that has its name is complete, and a second run reads it instead of making it again.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Inside a `with` block, write a file or a folder to the path it gives; afterwards it is at `path`, in place of what was.

    Missing folders above it are made. If the block raises, `path` stays as it was and nothing is left beside it.

        with whole(folder / "state.json") as part:
            part.write_text("{}")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    _remove(part)  # from a run that was killed
    try:
        yield part
        if part.is_file():
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # a crash of the machine must not leave an empty file under the final name
        if part.is_dir():
            _remove(path)
        part.replace(path)
    except BaseException:
        _remove(part)
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors as a safetensors file, whole or not at all; `about` goes into its metadata.

    Tensors are copied to the CPU where needed. safetensors writes several metadata entries in no fixed order: give one where
    the same input has to give the same bytes.
    """
    with whole(path) as part:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, {**about} if about else None
        )


def recorded(path: Path | None, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors, by name, in a safetensors file. Where there is none, `make()` gives them and they are written first; a path
    of None keeps nothing."""
    if path is None:
        return {**make()}
    if not path.is_file():
        save(path, make())
    return load_file(path)


def remembered(path: Path | None, make: Callable[[], Any]) -> Any:
    """The value in a JSON file. Where there is none, `make()` gives it and it is written first; a path of None keeps nothing.

    What was just made is returned as JSON would give it back, so that a run that goes on computes with the same values.
    """
    if path is not None and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    made = json.dumps(make(), indent=1, sort_keys=True) + "\n"
    if path is not None:
        with whole(path) as part:
            part.write_text(made, encoding="utf-8")
    return json.loads(made)
