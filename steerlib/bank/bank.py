"""What is done with a bank that is there: concepts looked up and shown, files checked, saved and published."""

import tempfile
from abc import ABC
from collections.abc import Iterator, KeysView, Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from ..encoders import KINDS, Encoder, Rows
from ..errors import BadBank, CorruptBank, NotReached, UnknownConcept, nearest
from ..graph.causal_graph import CausalGraph
from ..hosts import Host, host_for
from ..schedules import Window
from . import algebra, card, hub, layout, matching, signature
from .concepts import Concept, Place, printable
from .manifest import SAID, BaseModel, EncoderFacts, SiteFacts, level_of
from .search import LABELS, ranked
from .shelf import Shelf, grown, verify

SHOWN = 20
"""Concepts that are shown of a bank; of more, their number is."""


class Bank(ABC):
    """What is read of a bank; `ConceptBank` says how one is made, and sets the attributes.

    Methods that take a concept also take one of its places (`concept.places`).
    """

    name: str
    base: BaseModel
    sites: dict[str, SiteFacts]
    levels: dict[str, Window]
    graph: CausalGraph
    concepts: dict[str, Concept]
    files: Mapping[str, str | PathLike[str] | bytes]
    _by_id: dict[str, Concept]
    _shelf: Shelf

    def __getitem__(self, name: str | Concept) -> Concept:
        """A concept by its name or `encoder/index`, or one that is made of others; raises `UnknownConcept` with the nearest
        names."""
        if isinstance(name, Concept):
            return algebra.check(self, name)
        concept = self.concepts.get(name) or self._by_id.get(name)
        if concept is None and isinstance(name, str):
            found = self._shelf.concept(name) or grown(self._shelf, name, self.concepts)
            concept = None if found is None else self._by_id.setdefault(found.id, found)
        if concept is None:
            rows = "".join(f"; rows {text}" for text in self.unnamed())
            raise UnknownConcept(f"bank {self.name!r} has no concept {name!r:.200}; {nearest(str(name), self.concepts)}{rows}")
        return concept

    def unnamed(self) -> list[str]:
        """Of encoders none of whose rows is listed as a concept: how their rows are called."""
        told = {place.encoder for concept in self.concepts.values() for place in concept.places}
        own = [id for id in self.encoder_facts if id not in told and self._shelf.maker is None]
        few = [f"{id}/0 to {id}/{self.count(id) - 1}" for id in own[:3]]
        return few + ([f"of {len(own) - 3} more encoders"] if len(own) > 3 else [])

    def __iter__(self) -> Iterator[str]:
        return iter(self.concepts)

    def __contains__(self, name: object) -> bool:
        maker = self._shelf.maker
        return name in self.concepts or (maker is not None and isinstance(name, str) and maker.can(name))

    def __len__(self) -> int:
        return len(self.concepts)

    def __bool__(self) -> bool:
        return True  # a bank of latents of which no more is known has concepts all the same

    def keys(self) -> KeysView[str]:
        """Names of the concepts. Rows of encoders of which no more is known have none: `bank["layers.15/17"]`."""
        return self.concepts.keys()

    def _ipython_key_completions_(self) -> list[str]:
        return list(self.concepts)

    def content(self, name: str) -> bytes:
        """What is in a file that comes with the bank, fetched and checked; nothing if it has none of that name."""
        found = self.files.get(name, b"")
        return found if isinstance(found, bytes) else Path(found).read_bytes()

    def find(self, words: str, limit: int = 5) -> list[Concept]:
        """At most `limit` concepts that share words with these in name, label or examples, or mean much the same, best first.

        Meaning is compared by sentence embeddings, if the extra `eval` is installed.

        >>> bank.find("a")[0].name
        'a'
        """
        return ranked(words, list(self.concepts.values()), self.content(LABELS))[:limit]

    @property
    def encoder_facts(self) -> dict[str, EncoderFacts]:
        """Kind, site and settings of each encoder by its id; reads no weights. `bank.encoders` is an older name for it."""
        return self._shelf.facts

    encoders = encoder_facts

    def encoder(self, id: str) -> Encoder:
        """A whole encoder; all its weights are read."""
        return self._shelf.encoder(id)

    def rows(self, concept: Concept | Place) -> Rows:
        """What steering needs of one concept: its reading row `[1, D]`, bias `[1]`, writing row `[1, D]` and threshold `[1]`.

        Read when first asked for, and checked; raises `CorruptBank` or `WrongWidth`.

        >>> bank.rows(bank["a"]).write.shape == (1, model.config.hidden_size)
        True
        """
        if concept.blend is not None:
            return algebra.rows(self, concept)
        return self._shelf.rows(concept, self.sites)

    def learns(self, concept: Concept | Place) -> bool:
        """Whether its rows require gradients, so that every pass uses their values at that time."""
        if concept.blend is not None:
            return any(self._shelf.learns(at.encoder) for leaf in algebra.leaves(concept) for at in leaf.places)
        return self._shelf.learns(concept.encoder)

    def count(self, encoder: str) -> int:
        """Rows of an encoder; each is a concept, `encoder/index`."""
        return self._shelf.count(encoder)

    def site_of(self, concept: Concept | Place) -> str:
        """Name of the site at which a concept is moved, and read unless its encoder is a transcoder."""
        return self.encoder_facts[concept.encoder].site

    def read_at(self, concept: Concept | Place) -> str:
        """Name of the site at which a concept is read; for a transcoder, an earlier one than it is moved at."""
        facts = self.encoder_facts[concept.encoder]
        return facts.reads or facts.site

    def norm_of(self, at: Concept | Place) -> float | None:
        """Median length of an activation where a concept is moved, as it was measured with it; None: it was not."""
        facts = self.encoder_facts[at.encoder]
        return self.sites[facts.site].norm if facts.norm is None else facts.norm or None

    def window_of(self, concept: Concept | Place) -> Window | None:
        """When a concept is moved unless an edit says otherwise: near the noise level of its encoder, if it has one."""
        return self.levels.get(level_of(concept.encoder))

    def beside(self, place: Place, concept: Concept) -> Place | None:
        """The place of a concept at the site and noise level of a place of another one; None where it has none."""
        there = self.site_of(place), self.window_of(place)
        return next((at for at in concept.places if (self.site_of(at), self.window_of(at)) == there), None)

    def competes(self, concept: Concept | Place) -> bool:
        """Whether the reading of a concept depends on the other latents of its encoder, as with TopK."""
        facts = self.encoder_facts[concept.encoder]
        return KINDS[facts.kind].competes(facts.settings)

    def __repr__(self) -> str:
        heading, rows, lines = shown(self)
        listing = [f"{name:<16} {encoder:<12} {amounts:<36} {label}".rstrip() for name, encoder, amounts, label in rows]
        return "\n  ".join([heading, *listing, *lines])

    def _repr_html_(self) -> str:
        heading, rows, lines = shown(self)
        table = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
        head = "<tr><th>concept</th><th>encoder</th><th>amounts, in units</th><th>meaning</th></tr>"
        return f"<p>{escape(heading)}</p><table>{head}{table}</table>" + "".join(f"<p>{escape(line)}</p>" for line in lines)


