"""A setting that was found, kept: what is edited how, in which banks, as a TOML file or inside a PNG."""

import base64
import json
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from math import isinf
from operator import sub
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from ..bank import ConceptBank
from ..bank.concepts import Concept, Gate
from ..bank.editing import together
from ..bank.trust import describe
from ..errors import BadBank, BadEdit, SteerlibError
from ..schedules import PerStep, Ramp, Steps, Window, Within
from .interventions import Ablate, Add, Clamp, Intervention, Patch, Scale, Set
from .lowering import Options
from .masks import Box, Weights, Word, mask_of
from .swapping import Swap
from .switching import Do

FORMAT = 1
CHUNK = "steerlib"
"""What the text in a PNG is called."""
KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Add, Scale, Set, Ablate, Clamp, Swap, Do, Window, Steps, Ramp, PerStep, Within, Gate, Box, Word)
}
"""Values that are written field by field."""
OPTIONS = {name: value for name, value in Options()._asdict().items() if name != "tokenizer"}
"""What `steer` takes beside bank and edits, with its defaults; a tokenizer belongs to the model."""


PACKAGES = ("steerlib", "torch", "transformers", "diffusers")


class Preset:
    """Edits with the banks and options that they were made with, to be used and kept as one.

    `sl.steer(model, preset)` does what was done. A bank is opened again by where it came from, and has to have the same hash.

    Args:
        edits: as for `sl.steer`.
        bank: the bank, or a list of banks, as they were opened.
        said: what else belongs to the setting, such as `{"prompt": "a hill", "seed": 7}`; text and numbers.
        options: `branch`, `do`, `hold`, `free`, `allow_ood`, `exact` and `match` of `sl.steer`.

    Raises `BadEdit` for options that `sl.steer` does not have.

    >>> bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    >>> preset = sl.Preset({"science": 2.5, "music": sl.Ablate(tokens="generated")}, bank)
    >>> again = sl.Preset.from_toml(preset.to_toml())  # in a file: preset.save("calm.toml"), sl.Preset.load("calm.toml")
    >>> again.edits == {"science": sl.Add(2.5), "music": sl.Ablate(tokens="generated")}
    True
    """

    def __init__(
        self,
        edits: Mapping[Any, Any],
        bank: ConceptBank | Sequence[ConceptBank],
        *,
        said: Mapping[str, str | float] | None = None,
        **options: Any,
    ):
        if unknown := options.keys() - OPTIONS.keys():
            raise BadEdit(f"expected options {', '.join(OPTIONS)}, got {', '.join(sorted(unknown))}")
        given = {name: tuple(value) if name in ("hold", "free") else value for name, value in options.items()}
        self.banks = (bank,) if isinstance(bank, ConceptBank) else tuple(bank)
        self.edits = {name: one if isinstance(one, Intervention) else Add(one) for name, one in edits.items()}
        self.options, self.said = {**OPTIONS, **given}, dict(said or {})
        self.versions = {name: found for name in PACKAGES if (found := _installed(name))}

    @property
    def bank(self) -> ConceptBank:
        """The bank, or one of all banks."""
        return self.banks[0] if len(self.banks) == 1 else together(self.banks)

    def __repr__(self) -> str:
        return f"Preset({self.edits}, {' and '.join(repr(bank.name) for bank in self.banks)})"

    def to_toml(self, folder: Path | None = None) -> str:
        """The text of its file; banks in folders are named as seen from `folder`, if they lie in it.

        Raises `BadEdit` for what has no form in a file, such as a tape, `BadBank` for a bank that was not opened from files.
        """
        told = {name: value for name, value in self.options.items() if value != OPTIONS[name]}
        lines = [f"format = {FORMAT}"]
        for head, table in (("versions", self.versions), ("options", _plain(told, "options")), ("said", self.said)):
            lines += [f"\n[{head}]", *(f"{json.dumps(key)} = {_toml(value)}" for key, value in table.items())] if table else []
        for bank in self.banks:
            lines += ["\n[[banks]]", *(f"{key} = {_toml(value)}" for key, value in _source(bank, folder).items())]
        for name, edit in self.edits.items():
            shown = getattr(name, "name", name)
            lines += ["\n[[edits]]", f"concept = {_toml(_plain(name, shown))}", f"edit = {_toml(_plain(edit, shown))}"]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(
        cls, text: str, *, bank: ConceptBank | Sequence[ConceptBank] | None = None, folder: Path | None = None
    ) -> "Preset":
        """From what `to_toml` gave.

        Args:
            text: of a file.
            bank: the bank or banks to use, whatever their hashes (default: those that the text names).
            folder: where folders of banks are looked for.

        Raises `BadEdit` for a text that is none, `BadBank` where a bank is another one now.
        """
        try:
            values = tomllib.loads(text)
            if values.get("format") != FORMAT:
                raise BadEdit(f"expected a preset of format {FORMAT}, got {values.get('format')!r:.80}; update steerlib")
            banks = [_opened(one, folder) for one in values["banks"]] if bank is None else bank
            whole = banks if isinstance(banks, ConceptBank) else together([*banks])
            edits = {_value(one["concept"], whole): _value(one["edit"], whole) for one in values["edits"]}
            made = cls(edits, banks, said=values.get("said"), **_value(values.get("options", {}), whole))
            made.versions = dict(values.get("versions", {}))
        except (LookupError, TypeError, ValueError, zlib.error, RuntimeError) as error:
            if isinstance(error, SteerlibError):
                raise
            raise BadEdit(f"this is no preset, or an altered one: {type(error).__name__}: {error!s:.200}") from None
        return made

    def save(self, path: str | PathLike[str]) -> Path:
        """Write it as a TOML file; returns the path. Raises what `to_toml` does."""
        place = Path(path)
        place.write_text(self.to_toml(place.parent), encoding="utf-8")
        return place

    @classmethod
    def load(cls, path: str | PathLike[str], *, bank: ConceptBank | Sequence[ConceptBank] | None = None) -> "Preset":
        """Read a TOML file; `bank` and what is raised are those of `from_toml`."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadEdit(f"{Path(path).name} is no text; a preset inside a PNG is read by sl.Preset.from_image") from None
        return cls.from_toml(text, bank=bank, folder=Path(path).parent)

    def stamp(self, image: Any, path: str | PathLike[str]) -> Path:
        """Save a PIL image as a PNG that carries the preset; returns the path.

        >>> preset.stamp(pipe("a hill").images[0], "hill.png")  # doctest: +SKIP
        """
        from PIL.PngImagePlugin import PngInfo

        place, info = Path(path), PngInfo()
        info.add_itxt(CHUNK, self.to_toml(place.parent))
        image.save(place, format="PNG", pnginfo=info)
        return place

    @classmethod
    def from_image(cls, path: str | PathLike[str], *, bank: ConceptBank | Sequence[ConceptBank] | None = None) -> "Preset":
        """The preset that a PNG carries; raises `BadEdit` where it carries none, and what `from_toml` does."""
        from PIL import Image

        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(CHUNK)
        if text is None:
            raise BadEdit(f"{Path(path).name} carries no preset; preset.stamp(image, path) writes one that does")
        return cls.from_toml(str(text), bank=bank, folder=Path(path).parent)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# -- banks ---------------------------------------------------------------------------------------------------------------


def _source(bank: ConceptBank, folder: Path | None) -> dict[str, Any]:
    """Where a bank came from, and the hash of its `bank.json`, which holds those of all its files."""
    if (home := bank.home) is None:
        raise BadBank(
            f"bank {bank.name!r} was not opened from files, so nothing could open it again; save it first: "
            "bank = sl.ConceptBank.from_pretrained(bank.save_pretrained(folder))"
        )
    place, revision = home.source
    if folder is not None and revision is None and Path(place).is_dir():
        inside = Path(place).resolve()
        place = inside.relative_to(folder.resolve()).as_posix() if inside.is_relative_to(folder.resolve()) else str(inside)
    said = {"name": bank.name, "source": place, "revision": revision, "sha256": describe(home.path / "bank.json")["sha256"]}
    return {key: value for key, value in said.items() if value is not None}


def _opened(said: Mapping[str, Any], folder: Path | None) -> ConceptBank:
    """A bank by what `_source` says of it."""
    beside = None if folder is None else folder / said["source"]
    place = beside if beside is not None and beside.is_dir() else said["source"]
    bank = ConceptBank.from_pretrained(place, revision=said.get("revision"))
    assert bank.home is not None
    if (found := describe(bank.home.path / "bank.json")["sha256"]) != said["sha256"]:
        raise BadBank(
            f"bank {said['source']!r} is not the one of the preset: its hash is {found[:12]}…, not {said['sha256'][:12]}…; get "
            "that one, or give bank= to use another one all the same"
        )
    return bank


# -- values --------------------------------------------------------------------------------------------------------------


def _plain(value: Any, name: str) -> Any:
    """A value of an edit of the concept `name` as text, numbers, lists and tables."""
    if isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(one, name) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, name) for one in value]
    if isinstance(value, slice):
        ends = {"start": value.start, "stop": value.stop}
        return {"kind": "slice", **{key: end for key, end in ends.items() if end is not None}}
    if isinstance(value, Concept):
        if (blend := value.blend) is None:
            return value.name
        return {"kind": "shared" if blend.only else "less", "of": [_plain(one, name) for one in (blend.of, *blend.others)]}
    if isinstance(value, Weights):
        data = zlib.compress(value.weights.float().cpu().contiguous().numpy().tobytes(), 9)
        return {"kind": "Weights", "shape": list(value.weights.shape), "data": base64.b64encode(data).decode()}
    if KINDS.get(type(value).__name__) is type(value):
        known = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        known |= {"mask": mask_of(known["mask"])} if known.get("mask") is not None else {}
        told = {key: one for key, one in known.items() if not _is_default(type(value), key, one)}
        return {"kind": type(value).__name__, **{key: _plain(one, name) for key, one in told.items()}}
    if isinstance(value, Patch):
        raise BadEdit(f"{name!r}: a tape is what a model read in one run and has no form in a file; record it again beside it")
    raise BadEdit(f"{name!r}: a {type(value).__name__} has no form in a file; what has one: {', '.join(KINDS)}")


def _is_default(kind: Any, key: str, value: Any) -> bool:
    """Whether a field need not be written; an open end is infinite."""
    if isinstance(value, float) and isinf(value):
        return True
    if isinstance(value, Box | Weights | Word):
        return False
    default = next(f.default for f in fields(kind) if f.name == key)
    return default is not MISSING and type(value) is type(default) and value == default


def _value(plain: Any, bank: ConceptBank) -> Any:
    """What `_plain` was given; lists are tuples."""
    if isinstance(plain, list):
        return tuple(_value(one, bank) for one in plain)
    if not isinstance(plain, Mapping):
        return plain
    given = {key: one for key, one in plain.items() if key != "kind"}
    match plain.get("kind"):
        case None:
            return {key: _value(one, bank) for key, one in given.items()}
        case "slice":
            return slice(given.get("start"), given.get("stop"))
        case "less":
            return reduce(sub, (_concept(one, bank) for one in given["of"]))
        case "shared":
            one, other = (_concept(each, bank) for each in given["of"])
            return one & other
        case "Weights":
            data = bytearray(zlib.decompressobj().decompress(base64.b64decode(given["data"]), MOST))
            return Weights(torch.frombuffer(data, dtype=torch.float32).reshape([int(n) for n in given["shape"]]))
        case kind:
            return KINDS[kind](**{key: _value(one, bank) for key, one in given.items()})


MOST = 1 << 28
"""Bytes of a mask."""


def _concept(plain: Any, bank: ConceptBank) -> Concept:
    return bank[plain] if isinstance(plain, str) else _value(plain, bank)


def _toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {_toml(one)}" for key, one in value.items()) + "}"
    return repr(value)
