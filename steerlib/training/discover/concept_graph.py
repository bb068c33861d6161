"""Which concept of pictures brings or takes which: each is moved alone, and pictures are read before and after.

What pictures show is told by linear readings of what the denoiser makes of them, learned from the pairs of each concept.

x  features [B, F]     K  concepts, C = 2 K readings     a -> b  an edge
d  by how much more a picture shows b where a is moved, [M, K]
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from networkx import DiGraph, has_path
from numpy.typing import NDArray
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...bank.concepts import Concept
from ...encoders import Directions
from ...evaluation.pictures import edit_of
from ...graph.causal_graph import CausalGraph, Edge
from ...text import progress
from ..entries import ConceptGraphRecipe
from ..picture_recipe import PromptPair, Splits
from ..store import recorded
from .confirm import FDR, adjusted, effects
from .text_graph import Foretold, scores

Look = Callable[..., Float[Tensor, "B F"]]
"""Of prompts, seeds and, if pictures are steered, a bank and edits: draws the pictures and gives their features."""
LEAST = 0.2
"""Change of share, at a concept's own amount, from which another one follows it."""
TOLD = 0.9
"""Share of pictures of held-out pairs that a reading has to tell right, for its concept to be an effect of others."""
SHRUNK = 0.5
"""Share of the mean variance in the covariance of features, of which there are more than pictures of a concept."""
LAST = 4
"""One in so many contexts, the last ones, is left for forecasts."""


class Readers(NamedTuple):
    """Of each picture, which concepts it shows: those of which two readings `<(x - mean) / scale, w>` are high enough, one that
    tells pictures whose prompts say the concept from their partners, and one that tells them from pictures of all others."""

    mean: Float[Tensor, " F"]
    scale: Float[Tensor, " F"]
    weights: Float[Tensor, "F C"]
    least: Float[Tensor, " C"]

    def __call__(self, x: Float[Tensor, "B F"]) -> Bool[NDArray, "B K"]:
        high = (x - self.mean) / self.scale @ self.weights > self.least
        return high.unflatten(1, (2, -1)).all(1).numpy()

    @classmethod
    def of(cls, train: Sequence[Float[Tensor, "2 P F"]], dev: Sequence[Float[Tensor, "2 Q F"]]) -> "Readers":
        """From features of pairs of each concept, positive ones first: Fisher's discriminants of the ones to train with, in the
        covariance of all; of the others, high enough is what lies nearer to the mean of those that show the concept."""
        x = torch.cat([own.flatten(0, 1) for own in train])
        mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
        y, (with_it, without) = (x - mean) / scale, _means([(own - mean) / scale for own in train])
        step = (with_it - without).T
        ridge = SHRUNK / (1 - SHRUNK) * len(y)  # the mean variance is 1
        weights = step - y.T @ torch.linalg.solve(y @ y.T + ridge * torch.eye(len(y)), y @ step)  # S^-1 step, up to its length
        ends = [(end * weights.T).sum(1) for end in _means([(own - mean) / scale for own in dev])]
        return cls(mean, scale, weights, (ends[0] + ends[1]) / 2)


def _means(pairs: Sequence[Float[Tensor, "2 P F"]]) -> tuple[Float[Tensor, "C F"], Float[Tensor, "C F"]]:
    """Of pictures that show each concept, twice; of their partners, and of pictures of all other concepts."""
    positive, negative = (torch.stack([own[side].mean(0) for own in pairs]) for side in (0, 1))
    count = torch.tensor([2.0 * own.shape[1] for own in pairs])[:, None]
    total = (positive + negative) / 2 * count
    others = (total.sum(0) - total) / (count.sum() - count)
    return positive.repeat(2, 1), torch.cat((negative, others))


class Moved(NamedTuple):
    """What pictures showed more (1) or less (-1) where a concept was moved by an amount."""

    name: str
    amount: float
    d: Float[NDArray, "M K"]