class Stored(Bank):
    """What checks a bank and writes it; `ConceptBank` sets the attributes."""

    card: str
    license: str
    provenance: dict[str, Any]
    pictures: dict[str, bytes]
    extra: dict[str, Any]

    @property
    def home(self) -> hub.Home | None:
        """Where its files are; None for a bank that was not opened from files, or was changed since."""
        return self._shelf.home

    @property
    def folder(self) -> Path | None:
        """The folder of its files on this machine; None for a bank that was not opened from files."""
        return None if self._shelf.home is None else self._shelf.home.path

    def file(self, name: str) -> Path | None:
        """Where a file or folder that comes with the bank lies, such as `pipeline`, fetched and checked; None if it has none.

        >>> sl.ConceptBank.from_pretrained("scenes-32").file("pipeline").name
        'pipeline'
        """
        own = {key: path for key, path in sorted(self.files.items()) if key == name or key.startswith(f"{name}/")}
        if (home := self._shelf.home) is not None:
            home.fetch({key: self._shelf.records[key] for key in own if key in self._shelf.records})
        places = [(Path(path), key.removeprefix(name).count("/")) for key, path in own.items() if not isinstance(path, bytes)]
        return next((path.parents[depth - 1] if depth else path for path, depth in places), None)

    def contents(self) -> dict[str, Any]:
        """The arguments of `ConceptBank` that make this bank; `encoders` are read when needed."""
        if self._shelf.maker is not None and not self.concepts:
            raise BadBank(f"bank {self.name!r} has nothing to keep yet; ask for its concepts first, each by bank[name]")
        own = {key: getattr(self, key) for key in (*SAID, "graph", "card", "pictures", "files")}
        return {**own, "concepts": list(self.concepts.values()), "encoders": self._shelf}

    def check(self, host: Host, match: matching.Match = "model") -> str:
        """Compare the bank with a model; returns a notice if it is not the one the bank was measured on, else "".

        `host` is the model's, `steerlib.hosts.host_for(model)`. Raises `WrongModel` if the architecture is another one, or with
        `match="sites"` if no site fits.
        """
        return matching.check(self, host, match)

    def fits(self, model: object) -> matching.Fit:
        """How each site of the bank fits a model or pipeline, a dict by name of site: `same weights`, `other weights` (a
        fine-tune), `same shapes` (weights that cannot be told apart), `same width` (another architecture: steer with
        `match="sites"`), `unknown width`, `other width` or `missing`.

        >>> bank.fits(model)["layers.0"]
        'same weights'
        """
        return matching.fit(self, host_for(model))

    def verify(self, key: str | PathLike[str] | None = None) -> None:
        """Check every file, hash, value and reference; files that are still on the Hub are fetched.

        Files in the folder that the bank does not list are no part of it; a `SteeringWarning` names them.

        With `key`, the path of an Ed25519 public key in PEM, the signature is checked first. Raises `CorruptBank` at the first
        thing that is wrong, `WrongSignature` if that is the signature.

        >>> bank.verify()
        """
        if key is not None:
            if (home := self._shelf.home) is None:
                raise BadBank("only a bank that was saved has a signature; save it with key=")
            signature.check(home.path / "bank.json", home.signature(), Path(key))
        verify(self._shelf, [place for concept in self.concepts.values() for place in concept.places], self.sites)

    def save_pretrained(self, folder: str | PathLike[str], *, key: str | PathLike[str] | None = None) -> Path:
        """Write the bank to a folder, all of it or nothing, in place of an older bank there; returns the folder.

        With `key`, the path of an Ed25519 private key in PEM, it is signed. Raises `BadBank` if the folder holds other things.

        >>> with tempfile.TemporaryDirectory() as folder:
        ...     list(sl.ConceptBank.from_pretrained(bank.save_pretrained(folder)))
        ['a', 'b']
        """
        return layout.write(Path(folder), self.contents(), key)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        key: str | PathLike[str] | None = None,
    ) -> str:
        """Publish the bank in one commit, over what was there, and return the commit.

        Its card gets the metadata by which the Hub finds it, and what was measured; a bank without a card gets one.

        Args:
            repo_id: `org/name`; the repository is made if it is not there.
            private: whether a new repository is private (default: as the organisation has it).
            revision: branch to publish on; it is made if it is not there.
            token: access token of the Hub (default: that of `hf auth login`).
            commit_message: what the commit is called.
            key: path of an Ed25519 private key in PEM, to sign the bank with.

        Raises `NoAccess` where the token may not write, `NotReached` where the Hub did not answer; nothing was published then.
        """
        from huggingface_hub import HfApi

        own, api = self.contents(), HfApi(token=token, library_name="steerlib")
        own["card"] = card.for_hub(self.card, self.name, repo_id, self.base.id, self.license, own["concepts"])
        with tempfile.TemporaryDirectory() as scratch, hub.asking(repo_id, "nothing was published, do it again online"):
            folder = layout.write(Path(scratch) / "bank", own, key)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            options: Any = {"delete_patterns": [*hub.STALE, *hub.listed(repo_id, revision, token)]}
            options["commit_message"] = commit_message or f"Upload the bank {self.name}"
            try:
                return api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **options).oid
            except RuntimeError as error:  # of one large file, whatever the cause
                raise NotReached(f"{error} ({error.__cause__}); nothing was published, do it again") from None


