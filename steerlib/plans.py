"""From names to a plan: all that can be known about edits, and refused, before the first pass."""

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from .bank import ConceptBank
from .concepts import Concept
from .edits import Edit, Key, Program, Reading, Table
from .errors import BadEdit, ConflictingEdits, OtherWeights, OutOfRange, Unanswerable
from .hosts import Host
from .interventions import Ablate, Add, Clamp, Intervention, Patch, Rule, Set
from .schedules import Branch
from .sites import Site

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


@dataclass(eq=False)
class Plan:
    """Edits resolved against one bank and one model, by site."""

    sites: tuple[Site, ...]
    edits: dict[str, tuple[Edit, ...]]
    readings: dict[str, tuple[Reading, ...]]
    caps: dict[str, float]
    programs: dict[str, Program]
    holds: bool


def resolve(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """Everything that can be known, and refused, before the first pass."""
    _check_options(bank, options)
    if notice := bank.check(host):
        warnings.warn(notice, OtherWeights, stacklevel=4)
    wanted = {name: _intervention(name, value) for name, value in edits.items()}
    chosen = {name: bank[name] for name in wanted}
    if len({concept.id for concept in chosen.values()}) < len(chosen):
        raise ConflictingEdits(f"one concept is named twice among {', '.join(map(repr, chosen))}")
    made = [_edit(bank, host, chosen[name], wanted[name], options) for name in wanted]
    made += _held(bank, host, chosen.values(), options)
    made += _forecasts(bank, host, made, options)
    by_site: dict[str, list[Edit]] = {}
    for edit in made:
        by_site.setdefault(bank.site_of(edit.concept), []).append(edit)
    readings = _readings(bank, made)
    names = [*by_site, *(name for name in readings if name not in by_site)]
    caps = {name: _cap(bank, name, options) for name in names}
    plan = Plan(
        sites=tuple(host.site(name) for name in names),
        edits={name: tuple(by_site.get(name, ())) for name in names},
        readings={name: tuple(readings.get(name, ())) for name in names},
        caps=caps,
        programs={},
        holds=options.do == "hold",
    )
    _check_gates(bank, host, made)
    for name in names:
        _warn_of_cap(name, plan.edits[name], caps[name])
        plan.programs[name] = Program(plan.edits[name], plan.readings[name], caps[name])
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


def _edit(bank: ConceptBank, host: Host, concept: Concept, intervention: Intervention, options: Options) -> Edit:
    when = intervention.when
    if when is not None and when.clock == "progress" and not host.has_progress:
        raise Unanswerable(
            f"{concept.name!r}: text has no progress to open a {type(when).__name__} on, because nobody knows how long "
            "it will get; use Steps, which counts new tokens"
        )
    if isinstance(intervention, Patch) and concept.name not in intervention.tape:
        raise BadEdit(f"the tape does not hold {concept.name!r}; record it with sl.record(model, bank, [{concept.name!r}])")
    _warn_of_range(concept, intervention)
    branch = intervention.branch or options.branch
    return Edit(
        key=_key(bank, concept),
        concept=concept,
        rows=bank.rows(concept),
        rule=_natural(concept, intervention, options),
        intervention=intervention,
        branch=None if branch == "both" else branch,  # type: ignore[arg-type]
        noted=options.do == "graph",
    )


def _natural(concept: Concept, intervention: Intervention, options: Options) -> Rule:
    """The rule in raw coordinates, a value it asks for capped at the natural ones."""
    rule = intervention.rule(concept.unit)
    if options.allow_ood or concept.natural is None or not isinstance(intervention, (Set, Clamp)):
        return rule
    low, high = concept.natural

    def capped(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(capped, value))
        return value if abs(value) == inf else min(max(value, low), high)

    new = rule._replace(low=capped(rule.low), high=capped(rule.high))
    if new != rule:
        ends = f"{low / concept.unit:+.2f} to {high / concept.unit:+.2f}"
        warnings.warn(
            f"{concept.name!r} is capped at its natural values, {ends} units; pass allow_ood=True to go beyond",
            OutOfRange,
            stacklevel=6,
        )
    return new


def _warn_of_range(concept: Concept, intervention: Intervention) -> None:
    if concept.range is None or not isinstance(intervention, Add) or intervention.unit != "concept":
        return
    given: Any = intervention.amount
    amounts = given if isinstance(given, tuple) else (given,)
    low, high = concept.range
    if min(amounts) < low or max(amounts) > high:
        seen = concept.beyond or "nothing was measured there"
        warnings.warn(
            f"{concept.name!r} was measured to be safe from {low:+.2f} to {high:+.2f}, got {given}; beyond: {seen}",
            OutOfRange,
            stacklevel=6,
        )


def _cap(bank: ConceptBank, site: str, options: Options) -> float:
    norm = bank.sites[site].norm
    return inf if options.allow_ood or norm is None else SHARE * norm


def _warn_of_cap(site: str, edits: Sequence[Edit], cap: float) -> None:
    """One warning where the additions of a site are longer than the site allows."""
    adds = [edit for edit in edits if not edit.is_target and edit.rule.shift != 0]
    if cap == inf or not adds:
        return
    table = Table.of(adds)
    longest = float((table.shift @ table.write).norm(dim=-1).max())
    if longest > cap * 1.0001:
        names = ", ".join(repr(edit.concept.name) for edit in adds)
        warnings.warn(
            f"{names}: a change of length {longest:.1f} at {site!r} is capped at {cap:.1f}, {SHARE:.0%} of what "
            "activations there measure; pass allow_ood=True to go beyond",
            OutOfRange,
            stacklevel=5,
        )


def _held(bank: ConceptBank, host: Host, chosen: Iterable[Concept], options: Options) -> list[Edit]:
    """Concepts that keep the reading of an unsteered twin."""
    if options.do != "hold":
        return []
    edited = {concept.name for concept in chosen}
    follow = [child for name in edited for child in bank.graph.descendants(name)]
    free = {bank[name].name for name in options.free}
    names = dict.fromkeys([*follow, *(bank[name].name for name in options.hold)])
    concepts = [bank[name] for name in names if name not in edited | free]
    for concept in concepts:
        host.site(bank.site_of(concept))
    return [
        Edit(
            key=_key(bank, concept),
            concept=concept,
            rows=bank.rows(concept),
            rule=Rule(),
            intervention=Ablate(),
            held=True,
        )
        for concept in concepts
    ]


def _forecasts(bank: ConceptBank, host: Host, made: Sequence[Edit], options: Options) -> list[Edit]:
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
        child = bank[name]
        for parent in parents:
            if host.order(host.site(bank.site_of(bank[parent]))) >= host.order(host.site(bank.site_of(child))):
                raise Unanswerable(f"do='graph' needs {name!r} at a later site than its cause {parent!r}")
        carried = {_key(bank, bank[p]): w * child.unit / bank[p].unit for p, w in parents.items()}
        key = _key(bank, child)
        new.append(
            Edit(
                key=key,
                concept=child,
                rows=bank.rows(child),
                rule=Rule(),
                intervention=Add(0.0),
                forecast=carried,
                noted=True,
            )
        )
    return new


def _gate_key(edit: Edit) -> Key:
    return "gate", edit.key, edit.intervention.gate


def _readings(bank: ConceptBank, made: Sequence[Edit]) -> dict[str, list[Reading]]:
    """What gates have to know, by the site at which it is read."""
    found: dict[str, list[Reading]] = {}
    for edit in made:
        if (gate := edit.intervention.gate) is not None:
            concept = bank[gate.concept]
            found.setdefault(bank.site_of(concept), []).append(Reading(_gate_key(edit), bank.rows(concept), concept.unit))
    return found


def _check_gates(bank: ConceptBank, host: Host, made: Sequence[Edit]) -> None:
    for edit in made:
        if (gate := edit.intervention.gate) is not None:
            read, moved = (host.site(bank.site_of(c)) for c in (bank[gate.concept], edit.concept))
            if host.order(read) > host.order(moved) or host.clocks(read) != host.clocks(moved):
                raise Unanswerable(
                    f"the gate on {gate.concept!r} is read at {read.name!r}, after {edit.concept.name!r} is edited at "
                    f"{moved.name!r}; gate with a concept of an earlier site"
                )


_PLANS: WeakKeyDictionary[nn.Module, OrderedDict[Any, tuple[ConceptBank, Plan]]] = WeakKeyDictionary()
KEPT_PLANS = 64


def plan_for(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """The plan for these edits, remembered for the next time they are asked for."""
    try:
        key = (id(bank), tuple(edits.items()), options)
        known = _PLANS.setdefault(host.model, OrderedDict())
        if (found := known.get(key)) is not None:
            return found[1]
    except TypeError:  # an amount that cannot be hashed, such as a list
        return resolve(bank, host, edits, options)
    plan = resolve(bank, host, edits, options)
    if not any(i.mask is not None or isinstance(i, Patch) for i in edits.values() if isinstance(i, Intervention)):
        known[key] = bank, plan
        if len(known) > KEPT_PLANS:
            known.popitem(last=False)
    return plan
