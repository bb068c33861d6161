"""A bank taken elsewhere: to files of other libraries, and to another checkpoint.

What writes files and what measures a model lies in rooms above this one, and is loaded when it is asked for.
"""

from collections.abc import Iterable
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from .editing import Edited

PACKAGE = __name__.partition(".")[0]


class Portable(Edited):
    """What takes a bank elsewhere; `ConceptBank` sets the attributes."""

    def export(
        self,
        path: str | PathLike[str],
        concepts: Iterable[str] | None = None,
        *,
        format: str | None = None,
        lossy: bool = False,
    ) -> list[Path]:
        """Write concepts as another library does: control vectors for llama.cpp and repeng, or encoders for SAELens.

        What `sl.read_bank` reads from the files adds the same at every token, by the same amounts.

        Args:
            path: `name.gguf` for one concept, called `name` there; else a folder: of vectors a file for each concept, of
                latents their whole encoders, with names and units of those that are asked for.
            concepts: which ones (default: all).
            format: `repeng` or `saelens` (default: as the path and the concepts are).
            lossy: write what a format has no place for (a gate, `match_norm`, a window, a part at another site, the floor of
                a latent at 0) without it; a warning and the file say what is lost.

        Returns the files or folders that were written. Raises `BadBank` where something would be lost, `UnknownFormat`.

        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sl.read_bank(*bank.export(f"{folder}/calm.gguf", ["a"]), base=model).keys()
        dict_keys(['calm'])
        """
        readers: Any = import_module(f"{PACKAGE}.readers")
        return readers.export(self, path, concepts, format, lossy)
