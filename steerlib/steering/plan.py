"""From names to a plan: all that can be known about edits, and refused, before the first pass."""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept, Gate
from ..encoders import Encoder
from ..errors import BadEdit, ConflictingEdits, OtherWeights, OutOfRange, Unanswerable
from ..hosts import Host
from ..passes import Branch
from ..schedules import Within
from ..sites import Site
from .edit import Edit, Kept, Key, Reading, Table
from .interventions import Ablate, Add, Clamp, Intervention, Patch, Rule, Set
from .masks import Word
from .program import Program

Edits = Mapping[str, float | Sequence[float] | Intervention]
Do = Literal["model", "hold", "graph"]
SHARE = 0.35
"""Longest change at a site, as a share of its activations' median length."""


class Options(NamedTuple):
    """How edits are carried out."""

    branch: Literal["both"] | Branch = "both"
    do: Do = "model"
    hold: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    allow_ood: bool = False
    exact: bool = True


@dataclass(eq=False)
class Plan:
    """Edits resolved against one bank and one model, by site."""

    sites: tuple[Site, ...]
    edits: dict[str, tuple[Edit, ...]]
    readings: dict[str, tuple[Reading | Kept, ...]]
    caps: dict[str, float]
    programs: dict[str, Program]
    holds: bool
    warnings: tuple[tuple[str, type[Warning]], ...]


