"""A bank: concepts of one model, their encoders, their graph, and whose they are."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders import KINDS, Directions, Encoder, Rows
from ..encoders.sparse import STATISTICS
from ..errors import BadBank, CorruptBank, UnknownConcept, WrongModel, WrongWidth, nearest
from ..graph.causal_graph import CausalGraph
from ..hosts import Host, digest_of, host_for
from ..schedules import Window
from . import card as cards
from . import hub, layout, signature, trust
from .concepts import Concept, Place, printable
from .manifest import BaseModel, EncoderFacts, Manifest, SiteFacts
from .search import ranked


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
        levels: Mapping[str, Window] | None = None,
        graph: CausalGraph | None = None,
        card: str = "",
        license: str = "",
        provenance: Mapping[str, Any] | None = None,
    ):
        """`where` maps encoder ids to site names (default: the id up to `@` or `#`), `reads` those of transcoders to where they
        read, `levels` what follows `@` in ids to when concepts are moved by default. Every row of an encoder is a concept,
        named `encoder/index`; `concepts` are those of which more is known."""
        self.name, self.base, self.sites, self.card, self.license = name, base, dict(sites), card, license
        self.graph, self.provenance = graph or CausalGraph(), dict(provenance or {})
        self.levels = dict(levels or {})
        self.pictures: dict[str, bytes] = {}
        """PNG files that the card shows, by name."""
        self.extra: dict[str, Any] = {}
        """Optional fields of `bank.json` this version does not know, kept for whoever does."""
        self._encoders: dict[str, Encoder] = dict(encoders)
        site_of = where or {id: id.partition("@")[0].partition("#")[0] for id in encoders}
        self.encoders = {
            id: EncoderFacts(
                site=site_of[id], kind=e.kind, file=layout.file_of(id), reads=(reads or {}).get(id, ""), settings=e.settings
            )
            for id, e in encoders.items()
        }
        self._tensors: dict[str, trust.Tensors] = {}
        self._home: hub.Folder | hub.Repository | None = None
        self._files: Mapping[str, Mapping[str, Any]] = {}
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
            lines.append(
                f"  {concept.name:<16} {concept.encoder:<12} {useful:<14} {safe:<22} {printable(concept.label)}".rstrip()
            )
        if gates:
            lines.append(f"  gates: {', '.join(gates)}")
        return "\n".join(lines)

    @property
    def folder(self) -> Path | None:
        """Where its files are on this machine, if it was opened from files."""
        return None if self._home is None else self._home.path

    def site_of(self, concept: Concept | Place) -> str:
        """The name of the site at which a concept is read and moved."""
        return self.encoders[concept.encoder].site

    def read_at(self, concept: Concept | Place) -> str:
        """The name of the site at which a concept is read: for a transcoder, an earlier one."""
        facts = self.encoders[concept.encoder]
        return facts.reads or facts.site

    def window_of(self, concept: Concept | Place) -> Window | None:
        """When a concept is moved unless an edit says otherwise: near its noise level, if it has one."""
        return self.levels.get(concept.encoder.partition("@")[2].partition("#")[0])

    def competes(self, concept: Concept | Place) -> bool:
        """Whether what a concept reads depends on the others of its encoder."""
        facts = self.encoders[concept.encoder]
        return KINDS[facts.kind].competes(facts.settings)

    def find(self, words: str, limit: int = 5) -> list[Concept]:
        """Concepts that share words with these in name, label or contexts, or mean much the same, best first.

        Meaning is compared by sentence embeddings, where the extra `eval` is installed.
        """
        return ranked(words, list(self.concepts.values()))[:limit]

    def rows(self, concept: Concept | Place) -> Rows:
        """What steering needs of one concept, read from disk when first asked for, and checked."""
        if (found := self._rows.get(concept.id)) is None:
            kind, facts = KINDS[self.encoders[concept.encoder].kind], self.encoders[concept.encoder]
            if concept.encoder in self._encoders:
                found = _made(kind, lambda: self._encoders[concept.encoder].rows([concept.index]))
            else:
                one = self._one(concept.encoder, concept.index, (*kind.tensors, *kind.shared))
                found = _made(kind, lambda: kind.from_tensors(one, kind.of_rows(facts.settings, 1)).rows([0]))
            widths = {self.read_at(concept): found.read, self.site_of(concept): found.write}
            for site, tensor in widths.items():
                if (width := self.sites[site].width) != tensor.shape[-1]:
                    raise WrongWidth(f"{concept.id!r} has width {tensor.shape[-1]}, its site {site!r} {width}")
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
            tensors = {name: file.all(name) for name in file.header}
            self._encoders[id] = _made(kind, lambda: kind.from_tensors(tensors, self.encoders[id].settings))
        return self._encoders[id]

    def _file(self, encoder: str) -> trust.Tensors:
        if encoder not in self._tensors:
            self._tensors[encoder] = self._open(self.encoders[encoder].file, self._hashes)
        return self._tensors[encoder]

    @cached_property
    def _hashes(self) -> trust.Tensors:
        return self._open("hashes.safetensors")

    def _open(self, name: str, hashes: trust.Tensors | None = None) -> trust.Tensors:
        assert self._home is not None
        if name not in self._files:
            raise CorruptBank(f"bank.json does not describe {name}; download the bank again")
        return trust.Tensors(self._home.read, name, self._files[name], hashes)

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
        if self.base.weights is None or (digest := digest_of(host)) is None or digest == self.base.weights:
            return ""
        return (
            f"bank {self.name!r} was measured on other weights of {self.base.id or 'this architecture'}; "
            "effects may differ on a fine-tuned or differently quantised copy"
        )

    def verify(self, key: str | os.PathLike[str] | None = None) -> None:
        """Check every file, hash, value and reference; raises `CorruptBank` at the first that is wrong.

        Files that are still on the Hub are fetched. With `key`, an Ed25519 public key in PEM, the signature is checked first.
        """
        if key is not None and self._home is None:
            raise BadBank("only a bank that was saved has a signature; save it with key=")
        if self._home is not None:
            if key is not None:
                signature.check(self._home.path / "bank.json", self._home.signature(), Path(key))
            self._home.fetch(self._files)
            for name, record in self._files.items():
                self._home.check(name, record)
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
        """Open a bank from a folder, from those shipped with steerlib, or from the Hub. Reads no weights.

        A `revision` of a Hub bank is a branch, a tag or a commit; all files are read at the commit it names now.
        """
        home = hub.home_of(
            name_or_folder, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        path = home.path / "bank.json"
        if not path.is_file():
            raise CorruptBank(f"{home.path.name!r} is no bank: it has no bank.json")
        if (size := trust.contained(home.path, "bank.json").stat().st_size) > trust.MAX_MANIFEST:
            raise CorruptBank(f"bank.json has {size} bytes, expected at most {trust.MAX_MANIFEST}")
        return cls._from(home, Manifest.from_json(path.read_bytes()))

    @classmethod
    def _from(cls, home: hub.Folder | hub.Repository, manifest: Manifest) -> "ConceptBank":
        files = manifest.files
        is_small = sum(record["size"] for record in files.values()) <= hub.SMALL
        home.fetch({name: record for name, record in files.items() if is_small or layout.describes(name)})
        bank = cls(
            manifest.name,
            (),
            {},
            base=manifest.base,
            sites=manifest.sites,
            levels=manifest.levels,
            license=manifest.license,
            provenance=manifest.provenance,
        )
        bank.encoders, bank.extra = dict(manifest.encoders), dict(manifest.extra)
        bank._home, bank._files = home, files
        bank._take(layout.read_concepts(home, files))
        bank.graph = layout.read_graph(home, files, list(bank.concepts))
        bank.card, bank.pictures = layout.read_card(home, files), layout.read_pictures(home, files)
        return bank

    def save_pretrained(self, folder: str | os.PathLike[str], *, key: str | os.PathLike[str] | None = None) -> Path:
        """Write the bank to a folder, all of it or nothing; an older bank there is replaced.

        With `key`, an Ed25519 private key in PEM, it is signed.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()) and not (target / "bank.json").is_file():
            raise BadBank(f"{target.name!r} holds other things than a bank; give a new or empty folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            self._write(fresh)
            if key is not None:
                signature.sign(fresh / "bank.json", fresh / hub.SIGNATURE, Path(key))
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
        manifest = Manifest(
            name=self.name,
            base=self.base,
            sites=self.sites,
            encoders=self.encoders,
            levels=self.levels,
            license=self.license,
            provenance=self.provenance,
            extra=self.extra,
        )
        tensors = ((facts.file, self.encoder(id).to_tensors()) for id, facts in sorted(self.encoders.items()))
        layout.write(folder, manifest, tensors, list(self.concepts.values()), self.graph, self.card, self.pictures)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        key: str | os.PathLike[str] | None = None,
    ) -> str:
        """Publish the bank in one commit, signed where there is a `key`, and return the commit.

        Its card gets the metadata by which the Hub finds it, and what was measured; a bank without a card gets one.
        """
        concepts = list(self.concepts.values())
        card = cards.for_hub(self.card, self.name, repo_id, self.base.id, self.license, concepts)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.with_concepts(concepts, card=card).save_pretrained(Path(scratch) / "bank", key=key)
            message = commit_message or f"Upload the bank {self.name}"
            return hub.publish(folder, repo_id, private=private, revision=revision, token=token, commit_message=message)

    def with_concepts(
        self, concepts: Sequence[Concept], *, card: str | None = None, graph: CausalGraph | None = None
    ) -> "ConceptBank":
        """The same bank, its encoders in memory, with other facts about its concepts, another card and another graph."""
        bank = ConceptBank(
            self.name,
            concepts,
            {id: self.encoder(id) for id in self.encoders},
            base=self.base,
            sites=self.sites,
            where={id: facts.site for id, facts in self.encoders.items()},
            reads={id: facts.reads for id, facts in self.encoders.items()},
            levels=self.levels,
            graph=self.graph if graph is None else graph,
            card=self.card if card is None else card,
            license=self.license,
            provenance=self.provenance,
        )
        bank.extra, bank.pictures = dict(self.extra), dict(self.pictures)
        return bank


def _made(kind: type[Encoder], make: Callable[[], Any]) -> Any:
    """An encoder of a stranger's tensors and settings, or its rows."""
    try:
        return make()
    except (ArithmeticError, AttributeError, LookupError, TypeError, RuntimeError) as error:
        raise CorruptBank(f"an encoder of kind {kind.kind!r} is not made of this: {error!s:.200}") from None