@dataclass(frozen=True)
class Studied:
    """Concepts of a bank, with pictures of their pairs and pictures in which each is moved, every one drawn and looked at once.

    `pairs` are those of each concept, `contexts` prompts with seeds; `folder` keeps what was seen.
    """

    bank: ConceptBank
    pairs: Mapping[str, Splits]
    contexts: Sequence[tuple[str, int]]
    look: Look
    recipe: ConceptGraphRecipe
    folder: Path

    def seen(self, name: str, asked: Sequence[tuple[str, int]], *steered: Any) -> Tensor:
        """Features of pictures."""
        path, (prompts, seeds) = self.folder / f"{name}.safetensors", zip(*asked, strict=True)
        return recorded(path, lambda: {"x": self.look(prompts, seeds, *steered).half()})["x"].float()

    def arms(self, name: str, some: Sequence[PromptPair]) -> Float[Tensor, "2 P F"]:
        """Of the positive and the negative pictures of as many pairs as the recipe says."""
        some = some[: self.recipe.pairs]
        asked = [(pair.positive, pair.seed) for pair in some] + [(pair.negative, pair.seed) for pair in some]
        return self.seen(name, asked).unflatten(0, (2, -1))

    @cached_property
    def read(self) -> Readers:
        """Learned from the pairs that concepts were made from, and those that they were chosen with."""
        shown = progress(self.pairs.items(), "looking at pairs")
        seen = [(self.arms(f"train/{name}", own.train), self.arms(f"dev/{name}", own.dev)) for name, own in shown]
        return Readers.of(*map(list, zip(*seen, strict=True)))

    @cached_property
    def told(self) -> dict[str, float]:
        """By concept, the share of pictures of other pairs whose reading tells them right."""
        found = {}
        for k, (name, own) in enumerate(self.pairs.items()):
            positive, negative = (self.read(side)[:, k] for side in self.arms(f"evaluation/{name}", own.evaluation))
            found[name] = round(float(np.concatenate((positive, ~negative)).mean()), 4)
        return found

    @cached_property
    def plain(self) -> Float[NDArray, "M K"]:
        """What pictures show where nothing is moved."""
        return self.read(self.seen("plain", self.contexts)).astype(np.float32)

    def moved(self, name: str, seed: int | None = None) -> Moved:
        """A concept moved by its own amount; with a seed, along random directions in place of its own."""
        own = self.bank[name]
        bank, what = (self.bank, "moved") if seed is None else (randomised(self.bank, own, seed), "random")
        edits = {name: edit_of(own.useful_as, own.effects["amount"])}
        return Moved(
            name, own.effects["amount"], self.read(self.seen(f"{what}/{name}", self.contexts, bank, edits)) - self.plain
        )


