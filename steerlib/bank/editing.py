"""Other banks made of one: joined with another, with a concept more or less, with other names or labels.

No weights are read for it: the new bank borrows the rows of the old ones, so what a concept changes stays the same bits. Gates,
parts, measured effects, graph, pictures and the card follow.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

from ..errors import BadBank, Unmeasured, WrongModel, WrongWidth
from ..graph.causal_graph import CausalGraph
from ..schedules import Window
from . import algebra, wording
from .bank import Stored
from .card import THUMBNAIL
from .concepts import MAX_NAME, Concept, is_sound
from .consistency import check_copy
from .manifest import BaseModel, SiteFacts, file_of, level_of
from .shelf import Shelf
from .trust import is_plain_name
from .vectors import Where, gathered

MADE = ("recipe.jsonl", "contrast.jsonl")
"""How a bank was made; those of the other bank say nothing of two that are joined."""


B = TypeVar("B", bound="Edited")


class Edited(Stored):
    """What makes other banks of a bank, which stays as it is."""

    def merge(self: B, other: B, *, prefix: str = "") -> B:
        """A bank of the concepts of both.

        Name, recipe and metadata are those of this bank, and of pictures and files of one name it has its own. Where both have
        an encoder of one id, the other's gets `#` and the other bank's name behind it. Each concept keeps the length of
        activations that was measured with it, by which its additions are capped.

        Args:
            other: the other bank.
            prefix: put before the names and factors of its concepts.

        Raises `BadBank` where both have a name, `WrongModel` where they are of different models.

        >>> other = sl.ConceptBank.from_directions({"a": torch.ones(model.config.hidden_size)}, site="layers.0", base=model)
        >>> bank.merge(other, prefix="my ").keys()
        dict_keys(['a', 'b', 'my a'])
        """
        return self._with(_joined(self, other, prefix))

    def add(self: B, name: str, vector: Any, *, site: Where = None, **facts: Any) -> B:
        """A bank with one concept more.

        Args:
            name: what it is called.
            vector: `[D]`, or vectors by name of site, as for `from_directions`; or a combination, `bank["a"] - bank["b"]`.
            site: where the vector acts; several: at each of them.
            facts: what is known of it: arguments of `Concept`, such as `label="…"`, `unit=2.0` or `gate=sl.Gate("b")`.

        Raises `BadBank` where the name is taken, `WrongWidth` where the vector is not as wide as its site.

        >>> bank.add("c", torch.ones(model.config.hidden_size), site="layers.1", label="all ones")["c"].label
        'all ones'
        """
        if name in self.concepts:
            raise BadBank(f"bank {self.name!r} has a concept {name!r} already; rename or drop it first")
        if isinstance(vector, Concept):
            return self.with_concepts([*self.concepts.values(), replace(self[vector], name=name, **facts)])
        encoders, (made,) = gathered({name: vector}, site)
        widths = {site: encoder.rows([0]).write.shape[-1] for site, encoder in encoders.items()}
        sites = {at: replace(self.sites.get(at, SiteFacts(width=width)), width=width) for at, width in widths.items()}
        said = {"name": "added", "concepts": [made], "encoders": encoders, "base": self.base, "sites": sites}
        found = self.merge(self._with({**said, "license": self.license})).contents()
        unit = facts.get("unit", 1.0)
        last = found["concepts"].pop()
        own = replace(last, **{"parts": tuple(replace(part, unit=unit) for part in last.parts), **facts})
        return self._with({**found, "concepts": [*found["concepts"], _sound(own)]})

    def rename(self: B, names: Mapping[str, str]) -> B:
        """A bank in which concepts are called otherwise, `{"old": "new"}`; two may exchange their names.

        Raises `UnknownConcept` for one that is not there, `BadBank` where a new name is taken or cannot be a name.

        >>> bank.rename({"a": "formality"}).keys()
        dict_keys(['formality', 'b'])
        """
        return self._with(_called(self, _checked(self, {self[old].name: new for old, new in names.items()})))

    def relabel(self: B, label: Callable[[Concept], str | None], *, source: str = "") -> B:
        """A bank in which concepts are described otherwise.

        Args:
            label: gives the label of a concept; None: it keeps its own.
            source: where the new labels come from.

        >>> bank.relabel(lambda concept: f"the letter {concept.name}", source="by hand")["a"].label
        'the letter a'
        """
        changed, concepts = {}, []
        for concept in self.concepts.values():
            if (text := label(concept)) is not None and text != concept.label:
                effects = {**concept.effects, "label": text} if "label" in concept.effects else concept.effects
                changed[concept.name] = concept.label, text
                concept = _sound(replace(concept, label=text, source=source, effects=effects))
            concepts.append(concept)
        return self._with({**_called(self, {}), "concepts": concepts, "card": wording.relabelled(self.card, changed)})

    def select(self: B, *names: str) -> B:
        """A bank of some concepts, and of those that gate them.

        An encoder of which one concept is kept stays whole, so that `encoder/index` means the same; the others go.

        Raises `UnknownConcept` for one that is not there; warns (`Unmeasured`) where the graph knows of an effect only through
        concepts that go.

        >>> bank.select("b").keys()
        dict_keys(['b'])
        """
        kept, found = dict[str, Concept](), [self[name] for name in names]
        while found:
            concept = found.pop(0)
            kept[concept.name] = concept
            found += [self[concept.gate.concept]] if concept.gate and concept.gate.concept not in kept else []
        return self._with(_of(self, kept, {place.encoder for concept in kept.values() for place in concept.places}))

    def drop(self: B, *names: str) -> B:
        """A bank without some concepts; encoders that no other listed concept needs go with them, the others stay whole.

        Raises `UnknownConcept` for one that is not there, `BadBank` for one that gates another; and warns as `select` does.

        >>> bank.drop("a").keys()
        dict_keys(['b'])
        """
        gone = {self[name].name for name in names}
        kept = {name: concept for name, concept in self.concepts.items() if name not in gone}
        if gates := [c for c in kept.values() if c.gate is not None and c.gate.concept in gone]:
            gate = gates[0].gate
            assert gate is not None
            raise BadBank(f"{gates[0].name!r} acts where {gate.concept!r} shows; drop it too, or keep {gate.concept!r}")
        left = {place.encoder for name in gone for place in self[name].places}
        left -= {place.encoder for concept in kept.values() for place in concept.places}
        return self._with(_of(self, kept, self.encoder_facts.keys() - left))

    def with_concepts(self: B, concepts: algebra.Concepts | None = None, **changes: Any) -> B:
        """A copy with other concepts, its encoders in memory; `changes` are arguments of `ConceptBank` in place of its own.
        `encoders` may be some of them. Concepts given by name are called so; combinations become directions. Raises `BadBank`
        where card, graph or effects would tell of what it does not have, and warns of concepts that it drops.

        >>> bank.with_concepts({**bank.concepts, "mere a": bank["a"] - bank["b"]}, card="# Mine").keys()
        dict_keys(['a', 'b', 'mere a'])
        """
        own = self.contents()
        given, more = algebra.stored(self, self.concepts if concepts is None else concepts)
        changed = {"concepts": given, **changes, "encoders": own["encoders"].whole(changes.get("encoders", {}), more)}
        return check_copy(self, self._with(own | changed), changes)

    def _with(self: B, contents: Mapping[str, Any]) -> B:
        make: Any = type(self)
        return make(**contents)


def _joined(bank: Edited, other: Edited, prefix: str) -> dict[str, Any]:
    """What two banks are together; `prefix` goes before the names of the other's concepts."""
    base, sites = _one_base(bank, other), _sites(bank, other)
    ids, levels = _free(bank, other, re.sub(r"[@#/\s]+", "-", prefix.strip() or other.name))
    names = {c.name: _id(c, ids) if c.name == c.id else prefix + c.name for c in other.concepts.values()}
    if twice := sorted(bank.concepts.keys() & {*names.values()}):
        raise BadBank(f"both banks have {_quoted(twice)}; give prefix=, or rename or drop what one of them has")
    first, second = _called(bank, {}), _called(other, names, ids, prefix, sites)
    card, pictures = _beside(second["card"], bank.pictures, second["pictures"])
    taken = {name.partition("/")[0] for name in (*bank.files, *MADE)}
    files = {name: file for name, file in other.files.items() if name.partition("/")[0] not in taken}
    return first | {
        "base": base,
        "concepts": first["concepts"] + second["concepts"],
        "encoders": Shelf.joined(first["encoders"], second["encoders"]),
        "sites": sites,
        "levels": bank.levels | {levels[name]: window for name, window in other.levels.items()},
        "graph": CausalGraph([*bank.graph.every, *second["graph"].every]),
        "card": wording.joined(bank.card, card),
        "license": _license(bank.license, other.license),
        "provenance": _provenance(bank, other, ids),
        "pictures": pictures | bank.pictures,
        "files": files | dict(bank.files),
        "extra": other.extra | bank.extra,
    }


