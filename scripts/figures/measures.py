"""How well a bank agrees with figures, whose parts and wholes are known: its nodes, its edges, and what its edits do.

A latent's reading of a picture is its mean over the picture's tokens. A node is the latent that stands for a concept; it is
looked for at the level of the concept, on renders that no encoder saw.

`B` pictures   `n` latents of a level   `C` concepts of a level
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scenes.painting import noised
from torch import Tensor

from figures import reading, world
from steerlib.bank.concept_bank import ConceptBank
from steerlib.evaluation.pictures import Pictures
from steerlib.evaluation.representation import dictionary_match
from steerlib.graph.causal_graph import CausalGraph
from steerlib.training.record.noised import at_levels

CLEAR = 0.6
"""Correlation from which on a concept counts as found."""
BATCH = 50
"""Pictures that are noised together."""
Z = Float[Tensor, "B n"]
Arrow = tuple[str, str]
"""Names of a part and of a whole."""


# -- nodes -------------------------------------------------------------------------------------------------------


def readings(pipe: Any, bank: ConceptBank, shown: world.Figures, *, seed: world.Seed = 0) -> dict[str, Z]:
    """By encoder, its latents' readings of renders with the noise of its level and their captions."""
    said, parts = world.captions(shown.factors, seed=seed), []
    at = {id: id.partition("#")[0].partition("@") for id in bank.encoders}
    levels = sorted({int(level) for _, _, level in at.values()}, reverse=True)
    for start in range(0, len(said), BATCH):
        some = slice(start, start + BATCH)
        run = lambda: noised(pipe, shown.pixels[some], said[some], levels, seed=start)  # noqa: B023, E731
        seen = at_levels(pipe, [*dict.fromkeys(site for site, _, _ in at.values())], levels, run)
        parts.append({id: bank.encoder(id).encode(seen["".join(place)].float()).mean(1) for id, place in at.items()})
    return {id: torch.cat([part[id] for part in parts]) for id in bank.encoders}


class Nodes(NamedTuple):
    """The latent of each concept of a level, one to one, and the correlation of its readings with the concept's presence."""

    concepts: tuple[str, ...]
    latents: tuple[int, ...]
    correlation: Float[Tensor, " C"]

    @property
    def mcc(self) -> float:
        """Mean correlation coefficient."""
        return float(self.correlation.mean())

    @property
    def found(self) -> float:
        """Share of the concepts that have a clear node."""
        return float((self.correlation >= CLEAR).float().mean())


def nodes(z: Z, there: Bool[Tensor, "B C"], concepts: Sequence[str]) -> Nodes:
    """Chosen on every other picture (the assignment with the largest sum of correlations) and measured on the rest.

    A latent that fires where a concept is not is no node of it: its correlation is less than 0.
    """
    chosen = dictionary_match(*(centred(side[::2]).T for side in (there, z)))
    latents = dict(zip(chosen.truths.tolist(), chosen.latents.tolist(), strict=True))
    if len(latents) < len(concepts):
        raise ValueError(f"expected {len(concepts)} latents or more, one for each concept, got {z.shape[1]}")
    own = [latents[k] for k in range(len(concepts))]
    return Nodes((*concepts,), (*own,), correlation(z[1::2, own], there[1::2]))


def centred(x: Tensor) -> Float[Tensor, "B n"]:
    """Columns with their means taken off."""
    return x.double() - x.double().mean(0)


def correlation(a: Tensor, b: Tensor) -> Float[Tensor, " n"]:
    """Pearson's, of each column of one with that of the other; 0 where one never changes."""
    a, b = centred(a), centred(b)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp(min=1e-12)


# -- edges -------------------------------------------------------------------------------------------------------


class EdgeScore(NamedTuple):
    """Arrows between found nodes beside the true ones."""

    precision: float
    recall: float
    f1: float
    direction: float
    """Of the arrows that join what truly belongs together, the share that runs from part to whole; 0 where there is none."""


