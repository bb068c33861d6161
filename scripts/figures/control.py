"""Concepts set, removed and swapped in what a pipeline draws, in several ways beside each other.

Every edit is measured on captions of figures that it applies to, from the same noise: whether the parts of the concept are as
they should be, and what of the rest is as before. Of latents that are set three amounts are tried, and the one that does best
by the truth is shown: this favours them, as nothing else chooses their amounts. Levers have theirs from captions alone.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from figures import measures, world
from figures.measures import Change
from figures.prompts import LEVERS, pairs
from steerlib import Ablate, ConceptBank, Set, steer
from steerlib.evaluation.pictures import Pictures, draw_as_told, edit_of, sheet
from steerlib.evaluation.report import markdown
from steerlib.hosts import host_for
from steerlib.passes import StepState
from steerlib.steering.recording import Replace, conditional, replacing
from steerlib.training.discover.concept_graph import randomised

LEVELS = ("899", "500", "100")
BARS = {"effect": 0.9, "preservation": 0.95}
AMOUNTS = (1.0, 2.0, 4.0)
"""Of a latent that is set, in units: its usual reading where it fires, and more."""
PROMPT, LEVER, RANDOM, ONE = "the prompt rewritten", "lever from captions", "random direction", "one latent"
ALL, GRAPH = "its latents of all levels", "one latent and its parts by the graph"
ALL_BLOCKS, OWN_BLOCK = "replaced in all blocks", "replaced in the encoders' block"
ALONG = {f"replaced along {rank} direction{'s' * (rank > 1)} of the concept": rank for rank in (1, 4, 16)}
FEW = 4
DEALT = f"replaced along {FEW} directions of another concept"
STRETCHES = {"899 alone": ("899",), "500 alone": ("500",), "100 alone": ("100",), "500 and 100": ("500", "100")}
"""Noise levels in whose stretches of generation something is replaced along 16 directions, and nothing in the others."""
WAYS = (PROMPT, ALL_BLOCKS, *ALONG, DEALT, OWN_BLOCK, LEVER, RANDOM, ONE, ALL, GRAPH)
TAUGHT = 32
"""Pairs of captions that a concept's directions are learned from."""
OTHERS = {"cat": "bee", "panda": "robot", "hood": "helmet", "grin": "jaw", "round ears": "antennae", "beak": "smile"}
"""What some concepts are swapped for."""
PURPOSE = 75
"""Keeps these captions apart from others."""
STEPS = 10


class Given(NamedTuple):
    """What edits are measured with."""

    pipe: Any
    bank: ConceptBank
    """Latents, with their graph."""
    levers: ConceptBank
    named: Mapping[str, Sequence[str]]
    """By concept its latents, that of its own level first."""
    cases: int


def changes() -> Iterator[Change]:
    """Every concept of `LEVERS` is set and removed, some are swapped for others that have a lever."""
    for concept in LEVERS:
        yield Change("set", concept)
        yield Change("remove", concept)
    yield from (Change("swap", concept, other) for concept, other in OTHERS.items() if other in LEVERS)


def asked(change: Change, n: int) -> world.Factors:
    """Figures that a change applies to."""
    own = (0, PURPOSE, world.CONCEPTS.index(change.concept), ("set", "remove", "swap").index(change.kind))
    drawn = world.sample(60 * n, seed=own)
    shown = np.any([drawn[slot] > 0 for slot in change.slots], 0)
    rows = (change.applies(drawn) & shown).nonzero()[0][:n]
    return {name: values[rows] for name, values in drawn.items()}


def edits(given: Given, change: Change, way: str) -> list[Mapping[str, Any]]:
    """The edits of a way, one for each amount that it has."""
    if way in (LEVER, RANDOM):
        return [{name: _lever(given.levers, name, there) for name, there in change.do.items()}]
    found = []
    for amount in AMOUNTS if any(change.do.values()) else AMOUNTS[:1]:
        own = {}
        for name, there in change.do.items():
            own |= {latent: Set(amount) if there else Ablate() for latent in latents(given, name, way)}
        found.append(own)
    return found


