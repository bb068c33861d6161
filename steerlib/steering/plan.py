"""From names to a plan: all that can be known about edits, and refused, before the first pass."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..bank import ConceptBank
from ..bank.algebra import leaves
from ..bank.concepts import Concept
from ..errors import (
    BadBank,
    BadEdit,
    ConflictingEdits,
    OtherWeights,
    OutOfRange,
    RowMismatch,
    Unanswerable,
    Unmeasured,
    WrongWidth,
)
from ..hosts import Host
from ..sites import Site
from .edit import Edit, EditTensors
from .interventions import Add, Intervention
from .lowering import SHARE, Lowering, Options, reach
from .lowering import Do as Do
from .program import Program
from .reading import Note
from .sparing import spared

Edits = Mapping[Any, float | Sequence[float] | Intervention]
"""By concept, or by the name of one."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Edits resolved against one bank and one model.

    Attributes:
        sites: every site that is edited, or read for an edit.
        programs: what is done there, by site.
        pins: whether an unsteered twin runs beside every pass.
        notices: warnings, with their kinds.
    """

    sites: tuple[Site, ...]
    programs: Mapping[str, Program]
    pins: bool
    notices: tuple[tuple[str, type[Warning]], ...]

    @property
    def cautions(self) -> tuple[str, ...]:
        """What is cut, or is beyond measured ranges."""
        return tuple(text for text, kind in self.notices if kind is OutOfRange)

    @property
    def edits(self) -> list[Edit]:
        """Those of all sites."""
        return [edit for program in self.programs.values() for edit in program.edits]


@torch.inference_mode(False)  # plans are kept, and may be used with gradients later
@torch.autocast("cpu", enabled=False)
def resolve(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """Everything that can be known, and refused, before the first pass."""
    _check_options(options)
    notices: list[tuple[str, type[Warning]]] = [(notice, OtherWeights)] if (notice := bank.check(host, options.match)) else []
    wanted = {name: _intervention(name, value) for name, value in edits.items()}
    _check_rows(wanted)
    moved = _moved(bank, spared(bank, wanted) if options.do == "spare" else wanted, options)
    lower, scope = Lowering(bank, host, options), object()
    made = []
    for concept, intervention in moved:
        for place in concept.places:
            leaves = (scope, lower.key(place)) if options.do == "graph" else None
            made.append(lower.edit(concept, place, intervention, leaves))
        notices += [(text, OutOfRange) for text in _beyond(concept, intervention, options)]
        notices += [(text, Unmeasured) for text in _combined(concept, options)]
    chosen = [concept for concept, _ in moved]
    pinned = _pinned(lower, chosen) if options.do == "hold" else []
    made = [lower.beside(edit, pinned) for edit in made] + pinned
    if options.do == "graph":
        made += _forecasts(lower, made, scope)
        notices += _compounded(bank, chosen)
    by_site: dict[str, list[Edit]] = {}
    notes: dict[str, list[Note]] = {}
    for edit in made:
        by_site.setdefault(bank.site_of(edit.place), []).append(edit)
    for site, note in (found for edit in made for found in lower.notes(edit)):
        notes.setdefault(site, []).append(note)
    programs = {
        name: Program(own := by_site.get(name, []), notes.get(name, ()), _cap(bank, own, options))
        for name in [*by_site, *notes]
    }
    for edit in made:
        lower.check_order(edit)
    for name in by_site if options.match == "sites" else ():
        if host.width(host.site(name)) not in (None, width := bank.sites[name].width):
            raise WrongWidth(
                f"site {name!r} of this model is not {width} wide, as bank {bank.name!r} has it; see bank.fits(model)"
            )
    notices += [(text, OutOfRange) for name, program in programs.items() for text in _too_long(name, program)]
    return Plan(tuple(host.site(name) for name in programs), programs, options.do == "hold", tuple(notices))


def _check_options(options: Options) -> None:
    if options.match not in ("model", "sites"):
        raise BadEdit(f"expected match 'model' or 'sites', got {options.match!r:.80}")
    if options.branch not in ("both", "cond", "uncond"):
        raise BadEdit(f"expected branch 'both', 'cond' or 'uncond', got {options.branch!r}")
    if options.do not in ("model", "hold", "graph", "spare"):
        raise BadEdit(f"expected do 'model', 'hold', 'graph' or 'spare', got {options.do!r}")
    if (options.hold or options.free) and options.do != "hold":
        raise BadEdit(f"hold= and free= belong to do='hold', got do={options.do!r}")


def _intervention(name: Any, value: Any) -> Intervention:
    if isinstance(value, Intervention):
        return value
    try:
        return Add(value)
    except (TypeError, ValueError) as error:
        said = f"expected a number, one per row, or an intervention for {_called(name)}, got {value!r}: {error}"
        raise BadEdit(said) from None


def _called(name: Any) -> str:
    """A key of edits, as errors call it."""
    return repr(getattr(name, "name", name))


def _moved(bank: ConceptBank, wanted: Mapping[Any, Intervention], options: Options) -> list[tuple[Concept, Intervention]]:
    """What is done to each concept, also to those that an edit moves beside its own."""
    chosen = {name: bank[name] for name in wanted}
    if len({concept.id for concept in chosen.values()}) < len(chosen):
        raise ConflictingEdits(f"one concept is named twice among {', '.join(repr(c.name) for c in chosen.values())}")
    found: dict[str, tuple[Concept, Intervention]] = {}
    for name, concept in chosen.items():
        parts = [(bank[other], part) for other, part in wanted[name].parts(name)]
        if len({other.id for other, _ in parts}) < len(parts):
            raise BadEdit(f"{concept.name!r} cannot take its own place; name another concept")
        for other, part in parts:
            if other.present is not None and other.range is None and not options.allow_ood:
                raise BadEdit(
                    f"{other.name!r} is a gate: it reads where something is present and was never measured as a lever; give it "
                    f"to another edit as gate=sl.Gate({other.name!r}), or move it all the same with allow_ood=True"
                )
            both = found[other.id][1].joined(part) if other.id in found else part
            if both is None:
                raise ConflictingEdits(
                    f"{other.name!r} takes the place of another concept and is edited otherwise in the same call; edits of one "
                    "call swap it under the same when, tokens, unit, branch, gate and mask, or leave it out"
                )
            found[other.id] = other, both
    return [*found.values()]


def _check_rows(wanted: Mapping[Any, Intervention]) -> None:
    """Raise where edits of one call count different numbers of rows: the same prompts cannot have both."""
    counts = {count: name for name, intervention in wanted.items() for count in intervention.rows}
    if len(counts) > 1:
        listing = " and ".join(f"{count} of {_called(name)}" for count, name in sorted(counts.items(), key=lambda one: one[0]))
        raise RowMismatch(f"expected as many amounts as prompts in every edit, got {listing}")


def _beyond(concept: Concept, intervention: Intervention, options: Options) -> Iterator[str]:
    """What to say of an amount outside the measured range, and of a value outside the natural ones."""
    natural = None if options.allow_ood else reach(concept.natural)
    if natural is not None and intervention.is_capped(concept.unit, natural):
        low, high = (end / concept.unit for end in natural)
        yield f"{concept.name!r} is capped at its natural values, {low:+.2f} to {high:+.2f} units; allow_ood=True goes beyond"
    if concept.range is None or not (amounts := intervention.amounts):
        return
    low, high = concept.range
    if min(amounts) < low or max(amounts) > high:
        seen, given = concept.beyond or "nothing was measured there", amounts[0] if len(amounts) == 1 else amounts
        yield f"{concept.name!r} was measured to be safe from {low:+.2f} to {high:+.2f}, got {given}; beyond: {seen}"


def _combined(concept: Concept, options: Options) -> Iterator[str]:
    """What to say of a concept that is made of others; raises where the graph would have to know it."""
    if concept.blend is None:
        return
    if options.do != "model":
        raise Unanswerable(
            f"do={options.do!r} needs what follows {concept.name!r}, and the graph knows nothing of a combination of concepts; "
            "use do='model'"
        )
    if (of := leaves(concept)[0]).range is not None:
        yield f"nothing was measured of {concept.name!r}, whose unit is what is left of one of {of.name!r}: it has no range"


def _cap(bank: ConceptBank, edits: Iterable[Edit], options: Options) -> float:
    """The longest change that some edits together make at their site."""
    norms = [norm for edit in edits if (norm := bank.norm_of(edit.place)) is not None]
    return inf if options.allow_ood else SHARE * min(norms, default=inf)


def _too_long(site: str, program: Program) -> Iterator[str]:
    """What to say where the additions of a site are longer than the site allows."""
    adds = [edit for edit in program.edits if not edit.is_target and edit.aim.rule.shift != 0]
    if program.cap == inf or not adds:
        return
    tensors = EditTensors.of(adds)
    longest = float((tensors.shift @ tensors.write).detach().norm(dim=-1).max())
    if longest > program.cap * 1.0001:
        names = ", ".join(dict.fromkeys(repr(edit.name) for edit in adds))
        yield (
            f"{names}: a change of length {longest:.1f} at {site!r} is capped at {program.cap:.1f}, {SHARE:.0%} of what "
            "activations there measure; allow_ood=True goes beyond"
        )


def _pinned(lower: Lowering, chosen: Iterable[Concept]) -> list[Edit]:
    """Concepts that keep the reading of an unsteered twin."""
    bank, options, edited = lower.bank, lower.options, {concept.name for concept in chosen}
    follow = [child for name in edited for child in bank.graph.followers(name)]
    held = _named(bank, "hold", options.hold, lambda name: name not in edited)
    names = dict.fromkeys([*follow, *held])
    free = _named(bank, "free", options.free, lambda name: name in names and name not in edited)
    found: list[Edit] = []
    for edit in [lower.pinned(bank[n], at) for n in names if n not in edited | {*free} for at in bank[n].places]:
        rows = [e.rows.read[0] for e in found if (e.place.encoder, e.gates) == (edit.place.encoder, edit.gates)]
        if edit.rows.is_sparse or int(torch.linalg.matrix_rank(torch.stack([*rows, edit.rows.read[0]]))) > len(rows):
            found.append(edit)  # else others pin it, whose directions its own is made of
    return found


def _named(bank: ConceptBank, option: str, given: Iterable[str], changes: Callable[[str], bool]) -> list[str]:
    """Concepts by name, or by the factor that they are values of. Each entry has to name one for which the option `changes`
    what happens."""
    found: list[str] = []
    for name in given:
        levels = [concept.name for concept in bank.concepts.values() if concept.factor == name] or [bank[name].name]
        if not any(map(changes, levels)):
            why = {"hold": "it is edited itself", "free": "it does not follow what is edited, so nothing holds it"}[option]
            raise BadEdit(f"{option}= {name!r} changes nothing: {why}; leave it out (bank.graph.followers lists what follows)")
        found += levels
    return found


def _forecasts(lower: Lowering, made: Sequence[Edit], scope: object) -> list[Edit]:
    """Edits that carry the graph's forecast to later sites; a set concept is cut from its parents."""
    bank, moving = lower.bank, {edit.name for edit in made}
    fixed = {edit.name for edit in made if edit.is_target}
    reached = dict.fromkeys(child for name in sorted(moving) for child in bank.graph.followers(name))
    found = []
    for name in reached:
        parents = {p: w for p, w in bank.graph.parents(name).items() if p in moving or p in reached}
        if name not in fixed and parents:
            found += [lower.forecast(name, place, parents, scope) for place in bank[name].places]
    return found