def shown(bank: Bank) -> tuple[str, list[tuple[str, str, str, str]], list[str]]:
    """A heading, a row for each of `SHOWN` concepts (name, encoder, amounts, label), and lines on the others."""
    gates = [concept.name for concept in bank.concepts.values() if concept.present is not None]
    others = [concept for concept in bank.concepts.values() if concept.present is None]
    named = [concept for concept in others if concept.name != concept.id]
    rows = [
        (printable(c.name, 40), f"…{c.encoder[-23:]}" if len(c.encoder) > 24 else c.encoder, c.amounts, printable(c.label, 60))
        for c in named[:SHOWN]
    ]
    encoders = sorted({concept.encoder for concept in others if concept.name == concept.id})
    lines = [f"and {len(named) - SHOWN} more"] if len(named) > SHOWN else []
    if encoders:
        where = f"in {len(encoders)} encoders" if len(encoders) > 4 else f"of {', '.join(encoders)}"
        lines.append(f"{len(others) - len(named):,} latents {where}")
    lines += [f"latents {text}, without labels" for text in bank.unnamed()]
    lines += [bank._shelf.maker.what] if bank._shelf.maker is not None else []
    if unmeasured := [concept for concept in others if concept.unmeasured]:
        names = f"[{unmeasured[0].name!r}, …]" if len(unmeasured) > 1 else f"[{unmeasured[0].name!r}]"
        lines.append(f"ranges of {len(unmeasured):,} not measured: sl.calibrate(model, bank, {printable(names, 60)}, judge=…)")
    if gates:
        lines.append(f"gates: {printable(', '.join(gates), 400)}")
    listed = f"{len(others)} {'named ' if bank.unnamed() else ''}concepts"
    heading = f"ConceptBank {bank.name!r}: {listed} for {bank.base.id or 'a model'}, {len(bank.graph)} edges"
    return heading, rows, lines


def by_name(concepts: Sequence[Concept], encoders: Mapping[str, EncoderFacts]) -> dict[str, Concept]:
    """Concepts by name; raises `CorruptBank` where a name stands twice, or an encoder or a gate is none of the bank's."""
    found: dict[str, Concept] = {}
    for concept in concepts:
        if concept.encoder not in encoders:
            raise CorruptBank(f"concept {concept.name!r} names encoder {concept.encoder!r}, which the bank does not have")
        if found.setdefault(concept.name, concept) is not concept:
            raise CorruptBank(f"expected each concept name once, got {concept.name!r} twice")
        if missing := [part.encoder for part in concept.parts if part.encoder not in encoders]:
            raise CorruptBank(f"concept {concept.name!r} has a part in {missing[0]!r}, which the bank does not have")
    for concept in concepts:
        if concept.gate is not None and concept.gate.concept not in found:
            raise CorruptBank(f"concept {concept.name!r} is gated by {concept.gate.concept!r}, which the bank does not have")
    return found