def _lever(bank: ConceptBank, name: str, there: bool) -> Any:
    """How a lever is set, or removed, at the amount that was chosen without the truth."""
    told = bank[name].effects
    return edit_of(told["edit"], told["amount"]) if there else edit_of(told["removal"], told["removal_amount"])


def latents(given: Given, concept: str, way: str) -> list[str]:
    """The latents that a way moves."""
    own, *others = given.named[concept]
    if way == ALL:
        return [own, *others]
    if way == GRAPH:
        graph = given.bank.graph
        return [own] if graph is None else [own, *_parts(graph.edges, own)]
    return [own]


def _parts(edges: Sequence[Any], whole: str) -> list[str]:
    """All that a latent is made of, and what that is made of."""
    own = [edge.src for edge in edges if edge.relation == "selection" and edge.dst == whole]
    return [*dict.fromkeys([*own, *(part for each in own for part in _parts(edges, each))])]


def drawn(given: Given, captions: list[str], bank: ConceptBank | None, do: Mapping[str, Any]) -> Pictures:
    """Pictures from the same noise, steered if there is a bank."""
    with catch_warnings():
        simplefilter("ignore")  # amounts go beyond safe ranges on purpose
        with nullcontext() if bank is None else steer(given.pipe, bank, do, branch="cond", allow_ood=True):
            return draw_as_told(given.pipe, captions, steps=STEPS)


Put = Callable[[Tensor, Tensor, str, StepState], Tensor]
"""Of what a block adds for some captions and for others, and its site: what is to be added for the first."""


