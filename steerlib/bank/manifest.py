"""What `bank.json` says: the base model, the sites, the encoders, and the size and SHA-256 of every other file.

Format rules. A reader takes the formats it knows and refuses all others. Optional fields may be added within a format: a
reader that does not know them keeps them. Anything else (a field that changes its meaning, a file that moves) is a new format,
which comes with a step in `migrate`; format 1 is read for ever, and `tests/golden` holds banks of it that never change.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..encoders import KINDS
from ..errors import CorruptBank, UnknownFormat
from ..hosts import host_for
from ..schedules import Window
from .trust import checked_files, checked_name, strict_json

FORMAT = 1
SAID = ("name", "base", "sites", "levels", "license", "provenance", "extra")
"""Arguments of `ConceptBank` that `bank.json` says."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The model whose activations a bank reads.

    Args:
        id: its id on the Hub, or another name.
        fingerprint: architecture and shapes as JSON values; a model that differs is refused.
        weights: hash of the weights; other weights of the same architecture give a notice.

    >>> sl.BaseModel.of(model, id="org/tiny").id
    'org/tiny'
    """

    id: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None

    @classmethod
    def of(cls, model: object, id: str = "") -> "BaseModel":
        """The identity of a loaded model or pipeline; raises `UnsupportedTarget` for anything else."""
        host = host_for(model)
        return cls(id=id, fingerprint=host.fingerprint(), weights=host.weights_digest())


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """What a bank knows of a site.

    Args:
        width: width D of the activations.
        norm: median length of an activation there, first tokens excluded (None: not measured, so nothing is capped to it).
    """

    width: int
    norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Where the coordinates of an encoder come from: `site`, where its concepts are moved; its `kind`, with `settings`; its
    `file`; `reads`, an earlier site at which they are read, if it is another one; and `norm`, the median length of an
    activation at `site` as it was measured with them, where that is not the site's, as in merged banks (0: not measured)."""

    site: str
    kind: str
    file: str
    reads: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    norm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, defaults left out."""
        return {key: value for key, value in asdict(self).items() if value not in ("", {}, None)}


def level_of(encoder: str) -> str:
    """The noise level in the id of an encoder, `site[@level][#kind]`; "" where it has none."""
    return encoder.partition("@")[2].partition("#")[0]


def file_of(encoder: str) -> str:
    """The file of an encoder: its id, escaped to letters that every file system takes."""
    plain = "".join(c if c.isalnum() and c.isascii() or c in "._-" else f"-{ord(c):x}-" for c in encoder)
    return f"sites/{plain}.safetensors"


class Manifest(NamedTuple):
    """`said` are arguments of `ConceptBank`, `files` the size, SHA-256 and hashes of groups of blocks of every other file."""

    said: dict[str, Any]
    encoders: dict[str, EncoderFacts]
    files: dict[str, dict[str, Any]]

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """From a stranger's file: every field checked, unknown formats refused, unknown fields kept as `extra`."""
        values = strict_json(text, "bank.json")
        version = values.pop("format", None) if isinstance(values, dict) else None
        if type(version) is not int or version != FORMAT:
            raise UnknownFormat(
                f"expected bank format {FORMAT}, got {version!r:.100}; update steerlib or export the bank again"
            )
        try:
            encoders = {id: EncoderFacts(**facts) for id, facts in values.pop("encoders").items()}
            files = checked_files(values.pop("files"))
            said = {
                "name": values.pop("name"),
                "base": BaseModel(**values.pop("base_model")),
                "sites": {name: SiteFacts(**facts) for name, facts in values.pop("sites").items()},
                "levels": {name: Window(float(a), float(b)) for name, (a, b) in values.pop("levels", {}).items()},
                "license": values.pop("license", ""),
                "provenance": values.pop("provenance", {}),
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptBank(f"bank.json lacks or misspells a field: {error!s:.200}") from None
        _check(said["name"], said["base"], said["sites"], said["license"], said["provenance"])
        for id, facts in encoders.items():
            if not _is_sound(id, facts, said["sites"]) or checked_name(facts.file) not in files:
                raise CorruptBank(f"encoder {id!r:.100} has an unknown kind, site or file: {facts!r:.300}")
        return cls({**said, "extra": values}, encoders, files)

    def to_json(self) -> str:
        """Same contents, same bytes: keys sorted, no dates, devices or paths."""
        said = {**self.said, "base_model": asdict(self.said["base"])}
        values = {
            **said["extra"],
            **{key: said[key] for key in ("name", "base_model", "license", "provenance")},
            "format": FORMAT,
            "sites": {name: asdict(facts) for name, facts in said["sites"].items()},
            "encoders": {id: facts.to_dict() for id, facts in self.encoders.items()},
            **({"levels": {name: [w.start, w.stop] for name, w in said["levels"].items()}} if said["levels"] else {}),
            "files": self.files,
        }
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _check(name: Any, base: BaseModel, sites: Mapping[str, SiteFacts], license: Any, provenance: Any) -> None:
    texts = (name, license, base.id, "" if base.weights is None else base.weights)
    if not all(isinstance(text, str) and text.isprintable() and len(text) <= 256 for text in texts):
        raise CorruptBank(f"expected names of at most 256 printable letters in bank.json, got {texts!r:.200}")
    if not (isinstance(base.fingerprint, dict) and isinstance(provenance, dict)):
        raise CorruptBank("expected JSON objects for fingerprint and provenance in bank.json")
    for at, site in sites.items():
        sound = type(site.width) is int and 0 < site.width <= 1 << 24 and at.isprintable()
        if not sound or site.norm is not None and not (type(site.norm) in (int, float) and 0 < site.norm < 1e30):
            raise CorruptBank(f"expected a width and a finite norm of site {at!r:.100}, got {site!r:.200}")


def _is_sound(id: str, facts: EncoderFacts, sites: Mapping[str, SiteFacts]) -> bool:
    """Whether an encoder of a stranger is of a known kind, at known sites, with plain settings."""
    texts = (id, facts.site, facts.kind, facts.file, facts.reads)
    return (
        all(isinstance(text, str) and text.isprintable() for text in texts)
        and isinstance(facts.settings, dict)
        and all(_is_plain(value) for value in facts.settings.values())
        and facts.kind in KINDS
        and {facts.site, facts.reads or facts.site} <= sites.keys()
        and (facts.norm is None or type(facts.norm) in (int, float) and 0 <= facts.norm < 1e30)
    )


def _is_plain(value: object) -> bool:
    """A flag, a finite number, a word, or a list of some."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str) or isinstance(value, (int, float)) and abs(value) < 1e30