def graphed(studied: Studied) -> ConceptBank:
    """The bank with a graph of its concepts, and in `provenance["graph"]` how it came about, beside random directions."""
    bank, recipe, names = studied.bank, studied.recipe, [*studied.pairs]
    told = [studied.told[name] >= TOLD for name in names]
    count = len(studied.contexts) - len(studied.contexts) // LAST
    useful = [name for name in names if bank[name].useful is not None]
    controls = useful[:: max(1, len(useful) // recipe.controls)][: recipe.controls]
    found = followed([studied.moved(name) for name in progress(useful, "moving concepts")], names, told, count)
    random = followed([studied.moved(name, recipe.seed) for name in controls], names, told, count)
    made = bank.with_concepts([*bank.concepts.values()], graph=found.graph)
    facts = {
        "recipe": asdict(recipe),
        "contexts": count,
        "least": LEAST,
        "told": studied.told,
        "least told": TOLD,
        **found.account(),
        "random": random.account(),
        "forecast": foretold(found, names, count, seed=recipe.seed),
    }
    made.provenance = {**bank.provenance, "graph": facts}
    return made


class Followed(NamedTuple):
    """What follows what, and what was left out of it."""

    graph: CausalGraph
    moves: Sequence[Moved]
    tested: int
    excluding: list[tuple[str, str]]
    """Pairs of which each takes the other away: two values of one thing, of which neither causes the other."""
    circles: int
    """Edges that close a circle of stronger ones."""

    def account(self) -> dict[str, Any]:
        """Counts, as a bank keeps them."""
        excluding = [list(pair) for pair in self.excluding]
        return {
            "moved": len(self.moves),
            "tested": self.tested,
            "verified": len(self.graph),
            "circles": self.circles,
            "excluding": excluding,
        }


class Change(NamedTuple):
    """What moving one concept changed of another: its share, and that by unit with a 95 % interval and p that it is 0."""

    src: str
    dst: str
    share: float
    tau: float
    low: float
    high: float
    p: float

    def holds(self, q: float) -> bool:
        """Given its p-value adjusted for all that were tested."""
        return q <= FDR and abs(self.share) >= LEAST and (self.low > 0 or self.high < 0)

    def edge(self, q: float, count: int) -> Edge:
        """The same as an edge."""
        figures: dict[str, Any] = {"weight": self.tau, "tau": self.tau, "tau_lo": self.low, "tau_hi": self.high, "p_adj": q}
        return Edge(src=self.src, dst=self.dst, evidence="verified", n_verify=count, **figures)


def followed(moves: Sequence[Moved], names: Sequence[str], told: Sequence[bool], count: int) -> Followed:
    """The edges that hold in the first `count` contexts, among all that were tested: a 95 % interval without 0, 5 % false, and
    a change of share of `LEAST` or more. None leads to what is not `told`."""
    changes = [change for own in moves for change in _changes(own, names, told, count)]
    q = adjusted(np.array([change.p for change in changes])).tolist()
    held = {(own.src, own.dst): own.edge(p, count) for own, p in zip(changes, q, strict=True) if own.holds(p)}
    away = {ends for ends, edge in held.items() if edge.effect < 0}
    excluding = {(a, b) for a, b in away if (b, a) in away}
    amounts = {own.name: own.amount for own in moves}
    free = sorted((edge for ends, edge in held.items() if ends not in excluding), key=lambda e: -abs(e.effect * amounts[e.src]))
    joined, kept = DiGraph(), []
    for edge in free:
        joined.add_nodes_from((edge.src, edge.dst))
        if not has_path(joined, edge.dst, edge.src):
            joined.add_edge(edge.src, edge.dst)
            kept.append(edge)
    pairs = sorted(pair for pair in excluding if pair[0] < pair[1])
    return Followed(CausalGraph(kept), moves, len(changes), pairs, len(free) - len(kept))


def _changes(own: Moved, names: Sequence[str], told: Sequence[bool], count: int) -> Iterator[Change]:
    """Of each other concept."""
    others = [name for name, can in zip(names, told, strict=True) if can and name != own.name]
    d = own.d[:count, [names.index(name) for name in others]]
    found = effects(d, np.full(len(d), own.amount))
    for name, *figures in zip(others, d.mean(0).tolist(), *(column.tolist() for column in found), strict=True):
        yield Change(own.name, name, *figures)


def foretold(found: Followed, names: Sequence[str], count: int, *, seed: int) -> dict[str, Any]:
    """How well edges foretell the contexts after the first `count`, and how well they do with effects dealt among them."""
    by = {own.name: own for own in found.moves}
    edges, rows = found.graph.edges, list[Foretold]()
    dealt = np.random.default_rng([seed, 37]).permutation(np.array([e.effect * by[e.src].amount for e in edges]))
    for edge in edges:
        happened = by[edge.src].d[count:, names.index(edge.dst)]
        rows.append(Foretold("", edge, False, np.full(len(happened), edge.effect * by[edge.src].amount), happened))
    mixed = [row._replace(said=np.full_like(row.said, own)) for row, own in zip(rows, dealt, strict=True)]
    return {"edges": scores(rows), "effects dealt among edges": scores(mixed)}


def randomised(bank: ConceptBank, concept: Concept, seed: int) -> ConceptBank:
    """The bank with random directions in place of those of a concept, as long as its own."""
    g = torch.Generator().manual_seed(seed + 997)
    encoders = {id: bank.encoder(id) for id in bank.encoders}
    for place in concept.places:
        own = encoders[place.encoder]
        assert isinstance(own, Directions)
        rows, drawn = own.decoder.clone(), torch.randn(own.decoder.shape[1], generator=g)
        rows[place.index] = drawn / drawn.norm() * rows[place.index].norm()
        encoders[place.encoder] = Directions(rows, own.mean)
    return ConceptBank(**{**bank.contents(), "encoders": encoders})