def beside(given: Given, captions: Sequence[str], due: Sequence[str], sites: Iterable[str], put: Put) -> Pictures:
    """Pictures of captions, of which blocks know in every pass what they would add there for other captions."""
    n = len(captions)

    def changed(site: str) -> Replace:
        def change(x: Tensor, state: StepState) -> Tensor:
            out = x.clone()
            half = conditional(out, state)
            assert half is not None
            half[:n] = put(half[:n], half[n:], site, state)
            return out

        return change

    def alike(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Pictures of the other captions are those of the first, up to here."""
        halves = [torch.cat([half[:n], half[:n]]) for half in args[0].chunk(2)]
        return (torch.cat(halves), *args[1:]), kwargs

    handle = given.pipe.unet.register_forward_pre_hook(alike, with_kwargs=True)
    try:
        with replacing(given.pipe, {site: changed(site) for site in sites}):
            return draw_as_told(given.pipe, [*captions, *due], steps=STEPS, batch=2 * n)[:n]
    finally:
        handle.remove()


def blocks(given: Given) -> list[str]:
    """Sites of what cross-attention adds."""
    return [name for name in host_for(given.pipe).sites() if re.fullmatch(r"unet\..*attentions\.\d+\.update", name)]


def replaced(given: Given, captions: list[str], due: list[str], way: str) -> Pictures:
    """Blocks add what they would add for the other captions."""
    own = {site.removesuffix(".mean") for site in given.bank.sites}
    return beside(given, captions, due, own if way == OWN_BLOCK else blocks(given), lambda _, other, *__: other)


def _span(given: Given, state: StepState) -> str:
    """The noise level in whose stretch a pass is."""
    assert state.progress is not None
    ends = {level: window.numbers()[:2] for level, window in given.bank.levels.items()}
    return next(level for level, (start, stop) in ends.items() if start <= float(state.progress) < stop)


def directions(given: Given, concept: str) -> dict[str, Float[Tensor, "rank C"]]:
    """By block and noise level, the directions in which what it adds differs most between captions that show a concept and the
    same ones without, at the same picture: principal directions of the differences of all tokens, the largest first."""
    moments: dict[str, Tensor] = {}

    def learn(x: Tensor, other: Tensor, site: str, state: StepState) -> Tensor:
        off = (other - x).flatten(0, 1).float()
        key = f"{site}@{_span(given, state)}"
        moments[key] = moments.get(key, 0.0) + off.T @ off
        return x

    taught = pairs(concept, TAUGHT)
    for start in range(0, TAUGHT, given.cases):
        shown, without = zip(*taught[start : start + given.cases], strict=True)
        beside(given, without, shown, blocks(given), learn)
    return {key: torch.linalg.eigh(own).eigenvectors.flip(1).T[: max(ALONG.values())] for key, own in moments.items()}


def along(
    given: Given,
    captions: list[str],
    due: list[str],
    rows: Sequence[Mapping[str, Tensor]],
    rank: int,
    levels: Collection[str] = LEVELS,
) -> Pictures:
    """Blocks add what they would add for the other captions along a few directions of concepts, and what they do elsewhere."""

    def put(x: Tensor, other: Tensor, site: str, state: StepState) -> Tensor:
        level = _span(given, state)
        if level not in levels:
            return x
        basis = torch.linalg.qr(torch.cat([own[f"{site}@{level}"][:rank] for own in rows]).T).Q.to(x.dtype)
        return x + (other - x) @ basis @ basis.T

    return beside(given, captions, due, blocks(given), put)


def measured_along(given: Given, change: Change, rows: Callable[[str], Mapping[str, Tensor]]) -> dict[str, Any]:
    """What replacing along directions of its concepts did, and along those of others: the next ones of `LEVERS`."""
    captions, due = said(change, given.cases)
    before = drawn(given, captions, None, {})
    others = [LEVERS[(LEVERS.index(name) + len(LEVERS) // 2) % len(LEVERS)] for name in change.do]
    own, most = [rows(name) for name in change.do], max(ALONG.values())
    draw = partial(along, given, captions, due)
    found = {way: draw(own, rank) for way, rank in ALONG.items()}
    found |= {DEALT: draw([rows(name) for name in others], FEW)}
    found |= {way: draw(own, most, levels) for way, levels in STRETCHES.items()}
    return {way: _one(change, before, pictures) for way, pictures in found.items()}


def said(change: Change, n: int) -> tuple[list[str], list[str]]:
    """Captions of figures that a change applies to, and of what they are to become."""
    factors, seed = asked(change, n), (0, PURPOSE, world.CONCEPTS.index(change.concept))
    was, due = (world.captions(each, seed=seed) for each in (factors, world.edited(factors, change.do)))
    return was, due


def measured(given: Given, change: Change) -> dict[str, Any]:
    """What every way of a change did."""
    captions, due = said(change, given.cases)
    before = drawn(given, captions, None, {})
    random = given.levers
    for name in change.do:
        random = randomised(random, random[name], seed=0)
    banks, found = {PROMPT: None, LEVER: given.levers, RANDOM: random}, {}
    for way in [way for way in WAYS if way != DEALT and way not in ALONG]:
        if way in (ALL_BLOCKS, OWN_BLOCK):
            pictures = [replaced(given, captions, due, way)]
        else:
            own, tried = (due, [{}]) if way == PROMPT else (captions, edits(given, change, way))
            pictures = [drawn(given, own, banks.get(way, given.bank), do) for do in tried]
        rows = [_one(change, before, own) for own in pictures]
        best = max(range(len(rows)), key=lambda k: (rows[k]["effect"] or 0.0) + (rows[k]["preservation"] or 0.0))
        found[way] = rows[best] | {"setting": best}
    found |= {f"{LEVER}, {level} alone": own for level, own in _windows(given, change, captions, before)}
    return {"change": change.kind, "concept": change.concept, "other": change.other, "ways": found}


def _windows(given: Given, change: Change, captions: list[str], before: Pictures) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the lever does at each noise level alone; nothing of one that changes what the text encoder reads."""
    (do,) = edits(given, change, LEVER)
    if any("@" not in place.encoder for name in do for place in given.levers[name].places):
        return
    for level, span in given.levers.levels.items():
        own = {name: replace(edit, when=span) for name, edit in do.items()}
        yield level, _one(change, before, drawn(given, captions, given.levers, own))


def _one(change: Change, before: Pictures, after: Pictures) -> dict[str, Any]:
    told = measures.effect(change, before, after)._asdict()
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in told.items()}