def _compounded(bank: ConceptBank, chosen: Iterable[Concept]) -> Iterator[tuple[str, type[Warning]]]:
    """What to say of concepts that a forecast reaches over more than one edge."""
    if far := bank.graph.forecast(dict.fromkeys((concept.name for concept in chosen), 1.0)).unmeasured:
        shown = ", ".join(map(repr, far[:3])) + (f" and {len(far) - 3} more" if len(far) > 3 else "")
        yield f"do='graph' moves {shown} over two edges or more; effects along a whole path were not measured", Unmeasured


_PLANS: WeakKeyDictionary[nn.Module, OrderedDict[Any, tuple[ref[ConceptBank], Plan]]] = WeakKeyDictionary()
KEPT_PLANS = 64


def plan_for(bank: ConceptBank, host: Host, edits: Edits, options: Options) -> Plan:
    """The plan for these edits, remembered for the next time they are wanted."""
    if not isinstance(bank, ConceptBank):
        opened = f"; open it first: sl.ConceptBank.from_pretrained({bank!r:.200})" if isinstance(bank, str) else ""
        raise BadBank(f"expected a ConceptBank, got {bank!r:.200}{opened}")
    if not isinstance(edits, Mapping):
        raise BadEdit(f"expected edits as a mapping from concept names, got {type(edits).__name__}")
    plain = all(not isinstance(i, Intervention) or i.is_plain for i in edits.values())
    if not plain or any(isinstance(name, Concept) for name in edits):  # of which two may be equal and of two banks
        return resolve(bank, host, edits, options)
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