def below(level: str) -> tuple[str, ...]:
    """What might be taken for a part at a level: its concepts, and what is only seen with them."""
    return world.LEVELS[level] + world.SEEN_WITH


def arrows(graph: CausalGraph, named: Mapping[str, str]) -> set[Arrow]:
    """Edges of relation `selection` between nodes; `named` gives the concept of a latent, of `world.SEEN_WITH` too. Left out
    are those of other latents, of which nobody knows what they stand for, and those that end in a hue or a background."""
    ends = [(named.get(edge.src), named.get(edge.dst)) for edge in graph.edges if edge.relation == "selection"]
    return {(src, dst) for src, dst in ends if src is not None and dst in world.PARENTS}


def edge_score(found: Collection[Arrow]) -> EdgeScore:
    """`P = |E & E*| / |E|`, `R = |E & E*| / |E*|`, `F1 = 2PR / (P + R)`; concepts without a node cost recall."""
    own, true = {*found}, world.edges()
    right, turned = len(own & true), len(own & {(whole, part) for part, whole in true})
    return EdgeScore(
        right / max(len(own), 1), right / len(true), 2 * right / (len(own) + len(true)), right / max(right + turned, 1)
    )


def correlated(z: Mapping[str, Z]) -> set[Arrow]:
    """Control: as many pairs of each two levels as truly belong together, those that correlate most. By level, the readings of
    the nodes of `below`, of the highest level only of its concepts."""
    return {arrow for lower, upper in pairs() for arrow in _best(_likeness(z[lower], z[upper]), lower, upper)}


def dense(z: Mapping[str, Z]) -> set[Arrow]:
    """Control: all pairs in which the reading of the whole rises with that of the part in a linear fit of everything."""
    found: set[Arrow] = set()
    for lower, upper in pairs():
        weight = torch.linalg.lstsq(centred(z[lower]), centred(z[upper])[:, : len(world.LEVELS[upper])]).solution
        found |= {(below(lower)[i], world.LEVELS[upper][j]) for i, j in (weight > 0).nonzero().tolist()}
    return found


def pairs() -> Iterator[tuple[str, str]]:
    """Levels that arrows join, the lower one first."""
    return ((lower, upper) for upper, lower in pairwise(world.LEVELS))


def _likeness(a: Z, b: Float[Tensor, "B m"]) -> Float[Tensor, "n m"]:
    return torch.stack([correlation(a, column[:, None].expand_as(a)) for column in b.T], 1)