def shown(
    given: Given, rows: Sequence[Mapping[str, Any]], taught: Callable[[str], Mapping[str, Tensor]], count: int = 8
) -> Any:
    """A sheet of the first picture of some edits that set a concept, by every way at the setting that is in the table. `taught`
    gives the directions of a concept."""
    cells: dict[str, dict[str, Pictures]] = {}
    for row in [row for row in rows if row["change"] == "set"][:count]:
        change = Change("set", row["concept"])
        captions, due = (each[:1] for each in said(change, given.cases))
        cells[f"set {change.concept}"] = own = {"plain": drawn(given, captions, None, {})[0]}
        own[PROMPT] = drawn(given, due, None, {})[0]
        own[ALL_BLOCKS] = replaced(given, captions, due, ALL_BLOCKS)[0]
        for way, rank in ALONG.items():
            own[way] = along(given, captions, due, [taught(change.concept)], rank)[0]
        for way, bank in ((LEVER, given.levers), (ONE, given.bank), (ALL, given.bank), (GRAPH, given.bank)):
            own[way] = drawn(given, captions, bank, edits(given, change, way)[row["ways"][way]["setting"]])[0]
    return sheet(cells)


# -- tables ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every way: how many edits reach both bars, and means, over all that could be measured."""
    lines = []
    for way in WAYS:
        own = [row["ways"][way] for row in rows if row["ways"][way]["effect"] is not None]
        both = sum(_holds(one) for one in own)
        means = [float(np.mean([one[name] for one in own])) for name in BARS]
        lines.append([way, f"{both} of {len(own)}", *(f"{mean:.2f}" for mean in means)])
    return markdown("way | reach both bars | effect | preservation", lines)


def _holds(one: Mapping[str, Any]) -> bool:
    return all((one[name] or 0.0) >= BARS[name] for name in ("effect", "preservation"))


def windows(rows: Sequence[Mapping[str, Any]]) -> str:
    """What levers that set a concept do at one noise level alone, by the level of the concept: effect and preservation."""
    own = [row for row in rows if row["change"] == "set"]
    ways = [way for way in dict.fromkeys(way for row in own for way in row["ways"]) if way.startswith(LEVER)]
    lines = []
    for level, names in world.LEVELS.items():
        some = [row["ways"] for row in own if row["concept"] in names and {*ways} <= {*row["ways"]}]
        means = [[np.mean([one[way][name] or 0.0 for one in some]) for name in BARS] for way in ways if some]
        lines.append([f"{level} ({len(some)})", *(f"{a:.2f}, {b:.2f}" for a, b in means), *["–"] * (0 if some else len(ways))])
    return markdown("concepts | " + " | ".join(way.removeprefix(f"{LEVER}, ") for way in ways), lines)


def stretches(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is replaced along 16 directions in the stretch of a noise level alone, by what is done to which concepts: effect and
    preservation, and how many edits reach both bars."""
    whole = list(ALONG)[-1]
    lines = []
    for kind, (level, names) in product(("set", "remove", "swap"), world.LEVELS.items()):
        some = [row["ways"] for row in rows if row["change"] == kind and row["concept"] in names]
        cells = [[ways[way] for ways in some if ways[way]["effect"] is not None] for way in (whole, *STRETCHES)]
        if some:
            lines.append([f"{kind} {level} ({len(some)})", *map(_means, cells)])
    return markdown(f"edits | all of it | {' | '.join(STRETCHES)}", lines)


def _means(own: Sequence[Mapping[str, Any]]) -> str:
    effect, kept = (np.mean([one[name] or 0.0 for one in own]) for name in ("effect", "preservation"))
    return f"{effect:.2f}, {kept:.2f} ({sum(map(_holds, own))})"


def each(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every edit by every way: effect and preservation."""
    say = lambda one: "–" if one["effect"] is None else f"{one['effect']:.2f}, {one['preservation']:.2f}"  # noqa: E731
    lines = [
        [f"{row['change']} {row['concept']}" + f" → {row['other']}" * bool(row["other"]), *(say(row["ways"][w]) for w in WAYS)]
        for row in rows
    ]
    return markdown("edit | " + " | ".join(WAYS), lines)
