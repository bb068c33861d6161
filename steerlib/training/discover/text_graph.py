"""The causal graph of a bank of text latents: found on some texts, verified on others, tested by forecasts on a third part.

p -> c  an edge     M  contexts     d  how much less a child reads where its parent is ablated alone, by context
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from ...bank.concept_bank import BaseModel, ConceptBank
from ...encoders import Sparse
from ...errors import BadRecipe
from ...graph.causal_graph import CausalGraph, Edge
from ...text import progress
from ..entries import GraphRecipe
from ..fit.encoder_recipe import EncoderRecipe
from ..fit.inputs import Tokens
from ..fit.run import fit
from ..record.activations import reading
from ..record.documents import pieces
from ..store import remembered
from .confirm import CONFIRMED, FEWEST, Pair, resamples
from .discovery import Discovery, discover, with_graph
from .rows import Folder, observed
from .steered import SteeredText
from .systems import Shuffled, System, ablated, matrix
from .verify import with_totals

CARRIED = 0.2
"""How far an effect lies at most from the product of decoder and encoder row, as a share of it, to be the residual stream
carrying a concept on."""
STEPS = 600
"""Training steps of the encoders of the control, a model with random weights."""


def contexts(tokenizer: Any, sets: Sequence[Sequence[Path]], recipe: GraphRecipe) -> Int[Tensor, "C N"]:
    """Tokens of as many documents, the beginning of each, in turn from each set of files. Raises `BadRecipe` where too few are
    long enough."""
    each = -(-recipe.contexts // len(sets))
    found = torch.stack([_beginnings(tokenizer, texts, each, recipe) for texts in sets], 1)
    return found.flatten(0, 1)[: recipe.contexts]


def _beginnings(tokenizer: Any, texts: Sequence[Path], count: int, recipe: GraphRecipe) -> Int[Tensor, "C N"]:
    """Tokens of so many documents."""
    found: dict[int, list[int]] = {}
    for piece in pieces(tokenizer, texts, recipe.length, seed=recipe.seed + 1):
        if len(piece.ids) == recipe.length:
            found.setdefault(piece.document, piece.ids)
        if len(found) == count:
            return torch.tensor(list(found.values()))
    raise BadRecipe(
        f"expected {count} documents of {recipe.length} tokens for the graph in {', '.join(path.name for path in texts)}, "
        f"found {len(found)}"
    )


def graphed(model: Any, bank: ConceptBank, ids: Int[Tensor, "C N"], recipe: GraphRecipe, folder: Path) -> ConceptBank:
    """The bank with the verified edges of its latents, and in `provenance["graph"]` how it came about, how well the graph
    foretells what happens on contexts that it was not made from, and the same of two controls.

    `folder` keeps what was run, from which the same call goes on.
    """
    known = recipe.first + recipe.second
    made, labels = ids[:known], recipe.labels
    system = SteeredText(model, bank, made)
    verify = best_known(bank, list(system.levels)[:-1], recipe.parents)
    found = discover(
        system,
        held_out=recipe.held_out,
        verify=verify,
        folder=folder / "found",
        seed=recipe.seed,
        environments=labels and labels[:known],
    )
    result = with_graph(bank, _verified(found))
    forecasts = measure_forecasts(model, result, ids, recipe, folder)
    facts = {
        "recipe": asdict(recipe) | {"environments": [*recipe.environments]},
        **account(result, found),
        "forecast": forecasts,
        "shuffled": remembered(
            folder / "shuffled.json", lambda: shuffled(model, bank, made, verify, recipe, folder / "shuffled")
        ),
        "random model": remembered(
            folder / "untrained.json", lambda: untrained(model, bank, made, recipe, folder / "untrained")
        ),
    }
    result.provenance = {**result.provenance, "graph": facts}
    return result


def measure_forecasts(
    model: Any, bank: ConceptBank, ids: Int[Tensor, "C N"], recipe: GraphRecipe, folder: Path
) -> dict[str, dict[str, Any]]:
    """Give a bank's graph total effects over two levels or more, measured on the verifying contexts, and measure on the last
    ones how well each kind of edge foretells. `folder` keeps what was run."""
    known = recipe.first + recipe.second
    own = recipe.labels and recipe.labels[recipe.first : known]
    second, third = SteeredText(model, bank, ids[recipe.first : known]), SteeredText(model, bank, ids[known:])
    bank.graph = with_totals(second, bank.graph, folder=folder / "totals", seed=recipe.seed, environments=own)
    rows = list(foretold(bank, third, folder / "foretold", seed=recipe.seed))
    return {name: scores(some) for name, some in _kinds(rows, recipe.seed).items()}


def best_known(bank: ConceptBank, levels: Sequence[str], count: int) -> list[str]:
    """The best described latents: first those that go with an attribute, then those that were moved, then the most frequent."""
    probed = {
        f"{level}/{index}"
        for level in levels
        for own in bank.provenance.get("quality", {}).get(level, {}).get("probes", {}).values()
        for index, _ in own["best"]
    }
    some = [concept for concept in bank.concepts.values() if concept.encoder in levels]
    some.sort(key=lambda c: (c.id not in probed, "verified" not in c.effects, -c.effects.get("frequency", 0.0)))
    return [concept.id for concept in some[:count]]


def carried(bank: ConceptBank, edge: Edge) -> bool:
    """Whether an edge is no more than the residual stream carrying its parent on: `tau` within 20 % of `<d_p, e_c>`."""
    src, dst = bank[edge.src], bank[edge.dst]
    rows, reads = bank.encoder(src.encoder), bank.encoder(dst.encoder)
    assert isinstance(rows, Sparse) and isinstance(reads, Sparse) and edge.tau is not None
    plain = float(rows.decoder[src.index].float() @ reads.encoder[dst.index].float()) * src.unit / dst.unit
    return abs(edge.tau - plain) <= CARRIED * abs(plain)


def account(bank: ConceptBank, found: Discovery) -> dict[str, Any]:
    """How many edges there are, and of which kind."""
    assert bank.graph is not None
    edges = [edge for edge in bank.graph.edges if edge.relation == "compute"]
    own = [carried(bank, edge) for edge in edges]
    counts = {"proposed": found.proposed, "untested": found.untested, "refused": found.refused, "verified": len(own)}
    counts |= {"total": len(bank.graph) - len(own), "passive": sum(found.passive.values())}
    told = [edge.everywhere for edge in edges]
    counts |= {"everywhere": told.count(True), "differ": told.count(False)}
    pairs: dict[str, dict[str, int]] = {}
    for edge, is_carried in zip(edges, own, strict=True):
        ends = f"{bank[edge.src].encoder} to {bank[edge.dst].encoder}"
        counted = pairs.setdefault(ends, {"verified": 0, "carried": 0, "negative": 0})
        counted["verified"] += 1
        counted["carried"] += is_carried
        counted["negative"] += (edge.tau or 0.0) < 0
    return {**counts, "levels": pairs}


class Foretold(NamedTuple):
    """An edge on contexts that neither its effect nor its interval come from: changes in units of the child, by context."""

    pair: str
    edge: Edge
    carried: bool
    said: NDArray[Any]
    happened: NDArray[Any]


def foretold(bank: ConceptBank, system: System, folder: Path, *, seed: int = 0) -> Iterator[Foretold]:
    """Each parent ablated alone in contexts where it fires, and what `bank.graph.forecast` predicts there for its children, and
    for concepts further on of which total effects are known."""
    everything, whole = np.arange(len(system)), CausalGraph(_by_id(bank, edge) for edge in bank.graph.edges)
    kept = Folder(folder, {"contexts": len(system), "edges": len(whole), "seed": seed})
    seen = observed(system, everything, kept)
    for src, dst in combinations(system.levels, 2):
        for relation in ("compute", "total"):
            graph = CausalGraph(edge for edge in whole.edges if edge.relation == relation)
            edges = matrix(graph, src, dst, (system.levels[src], system.levels[dst]))
            pair = Pair(system, everything, seen, src, dst, edges, relation == "total")
            yield from _moved(bank, pair, {(edge.src, edge.dst): edge for edge in graph.edges}, kept, seed)


def _by_id(bank: ConceptBank, edge: Edge) -> Edge:
    """An edge between places, whatever their names are."""
    return replace(edge, src=bank[edge.src].id, dst=bank[edge.dst].id)


def _moved(bank: ConceptBank, pair: Pair, edges: Mapping[tuple[str, str], Edge], kept: Folder, seed: int) -> Iterator[Foretold]:
    """The edges between two levels."""
    parents = [p for p in np.flatnonzero(np.diff(pair.edges.indptr)).tolist() if len(pair.firing(p)) >= FEWEST]
    jobs = {f"{pair.src}-{pair.dst}-{p:07}": lambda p=p: _trial(pair, p, seed) for p in parents}
    for p, found in zip(parents, kept.all(jobs, f"foretelling {pair.src} to {pair.dst}"), strict=True):
        own = bank[f"{pair.src}/{p}"]
        for i, c in enumerate(pair.children(p)):
            child, edge = bank[f"{pair.dst}/{c}"], edges[f"{pair.src}/{p}", f"{pair.dst}/{c}"]
            said = [bank.graph.forecast({own.name: -float(m) / own.unit})[child.name] for m in found["m"]]
            is_carried = not pair.whole and carried(bank, edge)
            yield Foretold(f"{pair.src} to {pair.dst}", edge, is_carried, np.array(said), -found["d"][:, i] / child.unit)


def _trial(pair: Pair, parent: int, seed: int) -> dict[str, NDArray[Any]]:
    """What its children lose, by context, `d[M, C]`, and what the parent read there, `m[M]`."""
    random = np.random.default_rng([seed, 31, parent])
    places = np.sort(random.permutation(pair.firing(parent))[:CONFIRMED])
    (trial,) = pair.trials([parent], [places], ablated)
    return {"d": trial.sums(trial.before - trial.after).astype(np.float64), "m": trial.sums(trial.z).astype(np.float64)}


def _kinds(rows: Sequence[Foretold], seed: int) -> dict[str, list[Foretold]]:
    """All edges that are more than carried on, those of each pair of levels, and those that are carried on; the first also with
    forecasts from the regression's weights and, as a control, from effects that are permuted among edges. Total effects apart,
    also with forecasts from products along paths."""
    more = [row for row in rows if not row.carried and row.edge.relation == "compute"]
    far = [row for row in rows if row.edge.relation == "total"]
    pairs = {pair: [row for row in more if row.pair == pair] for pair in dict.fromkeys(row.pair for row in more)}
    weights, effects = [row.edge.weight for row in more], np.array([row.edge.effect for row in more])
    return {
        "more than carried on": more,
        **pairs,
        "… by the regression's weights": _by(more, weights),
        "… by effects dealt among edges": _by(more, np.random.default_rng([seed, 37]).permutation(effects).tolist()),
        "carried on": [row for row in rows if row.carried],
        "over two levels or more": far,
        "over two levels, by products along paths": _by(far, [row.edge.weight for row in far]),
    }


def _by(rows: Sequence[Foretold], effects: Sequence[float]) -> list[Foretold]:
    """The same with forecasts from other effects."""
    return [row._replace(said=row.said * own / row.edge.effect) for row, own in zip(rows, effects, strict=True)]


def scores(rows: Sequence[Foretold]) -> dict[str, Any]:
    """Share of edges whose mean change has the predicted sign, and `1 - sum (d - f)^2 / sum d^2` of mean changes, with its 95 %
    interval by bootstrap over edges, and of those of single prompts."""
    if not rows:
        return {"edges": 0}
    said, happened = (np.array([getattr(row, name).mean() for row in rows]) for name in ("said", "happened"))
    by_prompt = [np.concatenate([getattr(row, name) for row in rows]) for name in ("said", "happened")]
    return {
        "edges": len(rows),
        "sign": round(float((np.sign(said) == np.sign(happened)).mean()), 4),
        "r2": round(r2(said, happened), 4),
        "r2 interval": [round(float(end), 4) for end in _r2_interval(said, happened)],
        "r2 by prompt": round(r2(*by_prompt), 4),
    }


def r2(said: NDArray[Any], happened: NDArray[Any]) -> float:
    """`1 - sum (d - f)^2 / sum d^2` of what happened d and what was said f."""
    return 1 - float(np.square(happened - said).sum()) / max(float(np.square(happened).sum()), 1e-12)


def _r2_interval(said: NDArray[Any], happened: NDArray[Any]) -> NDArray[Any]:
    drawn = resamples(len(said))
    left, power = drawn @ np.square(happened - said), drawn @ np.square(happened)
    return np.quantile(1 - left / np.maximum(power, 1e-12), (0.025, 0.975))


def shuffled(
    model: Any, bank: ConceptBank, ids: Int[Tensor, "C N"], verify: Sequence[str], recipe: GraphRecipe, folder: Path
) -> dict[str, int]:
    """The first two layers, the second one of other texts: no edge is true."""
    first, second, *_ = SteeredText(model, bank, ids).levels
    system = Shuffled(SteeredText(model, bank, ids, levels=[first, second]), recipe.seed)
    own = [name for name in verify if name.rpartition("/")[0] == first]
    found = discover(system, held_out=recipe.held_out, verify=own, folder=folder, seed=recipe.seed)
    return {"proposed": found.proposed, "verified": len(_verified(found))}


def untrained(model: Any, bank: ConceptBank, ids: Int[Tensor, "C N"], recipe: GraphRecipe, folder: Path) -> dict[str, Any]:
    """The same of a model with random weights and encoders trained on what it shows: what architecture alone makes."""
    torch.manual_seed(recipe.seed)
    random = type(model)(model.config).to(model.device, model.dtype).eval()
    own = _encoded(random, bank, ids[: recipe.first], recipe)
    system = SteeredText(random, own, ids)
    verify = best_known(own, list(system.levels)[:-1], recipe.controls)
    found = discover(system, held_out=recipe.held_out, verify=verify, folder=folder, seed=recipe.seed)
    return account(with_graph(own, _verified(found)), found)


def _verified(found: Discovery) -> CausalGraph:
    return CausalGraph(edge for edge in found.graph.edges if edge.evidence == "verified")


def _encoded(model: Any, bank: ConceptBank, ids: Int[Tensor, "C N"], recipe: GraphRecipe) -> ConceptBank:
    """Encoders as large and as sparse as the bank's, for another model."""
    found = {name: bank.encoder(name) for name in bank.encoders}
    sites = {name: bank.encoders[name].site for name, encoder in found.items() if isinstance(encoder, Sparse)}
    with reading(model, list(sites.values())) as read:
        passes = (read(some.to(model.device), None) for some in progress(list(ids.split(64)), "reading the untrained model"))
        parts = [{site: x[:, 1:].flatten(0, 1).float().cpu() for site, x in found.items()} for found in passes]
    x = {site: torch.cat([part[site] for part in parts]) for site in sites.values()}
    encoders, concepts = {}, []
    for name, site in sites.items():
        encoder = found[name]
        assert isinstance(encoder, Sparse)
        fires = sum(concept.effects.get("frequency", 0.0) for concept in bank.concepts.values() if concept.encoder == name)
        k = max(1, min(len(encoder.encoder), round(fires)))
        size = EncoderRecipe(kind="topk", latents=len(encoder.encoder), k=k, batch=1024, rate=1e-3, seed=recipe.seed)
        trained = fit({"own": size}, Tokens(x[site]), steps=STEPS)["own"]
        encoders[name] = trained
        rates = (trained.encode(x[site]) > 0).float().mean(0)
        concepts += [
            replace(concept, effects={"frequency": float(rates[concept.index])}, unit=1.0)
            for concept in bank.concepts.values()
            if concept.encoder == name
        ]
    made = {site: bank.sites[site] for site in sites.values()}
    return ConceptBank("untrained", concepts, encoders, base=BaseModel.of(model), sites=made)