def timed(bank: B, when: Window | Mapping[str, Window]) -> B:
    """A bank whose concepts are moved in a window of denoising, or at some sites in one each."""
    windows = dict.fromkeys(bank.sites, when) if isinstance(when, Window) else dict(when)
    if unknown := windows.keys() - bank.sites.keys():
        raise BadBank(f"when= names {_quoted(sorted(unknown))}; it has vectors at {', '.join(bank.sites)}")
    levels = {site: f"{window.start:g}-{window.stop:g}" for site, window in windows.items()}
    ids = {id: f"{id}@{levels[id]}" if id in levels else id for id in bank.encoder_facts}
    return bank._with({**_called(bank, {}, ids), "levels": {levels[site]: window for site, window in windows.items()}})


def together(banks: Sequence[B]) -> B:
    """One bank of several. A name that more than one of them has is `bank/name` there, and their encoders of one id are
    `id#bank`, so that neither is taken for the other."""
    if not banks or not all(isinstance(bank, Edited) for bank in banks):
        raise BadBank(f"expected a ConceptBank or a list of some, got {banks!r:.200}")
    first, *others = banks
    key, known = tuple((id(bank), len(bank.concepts)) for bank in banks), _TOGETHER.setdefault(first, {})
    owners, whole = known.get(key, ((), None))
    if whole is None or [owner() for owner in owners] != others:
        whole = reduce(lambda one, other: one.merge(other), _apart(banks))
        known[key] = [ref(bank) for bank in others], whole
    return whole


