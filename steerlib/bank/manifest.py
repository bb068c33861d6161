"""What `bank.json` says: the base model, the sites, the encoders, and the size and SHA-256 of every other file.

Format rules. A reader takes the formats it knows and refuses all others. Optional fields may be added within a format: a
reader that does not know them keeps them. Anything else (a field that changes its meaning, a file that moves) is a new format,
which comes with a step in `migrate`; format 1 is read for ever, and `tests/golden` holds banks of it that never change.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..encoders import KINDS
from ..errors import CorruptBank, UnknownFormat
from ..hosts import host_for
from ..schedules import Window
from .trust import checked_files, checked_name, strict_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """Whose activations a bank reads."""

    id: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    """Architecture and shapes; a model that differs is refused."""
    weights: str | None = None
    """Hash of the weights; other weights of the same architecture give a notice."""

    @classmethod
    def of(cls, model: object, id: str = "") -> "BaseModel":
        """The identity of a loaded model."""
        host = host_for(model)
        return cls(id=id, fingerprint=host.fingerprint(), weights=host.weights_digest())


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """What a bank knows of a place in the model."""

    width: int
    norm: float | None = None
    """Median length of an activation there, first tokens excluded."""


@dataclass(frozen=True, kw_only=True)
class EncoderFacts:
    """Where the coordinates of an encoder come from."""

    site: str
    """Where its concepts are moved."""
    kind: str
    file: str
    reads: str = ""
    """Where they are read, if elsewhere: at an earlier site."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the kind has to know beside its tensors."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, defaults left out."""
        return {key: value for key, value in asdict(self).items() if value not in ("", {})}


def _is_plain(value: object) -> bool:
    """A flag, a finite number, a word, or a list of some."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return isinstance(value, str) or isinstance(value, (int, float)) and abs(value) < 1e30


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `bank.json`."""

    name: str
    base: BaseModel
    sites: Mapping[str, SiteFacts]
    encoders: Mapping[str, EncoderFacts]
    levels: Mapping[str, Window] = field(default_factory=dict)
    """When concepts of a noise level, which follows `@` in their encoder's id, are moved unless an edit says otherwise."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Size, SHA-256 and hashes of groups of blocks of every other file."""
    license: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Optional fields this version does not know, kept for whoever does."""

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """From a stranger's file: every field checked, unknown formats refused."""
        values = strict_json(text, "bank.json")
        version = values.get("format") if isinstance(values, dict) else None
        if type(version) is not int or version != FORMAT:
            raise UnknownFormat(
                f"expected bank format {FORMAT}, got {version!r:.100}; update steerlib or export the bank again"
            )
        known = {"format", "name", "base_model", "sites", "encoders", "levels", "license", "provenance", "files"}
        try:
            manifest = cls(
                name=values["name"],
                base=BaseModel(**values["base_model"]),
                sites={name: SiteFacts(**facts) for name, facts in values["sites"].items()},
                encoders={id: EncoderFacts(**facts) for id, facts in values["encoders"].items()},
                levels={name: Window(float(a), float(b)) for name, (a, b) in values.get("levels", {}).items()},
                files=checked_files(values["files"]),
                license=values.get("license", ""),
                provenance=values.get("provenance", {}),
                extra={key: value for key, value in values.items() if key not in known},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptBank(f"bank.json lacks or misspells a field: {error!s:.200}") from None
        manifest._check()
        return manifest

    def _check(self) -> None:
        texts = (self.name, self.license, self.base.id, "" if self.base.weights is None else self.base.weights)
        if not all(isinstance(text, str) and text.isprintable() and len(text) <= 256 for text in texts):
            raise CorruptBank(f"expected names of at most 256 printable letters in bank.json, got {texts!r:.200}")
        if not (isinstance(self.base.fingerprint, dict) and isinstance(self.provenance, dict)):
            raise CorruptBank("expected JSON objects for fingerprint and provenance in bank.json")
        for name, site in self.sites.items():
            sound = type(site.width) is int and 0 < site.width <= 1 << 24 and name.isprintable()
            if not sound or site.norm is not None and not (type(site.norm) in (int, float) and 0 < site.norm < 1e30):
                raise CorruptBank(f"expected a width and a finite norm of site {name!r:.100}, got {site!r:.200}")
        for id, facts in self.encoders.items():
            texts = (id, facts.site, facts.kind, facts.file, facts.reads)
            sound = all(isinstance(text, str) and text.isprintable() for text in texts) and isinstance(facts.settings, dict)
            sound = (
                sound
                and all(_is_plain(value) for value in facts.settings.values())
                and facts.kind in KINDS
                and {facts.site, facts.reads or facts.site} <= self.sites.keys()
            )
            if not sound or checked_name(facts.file) not in self.files:
                raise CorruptBank(f"encoder {id!r:.100} has an unknown kind, site or file: {facts!r:.300}")

    def to_json(self) -> str:
        """Same contents, same bytes: keys sorted, no dates, devices or paths."""
        values = {
            **self.extra,
            "format": FORMAT,
            "name": self.name,
            "base_model": asdict(self.base),
            "sites": {name: asdict(facts) for name, facts in self.sites.items()},
            "encoders": {id: facts.to_dict() for id, facts in self.encoders.items()},
            **({"levels": {name: [w.start, w.stop] for name, w in self.levels.items()}} if self.levels else {}),
            "license": self.license,
            "provenance": self.provenance,
            "files": self.files,
        }
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