@torch.inference_mode(False)  # plans are kept, and may be used with gradients later
def resolve(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """Everything that can be known, and refused, before the first pass."""
    _check_options(bank, options)
    notices = [(notice, OtherWeights)] if (notice := bank.check(host)) else []
    wanted = {name: _intervention(name, value) for name, value in edits.items()}
    chosen = {name: bank[name] for name in wanted}
    if len({concept.id for concept in chosen.values()}) < len(chosen):
        raise ConflictingEdits(f"one concept is named twice among {', '.join(map(repr, chosen))}")
    scope = object()
    made = [
        _edit(bank, host, place, wanted[name], options, scope, len({*map(bank.window_of, concept.places)}) > 1)
        for name, concept in chosen.items()
        for place in concept.places
    ]
    for edit in made:
        notices += [(text, OutOfRange) for text in _beyond(edit, options)]
    held = _held(bank, host, chosen.values(), options)
    made = [_beside(edit, held) for edit in made] + held
    made += _forecasts(bank, host, made, options, scope)
    by_site: dict[str, list[Edit]] = {}
    for edit in made:
        by_site.setdefault(bank.site_of(edit.concept), []).append(edit)
    readings = _readings(bank, made, options)
    names = [*by_site, *(name for name in readings if name not in by_site)]
    caps = {name: _cap(bank, name, options) for name in names}
    plan = Plan(
        sites=tuple(host.site(name) for name in names),
        edits={name: tuple(by_site.get(name, ())) for name in names},
        readings={name: tuple(readings.get(name, ())) for name in names},
        caps=caps,
        programs={},
        holds=options.do == "hold",
        warnings=(),
    )
    _check_order(bank, host, made)
    for name in names:
        notices += [(text, OutOfRange) for text in _too_long(name, plan.edits[name], caps[name])]
        plan.programs[name] = Program(plan.edits[name], plan.readings[name], caps[name])
    plan.warnings = tuple(notices)
    return plan


def _check_options(bank: ConceptBank, options: Options) -> None:
    if options.branch not in ("both", "cond", "uncond"):
        raise BadEdit(f"expected branch 'both', 'cond' or 'uncond', got {options.branch!r}")
    if options.do not in ("model", "hold", "graph"):
        raise BadEdit(f"expected do 'model', 'hold' or 'graph', got {options.do!r}")
    if (options.hold or options.free) and options.do != "hold":
        raise BadEdit(f"hold= and free= belong to do='hold', got do={options.do!r}")
    for name in (*options.hold, *options.free):
        bank[name]


def _intervention(name: str, value: Any) -> Intervention:
    if isinstance(value, Intervention):
        return value
    try:
        return Add(value)
    except (TypeError, ValueError) as error:
        raise BadEdit(f"expected a number, one per row, or an intervention for {name!r}, got {value!r}: {error}") from None


def _key(bank: ConceptBank, concept: Concept) -> Key:
    return id(bank), concept.id


def _edit(
    bank: ConceptBank,
    host: Host,
    concept: Concept,
    intervention: Intervention,
    options: Options,
    scope: object,
    has_levels: bool = False,
) -> Edit:
    """`has_levels`: whether the concept is moved at several noise levels, each in its own window."""
    if (window := bank.window_of(concept)) is not None and (intervention.when is None or has_levels):
        intervention = replace(intervention, when=Within(intervention.when, window) if intervention.when else window)
    when = intervention.when
    if when is not None and when.clock == "progress" and not host.has_progress:
        raise Unanswerable(
            f"{concept.name!r}: text has no progress to open a {type(when).__name__} on, because nobody knows how long "
            "it will get; use Steps, which counts new tokens"
        )
    replays = _replays(bank, concept, intervention) if isinstance(intervention, Patch) else ""
    swaps = bool(replays) and replays != concept.name
    if replays and not swaps and concept.parts:
        raise Unanswerable(f"a tape holds one reading of {concept.name!r}, which moves at {len(concept.places)} sites; use Set")
    branch: Any = intervention.branch or options.branch
    return Edit(
        **_read(bank, concept, options),
        concept=concept,
        rule=Rule() if swaps else _natural(bank, concept, intervention, options),
        intervention=intervention,
        branch=None if branch == "both" else branch,
        gates=_gates(bank, concept, intervention),
        norm=_matched_norm(bank, concept, intervention),
        scope=scope if options.do == "graph" else None,
        keeps_norm=isinstance(intervention, Add) and intervention.keep_norm,
        replays=replays,
        swaps=swaps,
    )


def _replays(bank: ConceptBank, concept: Concept, patch: Patch) -> str:
    """Under which name the tape holds what is to be replayed."""
    site = bank.site_of(concept)
    if found := next((name for name in (concept.name, site) if name in patch.tape), ""):
        return found
    raise BadEdit(
        f"the tape does not hold {concept.name!r}; record it with sl.record(model, bank, [{concept.name!r}]), or its site with "
        f"sl.record(model, [{site!r}]) to replace whole activations"
    )


def _read(bank: ConceptBank, concept: Concept, options: Options) -> dict[str, Any]:
    """How an edit learns what its concept reads: from its own rows, from all latents that compete, or from an earlier site."""
    key, rows = _key(bank, concept), bank.rows(concept)
    if bank.read_at(concept) == bank.site_of(concept):
        return {"key": key, "rows": rows, "crowd": _crowd(bank, concept, options)}
    away = rows._replace(read=torch.zeros_like(rows.write), bias=torch.zeros(1), norm="")
    return {"key": key, "rows": away, "heard": ("reading", key)}


def _crowd(bank: ConceptBank, concept: Concept, options: Options) -> Encoder | None:
    """All latents that a concept competes with, unless its calibrated threshold is to decide."""
    if not bank.competes(concept):
        return None
    if options.exact:
        return bank.encoder(concept.encoder)
    if "threshold" not in bank.encoders[concept.encoder].settings:
        raise BadEdit(
            f"{concept.name!r} is one of the largest latents of a token or silent, and bank {bank.name!r} has no threshold by "
            "which to tell without the others; leave out exact=False, or calibrate the encoder"
        )
    return None


def _gates(bank: ConceptBank, concept: Concept, intervention: Intervention) -> tuple[Gate, ...]:
    """The gate stored with the concept, which is a part of it, and the edit's own; "open" lifts the stored one."""
    given = intervention.gate
    return tuple(_bounded(bank, gate) for gate in (None if given == "open" else concept.gate, given) if isinstance(gate, Gate))


def gate_at(bank: ConceptBank, gate: Gate, moved: Concept) -> Concept:
    """Where a gate is read for an edit: at the very place of the edit, if its concept has a part there."""
    concept = bank[gate.concept]
    return next(
        (place for place in concept.places if place.encoder.partition("#")[0] == moved.encoder.partition("#")[0]), concept
    )


def _bounded(bank: ConceptBank, gate: Gate) -> Gate:
    """The gate, with the bank's threshold where it names none."""
    if gate.is_bounded:
        return gate
    if (present := bank[gate.concept].present) is None:
        raise BadEdit(
            f"bank {bank.name!r} does not know from which reading on {gate.concept!r} is present; give the gate a bound: "
            f"Gate({gate.concept!r}, above=1.0)"
        )
    return replace(gate, above=present)


def _matched_norm(bank: ConceptBank, concept: Concept, intervention: Intervention) -> float | None:
    """The length that a token's own is compared with, for additions that ask for it."""
    if not isinstance(intervention, Add) or not (intervention.match_norm or concept.match_norm):
        return None
    site = bank.site_of(concept)
    if (norm := bank.sites[site].norm) is None:
        raise BadEdit(f"match_norm needs to know how long activations are at {site!r}, which bank {bank.name!r} does not say")
    return norm


def _natural(bank: ConceptBank, concept: Concept, intervention: Intervention, options: Options) -> Rule:
    """The rule in raw coordinates; what it forces a concept to read is kept within the natural values, as many units of a
    part as of the concept itself."""
    rule, whole = intervention.rule(concept.unit), bank[concept.name]
    if options.allow_ood or whole.natural is None or not isinstance(intervention, (Set, Clamp)):
        return rule
    low, high = (end * (concept.unit / whole.unit) for end in whole.natural)
    if isinstance(intervention, Set):
        return rule._replace(low=_within(rule.low, low, high), high=_within(rule.high, low, high))
    return rule._replace(low=_within(rule.low, -inf, high), high=_within(rule.high, low, inf))


def _within(amount: Any, low: float, high: float) -> Any:
    return tuple(min(max(a, low), high) for a in amount) if isinstance(amount, tuple) else min(max(amount, low), high)


def _beyond(edit: Edit, options: Options) -> Iterator[str]:
    """What to say of an amount outside the measured range, and of a value outside the natural ones."""
    concept, intervention = edit.concept, edit.intervention
    if concept.natural is not None and not options.allow_ood and intervention.rule(concept.unit) != edit.rule:
        low, high = (end / concept.unit for end in concept.natural)
        yield f"{concept.name!r} is capped at its natural values, {low:+.2f} to {high:+.2f} units; allow_ood=True goes beyond"
    if concept.range is None or not isinstance(intervention, Add) or intervention.unit != "concept":
        return
    given: Any = intervention.amount
    amounts = given if isinstance(given, tuple) else (given,)
    low, high = concept.range
    if min(amounts) < low or max(amounts) > high:
        seen = concept.beyond or "nothing was measured there"
        yield f"{concept.name!r} was measured to be safe from {low:+.2f} to {high:+.2f}, got {given}; beyond: {seen}"


def _cap(bank: ConceptBank, site: str, options: Options) -> float:
    norm = bank.sites[site].norm if site in bank.sites else None  # masks ask sites of their own
    return inf if options.allow_ood or norm is None else SHARE * norm


def _too_long(site: str, edits: Sequence[Edit], cap: float) -> Iterator[str]:
    """What to say where the additions of a site are longer than the site allows."""
    adds = [edit for edit in edits if not edit.is_target and edit.rule.shift != 0]
    if cap == inf or not adds:
        return
    table = Table.of(adds)
    longest = float((table.shift @ table.write).detach().norm(dim=-1).max())
    if longest > cap * 1.0001:
        names = ", ".join(dict.fromkeys(repr(edit.concept.name) for edit in adds))
        yield (
            f"{names}: a change of length {longest:.1f} at {site!r} is capped at {cap:.1f}, {SHARE:.0%} of what "
            "activations there measure; allow_ood=True goes beyond"
        )


def _held(bank: ConceptBank, host: Host, chosen: Iterable[Concept], options: Options) -> list[Edit]:
    """Concepts that keep the reading of an unsteered twin."""
    if options.do != "hold":
        return []
    edited = {concept.name for concept in chosen}
    follow = [child for name in edited for child in bank.graph.descendants(name)]
    free = {bank[name].name for name in options.free}
    names = dict.fromkeys([*follow, *(bank[name].name for name in options.hold)])
    concepts = [place for name in names if name not in edited | free for place in bank[name].places]
    for concept in concepts:
        host.site(bank.site_of(concept))
        if bank.read_at(concept) != bank.site_of(concept):
            raise Unanswerable(f"do='hold' cannot hold {concept.name!r}, which is read at an earlier site than it is moved")
    held: list[Edit] = []
    for concept in concepts:
        intervention = Ablate(when=bank.window_of(concept))
        edit = Edit(
            **_read(bank, concept, options),
            concept=concept,
            rule=Rule(),
            intervention=intervention,
            gates=_gates(bank, concept, intervention),
            held=True,
        )
        rows = [e.rows.read[0] for e in held if (e.concept.encoder, e.gates) == (concept.encoder, edit.gates)]
        if edit.rows.is_sparse or int(torch.linalg.matrix_rank(torch.stack([*rows, edit.rows.read[0]]))) > len(rows):
            held.append(edit)  # else others hold it, whose directions its own is made of
    return held


def _beside(edit: Edit, held: Sequence[Edit]) -> Edit:
    """An edit that is not written where concepts that it would move are held, if they have a place that it does not share:
    one coordinate there does not know all that an edit writes."""
    concerned = [other for other in held if other.concept.encoder == edit.concept.encoder]
    own = {gate.concept for gate in edit.gates}
    return replace(edit, shut=tuple(dict.fromkeys(g for other in concerned for g in other.gates if g.concept not in own)))


def _forecasts(bank: ConceptBank, host: Host, made: Sequence[Edit], options: Options, scope: object) -> list[Edit]:
    """Edits that carry the graph's forecast to later sites; a set concept is cut from its parents."""
    if options.do != "graph":
        return []
    moving = {edit.concept.name for edit in made}
    fixed = {edit.concept.name for edit in made if edit.is_target}
    reached = dict.fromkeys(child for name in sorted(moving) for child in bank.graph.descendants(name))
    new = []
    for name in reached:
        parents = {p: w for p, w in bank.graph.parents(name).items() if p in moving or p in reached}
        if name in fixed or not parents:
            continue
        for child in bank[name].places:
            for parent in parents:
                cause, effect = (host.site(bank.site_of(concept)) for concept in (bank[parent], child))
                if host.order(cause) >= host.order(effect) or host.clocks(cause) != host.clocks(effect):
                    raise Unanswerable(f"do='graph' needs {name!r} at a later site of the same stack than its cause {parent!r}")
            new.append(
                Edit(
                    **_read(bank, child, options),
                    concept=child,
                    rule=Rule(),
                    intervention=Add(0.0),
                    forecast={(scope, _key(bank, bank[p])): w * child.unit / bank[p].unit for p, w in parents.items()},
                    scope=scope,
                )
            )
    return new


def _readings(bank: ConceptBank, made: Sequence[Edit], options: Options) -> dict[str, list[Reading | Kept]]:
    """What gates, masks and edits have to know, by the site at which it is read."""
    found: dict[str, list[Reading | Kept]] = {}
    words = dict.fromkeys(edit.intervention.mask for edit in made if isinstance(edit.intervention.mask, Word))
    for site in dict.fromkeys(site for word in words for site in word.asked):
        found[site] = [Kept(("kept", site))]
    for edit in made:
        asked: list[tuple[Key, Concept, float]] = [
            (("gate", edit.key, gate), place := gate_at(bank, gate, edit.concept), place.unit)
            for gate in (*edit.gates, *edit.shut)
        ]
        if edit.heard is not None:
            asked.append((edit.heard, edit.concept, 1.0))
        for key, concept, unit in asked:
            reading = Reading(key, bank.rows(concept), unit, _crowd(bank, concept, options), concept.index)
            found.setdefault(bank.read_at(concept), []).append(reading)
    return found


def _check_order(bank: ConceptBank, host: Host, made: Sequence[Edit]) -> None:
    for edit in made:
        read, moved = (host.site(name) for name in (bank.read_at(edit.concept), bank.site_of(edit.concept)))
        if edit.heard is not None and (host.order(read) >= host.order(moved) or host.clocks(read) != host.clocks(moved)):
            raise Unanswerable(
                f"{edit.concept.name!r} is read at {read.name!r}, which is not before {moved.name!r}, where it acts"
            )
        if edit.intervention.mask is not None and moved.reads_text:
            raise Unanswerable(
                f"the mask of {edit.concept.name!r} is a part of an image, and the tokens of {moved.name!r} are the prompt's; "
                "mask at a site of image tokens"
            )
        if isinstance(word := edit.intervention.mask, Word):
            asked = host.site(word.asked[1])
            if host.order(asked) >= host.order(moved) or host.clocks(asked) != host.clocks(moved):
                raise Unanswerable(
                    f"the mask of {edit.concept.name!r} asks {word.at!r}, which is not before {moved.name!r}; name "
                    "an attention of an earlier block"
                )
        for gate in (*edit.gates, *edit.shut):
            read = host.site(bank.read_at(gate_at(bank, gate, edit.concept)))
            if host.order(read) > host.order(moved) or host.clocks(read) != host.clocks(moved):
                raise Unanswerable(
                    f"the gate on {gate.concept!r} is read at {read.name!r}, after {edit.concept.name!r} is edited at "
                    f"{moved.name!r}; gate with a concept of an earlier site"
                )


_PLANS: WeakKeyDictionary[nn.Module, OrderedDict[Any, tuple[ref[ConceptBank], Plan]]] = WeakKeyDictionary()
KEPT_PLANS = 64


def plan_for(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """The plan for these edits, remembered for the next time they are asked for; its warnings are given every time."""
    plan = _known_plan(bank, host, edits, options)
    for text, kind in plan.warnings:
        warnings.warn(text, kind, stacklevel=4)
    return plan


def _known_plan(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    if any(isinstance(i, Intervention) and (i.mask is not None or isinstance(i, Patch)) for i in edits.values()):
        return resolve(bank, host, edits, options)  # tensors are not compared
    known = _PLANS.setdefault(host.model, OrderedDict())
    try:
        key = (id(bank), tuple(edits.items()), options)
        owner, plan = known.get(key, (None, None))
    except TypeError:  # an amount that cannot be hashed, such as a list
        return resolve(bank, host, edits, options)
    if plan is None or owner is None or owner() is not bank:
        plan = resolve(bank, host, edits, options)
        known[key] = ref(bank), plan
        if len(known) > KEPT_PLANS:
            known.popitem(last=False)
    return plan