_TOGETHER: WeakKeyDictionary[Any, dict[Any, tuple[Sequence[Any], Any]]] = WeakKeyDictionary()


def _apart(banks: Sequence[B]) -> Iterator[B]:
    """The same banks, of which no two have a name or an encoder's id in common."""
    called = Counter(bank.name for bank in banks)
    tags = [bank.name if called[bank.name] == 1 else f"{bank.name} {k}" for k, bank in enumerate(banks, 1)]
    taken = Counter(name for bank in banks for name in (*bank.concepts, *bank.encoder_facts))
    for tag, bank in zip(tags, banks, strict=True):
        plain = re.sub(r"[@#/\s]+", "-", tag)
        ids = {id: f"{id}{'+' if '#' in id else '#'}{plain}" if taken[id] > 1 else id for id in bank.encoder_facts}
        twice = [c for c in bank.concepts.values() if c.name == c.id or taken[c.name] > 1]
        names = {c.name: _id(c, ids) if c.name == c.id else f"{tag}/{c.name}" for c in twice}
        yield bank._with(_called(bank, names, ids))


def _called(
    bank: Edited,
    names: Mapping[str, str],
    ids: Mapping[str, str] | None = None,
    prefix: str = "",
    sites: Mapping[str, SiteFacts] | None = None,
) -> dict[str, Any]:
    """A bank whose concepts and encoders are called otherwise; `prefix` goes before factors.

    Of a bank that becomes a part of another one, `sites` are that one's: lengths that differ from theirs stay with encoders.
    """
    own = bank.contents()
    known = {place: place for place in bank.encoder_facts} if ids is None else ids
    fresh = [bank[name] for name in names if name not in bank.concepts]  # rows that had no name of their own
    facts = {}
    for old, new in known.items():
        there = bank.encoder_facts[old]
        norm = bank.sites[there.site].norm if there.norm is None else there.norm
        norm = there.norm if sites is None else None if norm == sites[there.site].norm else norm or 0.0
        facts[new] = replace(there, file=file_of(new), norm=norm)
    thumbnails = {THUMBNAIL.format(old): THUMBNAIL.format(new) for old, new in names.items() if old != new}
    pictures = {thumbnails.get(name, name): picture for name, picture in bank.pictures.items()}
    edges = [replace(e, src=names.get(e.src, e.src), dst=names.get(e.dst, e.dst)) for e in bank.graph.every]
    return own | {
        "concepts": [_moved(c, names, known, prefix) for c in (*own["concepts"], *fresh)],
        "encoders": Shelf(facts, lent={new: (own["encoders"], old) for old, new in known.items()}),
        "graph": CausalGraph(edges),
        "card": wording.renamed(bank.card, {old: new for old, new in names.items() if old != new}),
        "pictures": {name: picture for name, picture in pictures.items() if is_plain_name(name)},
    }


