"""A bank: concepts of one model, their encoders, their graph, and whose they are.

README.md                    the card
bank.json                    format, base model, sites, encoders, provenance, size and SHA-256 of every other file
concepts.jsonl               one line a concept
graph.safetensors            edges by line of concepts.jsonl, one entry an edge: see graph.py
sites/<encoder>.safetensors  one row per concept in each tensor
hashes.safetensors           block hashes, so that single rows can be trusted
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import hub
from .concepts import Concept
from .encoders import KINDS, Directions, Encoder, Rows
from .encoders.sparse import STATISTICS
from .errors import BadBank, CorruptBank, UnknownConcept, UnknownFormat, WrongModel, WrongWidth, nearest
from .graph import CausalGraph
from .hosts import Host, host_for
from .search import ranked

FORMAT = 1
MAX_MANIFEST = 4 << 20


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


class ConceptBank:
    """Concepts by name, ready to steer with. Opening one reads no weights; steering reads the rows it needs."""

    def __init__(
        self,
        name: str,
        concepts: Sequence[Concept],
        encoders: Mapping[str, Encoder],
        *,
        base: BaseModel,
        sites: Mapping[str, SiteFacts],
        where: Mapping[str, str] | None = None,
        reads: Mapping[str, str] | None = None,
        graph: CausalGraph | None = None,
        card: str = "",
        license: str = "",
        provenance: Mapping[str, Any] | None = None,
    ):
        """`where` maps encoder ids to site names (default: the id up to `@` or `#`), `reads` those of transcoders to where they
        read. Every row of an encoder is a concept, named `encoder/index`; `concepts` are those of which more is known."""
        self.name, self.base, self.sites, self.card, self.license = name, base, dict(sites), card, license
        self.graph, self.provenance = graph or CausalGraph(), dict(provenance or {})
        self.extra: dict[str, Any] = {}
        """Optional fields of `bank.json` this version does not know, kept for whoever does."""
        self._encoders: dict[str, Encoder] = dict(encoders)
        site_of = where or {id: id.partition("@")[0].partition("#")[0] for id in encoders}
        self.encoders = {
            id: EncoderFacts(
                site=site_of[id], kind=e.kind, file=_file_of(id), reads=(reads or {}).get(id, ""), settings=e.settings
            )
            for id, e in encoders.items()
        }
        self._tensors: dict[str, hub.Tensors] = {}
        self._folder: Path | None = None
        self._manifest: dict[str, Any] = {}
        self._take(concepts)

    def _take(self, concepts: Sequence[Concept]) -> None:
        self.concepts: dict[str, Concept] = {}
        for concept in concepts:
            if concept.encoder not in self.encoders:
                raise CorruptBank(f"concept {concept.name!r} names encoder {concept.encoder!r}, which the bank does not have")
            if self.concepts.setdefault(concept.name, concept) is not concept:
                raise CorruptBank(f"expected each concept name once, got {concept.name!r} twice")
        for concept in concepts:
            if missing := [part.encoder for part in concept.parts if part.encoder not in self.encoders]:
                raise CorruptBank(f"concept {concept.name!r} has a part in {missing[0]!r}, which the bank does not have")
            if concept.gate is not None and concept.gate.concept not in self.concepts:
                raise CorruptBank(
                    f"concept {concept.name!r} is gated by {concept.gate.concept!r}, which the bank does not have"
                )
        self._by_id = {concept.id: concept for concept in concepts}
        self._rows: dict[str, Rows] = {}

    # -- looking ---------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Concept:
        """A concept by its name or `encoder/index`."""
        concept = self.concepts.get(name) or self._by_id.get(name) or self._row(name)
        if concept is None:
            raise UnknownConcept(f"bank {self.name!r} has no concept {name!r}; {nearest(name, self.concepts)}")
        return concept

    def _row(self, name: str) -> Concept | None:
        """The concept of an encoder's row of which no more is known than its statistics."""
        id, _, row = name.rpartition("/")
        if id not in self.encoders or not (row.isascii() and row.isdigit()) or int(row) >= (count := self.count(id)):
            if id in self.encoders:
                raise UnknownConcept(f"encoder {id!r} of bank {self.name!r} has rows 0 to {count - 1}, got {row!r}")
            return None
        known = {key: float(tensor) for key, tensor in self._one(id, int(row), STATISTICS).items()}
        high = known.get("high", 0.0)
        concept = Concept(
            name=f"{id}/{int(row)}",
            encoder=id,
            index=int(row),
            unit=known.get("unit") or 1.0,  # a latent that never fired on reference data has none
            natural=(0.0, high) if high > 0 else None,
        )
        self._by_id[concept.id] = concept
        return concept

    def count(self, encoder: str) -> int:
        """Rows of an encoder, each a concept."""
        first = KINDS[self.encoders[encoder].kind].tensors[0]
        if encoder in self._encoders:
            return len(self._encoders[encoder].to_tensors()[first])
        return self._file(encoder).shape(first)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self.concepts)

    def __len__(self) -> int:
        return len(self.concepts)

    def __bool__(self) -> bool:
        return True  # a bank of latents of which no more is known has concepts all the same

    def __repr__(self) -> str:
        gates = [concept.name for concept in self.concepts.values() if concept.present is not None]
        count = len(self) - len(gates)
        lines = [f"ConceptBank {self.name!r}: {count} concepts for {self.base.id or 'a model'}, {len(self.graph)} edges"]
        for concept in self.concepts.values():
            if concept.present is not None:
                continue
            useful = "" if concept.useful is None else f"useful {concept.useful:+.2f}"
            safe = "" if concept.range is None else f"safe {concept.range[0]:+.2f} to {concept.range[1]:+.2f}"
            lines.append(f"  {concept.name:<16} {concept.encoder:<12} {useful:<14} {safe:<22} {concept.label}".rstrip())
        if gates:
            lines.append(f"  gates: {', '.join(gates)}")
        return "\n".join(lines)

    def site_of(self, concept: Concept) -> str:
        """The name of the site at which a concept is read and moved."""
        return self.encoders[concept.encoder].site

    def read_at(self, concept: Concept) -> str:
        """The name of the site at which a concept is read: for a transcoder, an earlier one."""
        facts = self.encoders[concept.encoder]
        return facts.reads or facts.site

    def competes(self, concept: Concept) -> bool:
        """Whether what a concept reads depends on the others of its encoder."""
        facts = self.encoders[concept.encoder]
        return KINDS[facts.kind].competes(facts.settings)

    def find(self, words: str, limit: int = 5) -> list[Concept]:
        """Concepts that share words with these in name, label or contexts, or mean much the same, best first.

        Meaning is compared by sentence embeddings, where the extra `eval` is installed.
        """
        return ranked(words, list(self.concepts.values()))[:limit]

    def rows(self, concept: Concept) -> Rows:
        """What steering needs of one concept, read from disk when first asked for, and checked."""
        if (found := self._rows.get(concept.id)) is None:
            if concept.encoder in self._encoders:
                found = self._encoders[concept.encoder].rows([concept.index])
            else:
                kind, facts = KINDS[self.encoders[concept.encoder].kind], self.encoders[concept.encoder]
                one = self._one(concept.encoder, concept.index, (*kind.tensors, *kind.shared))
                found = kind.from_tensors(one, kind.of_rows(facts.settings, 1)).rows([0])
            widths = {self.read_at(concept): found.read, self.site_of(concept): found.write}
            for site, tensor in widths.items():
                if (width := self.sites[site].width) != tensor.shape[-1]:
                    raise WrongWidth(f"{concept.name!r} has width {tensor.shape[-1]}, its site {site!r} {width}")
            self._rows[concept.id] = found
        return found

    def _one(self, encoder: str, index: int, names: Iterable[str]) -> dict[str, Tensor]:
        """One row of each of these tensors that an encoder has, and the whole of those that all rows share."""
        shared = KINDS[self.encoders[encoder].kind].shared
        if encoder in self._encoders:
            tensors = self._encoders[encoder].to_tensors()
            return {n: tensors[n] if n in shared else tensors[n][index : index + 1] for n in names if n in tensors}
        file = self._file(encoder)
        here = [name for name in names if name in file.header]
        return {name: file.all(name) if name in shared else file.rows(name, index, index + 1) for name in here}

    def encoder(self, id: str) -> Encoder:
        """A whole encoder."""
        if id not in self._encoders:
            kind, file = KINDS[self.encoders[id].kind], self._file(id)
            self._encoders[id] = kind.from_tensors({name: file.all(name) for name in file.header}, self.encoders[id].settings)
        return self._encoders[id]

    def _file(self, encoder: str) -> hub.Tensors:
        if encoder not in self._tensors:
            assert self._folder is not None
            name, records = self.encoders[encoder].file, self._manifest["files"]
            if name not in records:
                raise CorruptBank(f"bank.json does not describe {name}; download the bank again")
            record = records[name]
            self._tensors[encoder] = hub.Tensors(
                self._folder / name, record["size"], self._hashes, tuple(record.get("blocks", ())), name
            )
        return self._tensors[encoder]

    @cached_property
    def _hashes(self) -> hub.Tensors:
        assert self._folder is not None
        record = self._manifest["files"].get("hashes.safetensors")
        if record is None:
            raise CorruptBank("bank.json does not describe hashes.safetensors; download the bank again")
        return hub.Tensors(self._folder / "hashes.safetensors", record["size"])

    # -- checking --------------------------------------------------------------------------------------------

    def check(self, host: Host) -> str:
        """Raise `WrongModel` for another architecture; the notice about other weights, or nothing."""
        found = host.fingerprint()
        for key, expected in self.base.fingerprint.items():
            if found.get(key) != expected:
                raise WrongModel(
                    f"bank {self.name!r} was made for {self.base.id or 'a model'} with {key}={expected!r}, this model has "
                    f"{found.get(key)!r}; load {self.base.id or 'that model'}, or train a bank for this one"
                )
        if self.base.weights is None or (digest := _digest(host)) is None or digest == self.base.weights:
            return ""
        return (
            f"bank {self.name!r} was measured on other weights of {self.base.id or 'this architecture'}; "
            "effects may differ on a fine-tuned or differently quantised copy"
        )

    def verify(self) -> None:
        """Check every file, hash, value and reference; raises `CorruptBank` at the first that is wrong."""
        if self._folder is not None:
            for name, record in self._manifest["files"].items():
                hub.check_whole(self._folder, name, record)
        places = [place for concept in self.concepts.values() for place in concept.places]
        for id in self.encoders:
            encoder = self.encoder(id)
            tensors = encoder.to_tensors()
            if not all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()):
                raise CorruptBank(f"encoder {id!r} has values that are not finite")
            count = {len(tensor) for name, tensor in tensors.items() if name not in encoder.shared}
            most = max((place.index for place in places if place.encoder == id), default=-1)
            if len(count) != 1 or most >= count.pop():
                raise CorruptBank(f"encoder {id!r} does not fit its concepts or its site")
        for place in places:
            self.rows(place)

    # -- making ----------------------------------------------------------------------------------------------

    @classmethod
    def from_directions(
        cls,
        directions: Mapping[str, Tensor],
        *,
        site: str,
        base: object,
        name: str = "directions",
        norm: float | None = None,
    ) -> "ConceptBank":
        """One's own vectors at one site of a model; the unit is the vector itself.

        With `norm`, the median length of an activation there, changes are capped to a share of it and can be matched to it.
        """
        if not directions:
            raise BadBank("expected at least one direction, got none")
        vectors = {key: vector.detach().float().cpu() for key, vector in directions.items()}
        for key, vector in vectors.items():
            if vector.ndim != 1 or vector.shape != next(iter(vectors.values())).shape:
                raise WrongWidth(f"expected vectors of one axis and equal width, got {tuple(vector.shape)} for {key!r}")
        concepts = [Concept(name=key, encoder=site, index=i) for i, key in enumerate(vectors)]
        return cls._around(Directions(torch.stack(list(vectors.values()))), concepts, site, base, name, norm)

    @classmethod
    def from_encoder(cls, encoder: Encoder, *, site: str, base: object, name: str = "encoder") -> "ConceptBank":
        """One's own encoder at one site; concepts are called `site/index`."""
        return cls._around(encoder, [], site, base, name)

    @classmethod
    def _around(
        cls, encoder: Encoder, concepts: list[Concept], site: str, base: object, name: str, norm: float | None = None
    ) -> "ConceptBank":
        host = host_for(base)
        found, width = host.site(site), encoder.rows([0]).write.shape[-1]
        expected = host.width(found)
        if expected is not None and expected != width:
            raise WrongWidth(f"site {site!r} has width {expected}, got vectors of width {width}")
        identity, facts = BaseModel(fingerprint=host.fingerprint()), SiteFacts(width=width, norm=norm)
        return cls(name, concepts, {site: encoder}, base=identity, sites={site: facts}, where={site: site})

    # -- files -----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> "ConceptBank":
        """Open a bank from a folder, from those shipped with steerlib, or from the Hub. Reads no weights."""
        folder = hub.resolve(
            name_or_folder, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        path = folder / "bank.json"
        if not path.is_file():
            raise CorruptBank(f"{folder.name!r} is no bank: it has no bank.json")
        if path.stat().st_size > MAX_MANIFEST:
            raise CorruptBank(f"bank.json has {path.stat().st_size} bytes, expected at most {MAX_MANIFEST}")
        manifest = hub.strict_json(path.read_bytes(), "bank.json")
        return cls._open(folder, manifest)

    @classmethod
    def _open(cls, folder: Path, manifest: Any) -> "ConceptBank":
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            version = manifest.get("format") if isinstance(manifest, dict) else None
            raise UnknownFormat(f"expected bank format {FORMAT}, got {version!r}; update steerlib or export the bank again")
        try:
            files = {hub.checked_name(name): dict(record) for name, record in manifest["files"].items()}
            bank = cls(
                str(manifest["name"]),
                (),
                {},
                base=BaseModel(**manifest["base_model"]),
                sites={name: SiteFacts(**facts) for name, facts in manifest["sites"].items()},
                license=str(manifest.get("license", "")),
                provenance=manifest.get("provenance", {}),
            )
            bank.encoders = {id: EncoderFacts(**facts) for id, facts in manifest["encoders"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise CorruptBank(f"bank.json lacks or misspells a field: {error}") from None
        known = {"format", "name", "base_model", "sites", "encoders", "license", "provenance", "files"}
        bank.extra = {key: value for key, value in manifest.items() if key not in known}
        bank._folder, bank._manifest = folder, {**manifest, "files": files}
        for id, facts in bank.encoders.items():
            known = facts.kind in KINDS and {facts.site, facts.reads or facts.site} <= bank.sites.keys()
            if not known or hub.checked_name(facts.file) not in files or not isinstance(facts.settings, dict):
                raise CorruptBank(f"encoder {id!r} has an unknown kind, site or file: {facts}")
        bank._take([Concept.from_dict(line) for line in bank._lines("concepts.jsonl")])
        bank.graph = bank._graph()
        if (folder / "README.md").is_file():
            bank.card = (folder / "README.md").read_text(encoding="utf-8")
        return bank

    def _lines(self, name: str) -> list[Any]:
        """The lines of a JSON-lines file, if the bank has it."""
        if name not in self._manifest["files"]:
            return []
        assert self._folder is not None
        hub.check_whole(self._folder, name, self._manifest["files"][name])
        return [hub.strict_json(line, name) for line in (self._folder / name).read_bytes().splitlines()]

    def _graph(self) -> CausalGraph:
        """Edges name concepts by their line in `concepts.jsonl`."""
        name = "graph.safetensors"
        if name not in self._manifest["files"]:
            return CausalGraph()
        assert self._folder is not None
        hub.check_whole(self._folder, name, self._manifest["files"][name])
        file, names = hub.Tensors(self._folder / name, self._manifest["files"][name]["size"]), list(self.concepts)
        return CausalGraph.from_tensors({column: file.all(column) for column in file.header}, names)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write the bank to a folder, all of it or nothing; an older bank there is replaced."""
        target = Path(folder)
        if target.exists() and any(target.iterdir()) and not (target / "bank.json").is_file():
            raise BadBank(f"{target.name!r} holds other things than a bank; give a new or empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            self._write(fresh)
            fresh.chmod(0o755)
            if target.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
                target.rename(old / target.name)
                fresh.rename(target)
                shutil.rmtree(old)
            else:
                fresh.rename(target)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        return target

    def _write(self, folder: Path) -> None:
        """Same bank, same bytes: keys sorted, no dates, devices or paths."""
        (folder / "sites").mkdir()
        hashes: dict[str, Tensor] = {}
        for id, facts in sorted(self.encoders.items()):
            tensors = {name: tensor.contiguous().cpu() for name, tensor in self.encoder(id).to_tensors().items()}
            save_file(tensors, folder / facts.file)
            digest = hub.block_hashes(folder / facts.file)
            hashes[facts.file] = torch.frombuffer(bytearray(digest), dtype=torch.uint8).reshape(-1, 32)
        save_file(hashes, folder / "hashes.safetensors")
        _write_lines(folder / "concepts.jsonl", [concept.to_dict() for concept in self.concepts.values()])
        if len(self.graph):
            save_file(self.graph.to_tensors(list(self.concepts)), folder / "graph.safetensors")
        if self.card:
            (folder / "README.md").write_text(self.card, encoding="utf-8")
        written = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in written:
            path.chmod(0o644)  # safetensors writes for its owner alone
        files = {path.relative_to(folder).as_posix(): hub.describe(path) for path in written}
        for name, digest in hashes.items():
            files[name]["blocks"] = hub.group_hashes(digest.numpy().tobytes())
        manifest = {
            **self.extra,
            "format": FORMAT,
            "name": self.name,
            "base_model": asdict(self.base),
            "sites": {name: asdict(facts) for name, facts in self.sites.items()},
            "encoders": {id: facts.to_dict() for id, facts in self.encoders.items()},
            "license": self.license,
            "provenance": self.provenance,
            "files": files,
        }
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (folder / "bank.json").write_text(text + "\n", encoding="utf-8")

    def with_concepts(
        self, concepts: Sequence[Concept], *, card: str | None = None, graph: CausalGraph | None = None
    ) -> "ConceptBank":
        """The same bank, its encoders in memory, with other facts about its concepts, another card and another graph."""
        return ConceptBank(
            self.name,
            concepts,
            {id: self.encoder(id) for id in self.encoders},
            base=self.base,
            sites=self.sites,
            where={id: facts.site for id, facts in self.encoders.items()},
            reads={id: facts.reads for id, facts in self.encoders.items()},
            graph=self.graph if graph is None else graph,
            card=self.card if card is None else card,
            license=self.license,
            provenance=self.provenance,
        )


def _file_of(encoder: str) -> str:
    """The file of an encoder: its id, escaped to letters that every file system takes."""
    plain = "".join(c if c.isalnum() and c.isascii() or c in "._-" else f"-{ord(c):x}-" for c in encoder)
    return f"sites/{plain}.safetensors"


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


_DIGESTS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def _digest(host: Host) -> str | None:
    if host.model not in _DIGESTS:
        _DIGESTS[host.model] = host.weights_digest()
    return _DIGESTS[host.model]