def _best(table: Float[Tensor, "n m"], lower: str, upper: str) -> Iterator[Arrow]:
    table, count = table[:, : len(world.LEVELS[upper])], sum(part in world.LEVELS[lower] for part, _ in world.edges())
    for place in table.flatten().topk(count).indices.tolist():
        yield below(lower)[place // table.shape[1]], world.LEVELS[upper][place % table.shape[1]]


def shuffled(z: Mapping[str, Z], *, seed: int = 0) -> dict[str, Z]:
    """Control: readings whose pictures are in another order at each level, so that no level knows of another."""
    g = torch.Generator().manual_seed(seed)
    return {level: own[torch.randperm(len(own), generator=g)] for level, own in z.items()}


# -- edits -------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """What an edit is to do: `set` a concept, `remove` it, or `swap` it for another."""

    kind: Literal["set", "remove", "swap"]
    concept: str
    other: str = ""

    @property
    def do(self) -> dict[str, bool]:
        """As `world.edited` takes it."""
        return {self.concept: self.kind == "set"} | ({self.other: True} if self.kind == "swap" else {})

    @property
    def slots(self) -> set[str]:
        """What may change: the parts of the concept, which follow it in generation."""
        return {slot for name in self.do for slot in world.parts_of(name)}

    def applies(self, factors: world.Factors) -> NDArray[np.bool_]:
        """`[B]`: pictures it can be measured on: without what is set, and with what is taken away."""
        there = world.present(factors, [*self.do])
        return (there == [not on for on in self.do.values()]).all(1)


class Effect(NamedTuple):
    """What an edit did, shares from 0 to 1; None where no picture tells."""

    effect: float | None
    """Pictures in which all of the concept's parts are as they should be."""
    preservation: float | None
    """Mean over everything that is not a descendant: other slots, hue, background, place."""
    least: str
    """What was preserved least."""
    outside: float | None
    """Mean change of pixels where neither the picture nor what it should become shows the concept, over that where one does; of
    pictures that show something, as an empty one has no place."""
    cases: int


def effect(change: Change, before: Pictures, after: Pictures) -> Effect:
    """Of the pictures drawn from the same noise without and with an edit."""
    was = reading.read(before).factors
    chosen = change.applies(was)
    was, now = ({name: value[chosen] for name, value in f.items()} for f in (was, reading.read(after).factors))
    if not chosen.any():
        return Effect(None, None, "", None, 0)
    due = world.edited(was, change.do)
    done = np.all([now[slot] == due[slot] for slot in change.slots], 0)
    kept = _kept(change, was, now, due)
    least = min(kept, key=lambda name: kept[name], default="")
    mean = float(np.mean([*kept.values()])) if kept else None
    return Effect(float(done.mean()), mean, least, _outside(change, was, due, before[chosen], after[chosen]), int(chosen.sum()))


def _kept(change: Change, was: world.Factors, now: world.Factors, due: world.Factors) -> dict[str, float]:
    """By factor, how often it reads as before, in pictures that tell it before and should tell it after."""
    told = {name: own & reading.told(due)[name] for name, own in reading.told(was).items()}
    same = {name: now[name] == was[name] for name in world.VALUES if name not in change.slots}
    seen = {name: own & reading.told(now)[name] for name, own in same.items()}  # what shows no more is not kept
    return {name: float(own[told[name]].mean()) for name, own in seen.items() if told[name].any()}


def _outside(change: Change, was: world.Factors, due: world.Factors, before: Pictures, after: Pictures) -> float | None:
    own, placed = [world.REGIONS.index(slot) for slot in change.slots], reading.told(was)["x"]
    inside = np.isin([world.layers(factors)[1][placed] for factors in (was, due)], own).any(0)
    moved = np.abs(after[placed].astype(np.float32) - before[placed]).mean(-1)
    if inside.all() or not moved[inside].any():
        return None
    return float(moved[~inside].mean() / moved[inside].mean())


def spread(before: Pictures, after: Pictures) -> dict[str, float]:
    """By concept, how much more often it is there after an edit: 1 where it always came, -1 where it always went. Setting a
    whole has to bring its parts, and setting a part none of the others."""
    shares = [world.present(reading.read(pictures).factors).mean(0) for pictures in (before, after)]
    return dict(zip(world.CONCEPTS, (shares[1] - shares[0]).tolist(), strict=True))


class Downward(NamedTuple):
    """What tells a whole from its parts by intervention: the one brings the others, and none of them brings the rest."""

    brings: float
    """Rise of a part where its whole is set, mean over arrows."""
    alone: float
    """Rise of the other parts of the whole where a part is set."""
    right: float
    """Share of the arrows where the first is the larger."""


def downward(found: Collection[Arrow], rises: Mapping[str, Mapping[str, float]]) -> Downward:
    """`rises[concept]` is the `spread` of setting it, of both ends of all arrows."""
    parts = {whole: [part for part, end in found if end == whole] for _, whole in found}
    brings = torch.tensor([rises[whole][part] for part, whole in found])
    rest = [[rises[part][other] for other in parts[whole] if other != part] for part, whole in found]
    alone = torch.tensor([float(np.mean(own)) if own else 0.0 for own in rest])
    return Downward(float(brings.mean()), float(alone.mean()), float((brings > alone).float().mean()))