def _id(concept: Concept, ids: Mapping[str, str]) -> str:
    return f"{ids[concept.encoder]}/{concept.index}"


def _moved(concept: Concept, names: Mapping[str, str], ids: Mapping[str, str], prefix: str) -> Concept:
    """A concept that is called otherwise, with all that it says of names; the same object where nothing changes."""
    name, gate = names.get(concept.name, concept.name), concept.gate
    effects = {**concept.effects, "concept": name} if "concept" in concept.effects else concept.effects
    found = replace(
        concept,
        name=name,
        encoder=ids.get(concept.encoder, concept.encoder),
        parts=tuple(replace(part, encoder=ids.get(part.encoder, part.encoder)) for part in concept.parts),
        gate=gate and replace(gate, concept=names.get(gate.concept, gate.concept)),
        factor=concept.factor and prefix + concept.factor,
        effects=effects,
    )
    return concept if found == concept else _sound(found)


def _of(bank: Edited, kept: Mapping[str, Concept], encoders: Collection[str]) -> dict[str, Any]:
    """A bank of some concepts and encoders."""
    own, graph = _called(bank, {}, {id: id for id in bank.encoder_facts if id in encoders}), bank.graph
    edges = CausalGraph([e for e in graph.every if e.src in kept and (e.dst in kept or e.is_outcome)])
    for end in {end for edge in graph.edges for end in (edge.src, edge.dst) if end in kept}:
        if lost := [name for name in graph.descendants(end) if name in kept and name not in edges.descendants(end)]:
            warnings.warn(
                f"{end!r} moves {_quoted(lost)} through concepts that are not kept, so the graph knows no more of it: it is "
                "neither held by do='hold' nor foretold by do='graph'",
                Unmeasured,
                stacklevel=3,
            )
    gone = [name for name in bank.concepts if name not in kept]
    used = [facts for id, facts in bank.encoder_facts.items() if id in encoders]
    places = {site for facts in used for site in (facts.site, facts.reads)}
    names = {THUMBNAIL.format(name) for name in gone}
    return own | {
        "concepts": [*kept.values()],
        "graph": edges,
        "sites": {name: facts for name, facts in bank.sites.items() if name in places},
        "levels": {name: window for name, window in bank.levels.items() if any(level_of(id) == name for id in encoders)},
        "card": wording.without(bank.card, gone),
        "pictures": {name: picture for name, picture in bank.pictures.items() if name not in names},
    }


def _checked(bank: Edited, names: Mapping[str, str]) -> Mapping[str, str]:
    """New names by old ones, of which none is taken."""
    for old, new in names.items():
        _sound(replace(bank[old], name=new))
        if new.rpartition("/")[0] in bank.encoder_facts and new != bank[old].id:
            raise BadBank(f"{new!r} is how a row of bank {bank.name!r} is called by its number; take another name")
    whole = Counter([names.get(name, name) for name in {**bank.concepts, **names}])
    if twice := sorted(name for name, count in whole.items() if count > 1):
        raise BadBank(f"bank {bank.name!r} would have {_quoted(twice)} twice; take another name")
    return names


