"""Readers of other libraries' files, one format a file.

A format is a module with `FILES`, the names of its files; `units(path)`, where they lie; `read(path, title, **options)`, what
is in them; and its line here. A format marked untested was checked against its documented layout and an independent formula,
not against released files.
"""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from ..bank.concept_bank import ConceptBank
from ..errors import BadBank, UnknownFormat
from . import (
    dictionary_learning,
    files,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    lm_eval,
    repeng,
    saelens,
    saeuron,
    sdxl_unbox,
    sparsify,
    svec,
)
from .foreign import Place, bank_of

FORMATS: dict[str, ModuleType] = {
    "saelens": saelens,
    "gemma-scope": gemma_scope,
    "gemma-scope-2": gemma_scope_2,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "llama-scope": llama_scope,
    "sdxl-unbox": sdxl_unbox,
    "saeuron": saeuron,
    "repeng": repeng,
    "svec": svec,
    "lm-eval": lm_eval,
}


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
    """Files of another library, in a folder or on the Hub, as a bank; nothing in them is run.

    `folder` reads a part of what is there. The format is found out where the files leave no doubt. `site` and `reads`
    say where the encoders write and read in place of what the files say: one name for one encoder, or a mapping from the
    files' hook points. `base` is the model, or its id. `options` are those of the format's `read`.
    """
    local = Path(name_or_folder).exists()
    if format not in FORMATS and (format is not None or not local):
        raise UnknownFormat(f"expected a format, one of {', '.join(FORMATS)}, got {format!r}")
    found = (
        {} if local else {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    )
    path = files.resolve(name_or_folder, FORMATS[format].FILES if format else (), folder=folder, **found)
    format = format or _detected(path)
    if not FORMATS[format].units(path):
        raise BadBank(f"{path.name!r} has no files of format {format!r}: {', '.join(FORMATS[format].FILES)}")
    title = f"{path.resolve() if local else name_or_folder}" + ("" if local else f"/{folder}")
    foreign = FORMATS[format].read(path, title, **options)
    return bank_of(foreign, Path(name_or_folder).name, format, site=site, reads=reads, base=base)


def _detected(path: Path) -> str:
    fits = [name for name, module in FORMATS.items() if module.units(path)]
    if len(fits) != 1:
        raise UnknownFormat(
            f"cannot tell the format of {path.name!r} from its files ({' and '.join(fits) or 'none'} would fit); "
            f"give format=, one of {', '.join(FORMATS)}"
        )
    return fits[0]
