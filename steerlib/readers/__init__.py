"""Readers of other libraries' files, one format a file.

A format is a module of this folder, named like it with `_` for `-`, with `FILES`, the names of its files; `units(path)`, where
they lie; and `read(path, title, **options)`, what is in them. `OF` names the format of whose files its own are a special case;
`READS_MODEL` says that `read` takes `base` too.
A format marked untested was checked against its documented layout and an independent formula, not against released files.
"""

import os
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from ..bank.concept_bank import ConceptBank
from ..errors import BadBank, UnknownFormat
from . import files
from .foreign import Place, bank_of

_MODULES = {found.name.replace("_", "-"): import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)}
FORMATS: dict[str, ModuleType] = {name: module for name, module in sorted(_MODULES.items()) if hasattr(module, "FILES")}


def read_bank(
    name_or_folder: str | os.PathLike[str],
    format: str | None = None,
    *,
    folder: str = "",
    site: Place = None,
    reads: Place = None,
    base: object = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> ConceptBank:
    """Files of another library as a bank; nothing in them is run.

    Args:
        name_or_folder: a file, a folder, or an id `org/name` on the Hub.
        format: name of the format, such as `saelens`; needed on the Hub, and where files would fit several.
        folder: read this part of what is there.
        site: where encoders write, in place of what the files say: one name, or a mapping from the files' hook points.
        reads: where they read, in the same way.
        base: the model, or its id.
        revision, token, cache_dir, local_files_only: of the Hub, as for `ConceptBank.from_pretrained`.
        options: those of the format's own `read`.

    Raises `UnknownFormat` for files of none or several formats or of a kind that no encoder computes, `BadBank` where none are.

    >>> import json, pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "royal.svec")
    >>> written = file.write_text(json.dumps({"directions": {"0": [1.0] * model.config.hidden_size}}))
    >>> sl.read_bank(file, base=model).keys()
    dict_keys(['royal'])
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    path, format = _located(name_or_folder, format, folder, hub)
    title = str(path.resolve()) if Path(name_or_folder).exists() else f"{name_or_folder}/{folder}"
    options |= {"base": base} if getattr(FORMATS[format], "READS_MODEL", False) else {}
    foreign = FORMATS[format].read(path, title, **options)
    return bank_of(foreign, Path(name_or_folder).name, format, site=site, reads=reads, base=base)


def export(
    bank: ConceptBank, path: str | os.PathLike[str], concepts: Iterable[str] | None, format: str | None, lossy: bool
) -> list[Path]:
    """What `ConceptBank.export` does."""
    if isinstance(concepts, str) or concepts is not None and not (concepts := [*concepts]):
        raise BadBank(f"expected a list of concepts, at least one, got {concepts!r:.80}")
    chosen = None if concepts is None else [bank[name] for name in concepts]
    kinds = {bank.encoders[c.encoder].kind for c in chosen or bank.concepts.values()} or {"sparse"}
    format = format or ("repeng" if Path(path).suffix == ".gguf" or "directions" in kinds else "saelens")
    writers = [name for name, module in FORMATS.items() if hasattr(module, "export")]
    if format not in writers:
        raise UnknownFormat(f"expected a format that is written, format= one of {', '.join(writers)}, got {format!r:.80}")
    return FORMATS[format].export(bank, chosen, Path(path), lossy)


def _located(name: str | os.PathLike[str], format: str | None, folder: str, hub: dict[str, Any]) -> tuple[Path, str]:
    """Where the files are, and their format."""
    if not Path(name).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise BadBank(f"expected a file, a folder or a Hub id org/name, and nothing is at {str(name)!r}; check the path")
    if format not in FORMATS and (format is not None or not Path(name).exists()):
        where = "" if format else f" of {str(name)!r}, which is not here, so that it is looked for on the Hub"
        raise UnknownFormat(f"expected a format{where}, format= one of {', '.join(FORMATS)}, got {format!r}")
    path = files.resolve(name, FORMATS[format].FILES if format else (), folder=folder, **hub)
    fits = [format] if format else [name for name in FORMATS if _units(name, path)]
    if len(fits) != 1:
        raise UnknownFormat(
            f"cannot tell the format of {path.name!r} from its files ({' and '.join(fits) or 'none'} would fit); "
            f"give format=, one of {', '.join(FORMATS)}"
        )
    if not (own := _units(fits[0], path)):
        raise BadBank(f"{path.name!r} has no files of format {format!r}: {', '.join(FORMATS[fits[0]].FILES)}")
    if len(own) < len(FORMATS[fits[0]].units(path)):
        raise BadBank(f"{path.name!r} has files of several formats; read a folder= of {fits[0]!r} alone")
    return path, fits[0]


def _units(format: str, path: Path) -> list[Path]:
    """Where files of a format lie that are not those of a special case of it."""
    special = [unit for module in FORMATS.values() if getattr(module, "OF", "") == format for unit in module.units(path)]
    return [unit for unit in FORMATS[format].units(path) if unit not in special]