def _sound(concept: Concept) -> Concept:
    """The same concept; raises `BadBank` where it could not be saved."""
    if not is_sound(concept):
        raise BadBank(f"expected a printable name of at most {MAX_NAME} letters, short texts and finite numbers, got {concept}")
    return concept


def _one_base(bank: Edited, other: Edited) -> BaseModel:
    """The model of two banks; raises `WrongModel` where they are of different ones."""
    a, b = bank.base, other.base
    both = {key for key in a.fingerprint if key in b.fingerprint and a.fingerprint[key] != b.fingerprint[key]}
    said = [(key, a.fingerprint[key], b.fingerprint[key]) for key in sorted(both)]
    said += [("id", a.id, b.id)] if a.id and b.id and a.id != b.id and (a.weights is None or a.weights != b.weights) else []
    said += [("weights", a.weights, b.weights)] if None not in (a.weights, b.weights) and a.weights != b.weights else []
    for key, mine, theirs in said:
        raise WrongModel(
            f"banks {bank.name!r} and {other.name!r} were made for different models: {key} {mine!r} and {theirs!r}; if both "
            "serve yours, steer with one inside the other, or say so: other.with_concepts(base=bank.base)"
        )
    return BaseModel(
        id=a.id or b.id, fingerprint={**b.fingerprint, **a.fingerprint}, weights=b.weights if a.weights is None else a.weights
    )


def _sites(bank: Edited, other: Edited) -> dict[str, SiteFacts]:
    """Sites of two banks; raises `WrongWidth` where one of them has two widths."""
    for name in bank.sites.keys() & other.sites.keys():
        if (mine := bank.sites[name].width) != (theirs := other.sites[name].width):
            raise WrongWidth(f"site {name!r} has width {mine} in bank {bank.name!r}, {theirs} in {other.name!r}")
    return other.sites | bank.sites


def _free(bank: Edited, other: Edited, tag: str) -> tuple[dict[str, str], dict[str, str]]:
    """What encoders and noise levels of another bank are called beside those of a bank."""
    levels: dict[str, str] = {}
    for name, window in other.levels.items():
        levels[name] = name
        while (bank.levels | {k: w for k, w in other.levels.items() if k != name}).get(levels[name], window) != window:
            levels[name] += "+"
    ids: dict[str, str] = {}
    for id in other.encoder_facts:
        site, kind = id.partition("#")[0], id.partition("#")[2]
        place, level = site.partition("@")[0], level_of(id)
        plain = f"{place}@{levels.get(level, level)}" if level else place
        new, more = f"{plain}#{kind}" if kind else plain, tag
        while new in bank.encoder_facts or new in ids.values():
            new, more = f"{plain}#{kind}{'+' if kind else ''}{more}", f"{more}+"
        ids[id] = new
    return ids, levels


def _beside(card: str, taken: Mapping[str, bytes], pictures: Mapping[str, bytes]) -> tuple[str, dict[str, bytes]]:
    """A card and its pictures, called otherwise where another picture has the name."""
    found = {}
    for name, picture in pictures.items():
        new, number = name, 2
        while taken.get(new, picture) != picture or new != name and new in pictures:
            new, number = f"{name.removesuffix('.png')}-{number}.png", number + 1
        found[new], card = picture, card.replace(f"({name})", f"({new})")
    return card, found


def _license(mine: str, theirs: str) -> str:
    """The license of two banks: none where one has none, and both where they differ."""
    return mine if mine == theirs else f"{mine} AND {theirs}" if mine and theirs else ""


def _provenance(bank: Edited, other: Edited, ids: Mapping[str, str]) -> dict[str, Any]:
    """How two banks were made."""
    mine, theirs = bank.provenance, other.provenance
    found: dict[str, Any] = dict(mine)
    if sources := {ids[id]: source for id, source in theirs.get("encoders", {}).items() if id in ids}:
        found["encoders"] = {**mine.get("encoders", {}), **sources}
    if theirs:
        found["merged"] = [*mine.get("merged", []), {"name": other.name, "license": other.license, "provenance": theirs}]
    return found


def _quoted(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
