"""Do edges of the latents' graph join labels that mean alike? `python scripts/edge_meaning.py`. A minute; needs no model.

Cosine of the sentence embeddings of a parent's label and its child's, beside that of edges whose children are dealt anew among
those between the same two layers. A label says where a latent fires or what it makes likelier; the graph had no part in it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

import steerlib as sl
from steerlib.bank.search import LABELS, kept, text_of
from steerlib.evaluation.report import markdown
from steerlib.graph.causal_graph import Edge
from steerlib.training.discover.text_graph import carried

BANK, DEALS, DRAWN = "smollm2-135m-latents", 1000, 2000


def meanings(bank: sl.ConceptBank, edges: Sequence[Edge]) -> dict[str, NDArray[Any]]:
    """By concept, what its label means, of unit length, as far as the bank stores it."""
    texts = {end: text_of(bank[end]) for edge in edges for end in (edge.src, edge.dst)}
    path = bank.file(LABELS)
    stored = path.read_bytes() if path is not None else b""
    known = kept(stored, tuple(sorted({*texts.values()})))
    return {end: known[text] / np.linalg.norm(known[text]) for end, text in texts.items() if text in known}


def compared(bank: sl.ConceptBank, edges: Sequence[Edge], means: Mapping[str, NDArray[Any]], seed: int = 0) -> dict[str, Any]:
    """Mean cosine of edges and of dealt ones; their difference with a 95 % interval by bootstrap over parents; how many of the
    deals reach the mean of the edges."""
    random, edges = np.random.default_rng(seed), [e for e in edges if e.src in means and e.dst in means]
    first, second = (np.stack([means[getattr(edge, end)] for edge in edges]) for end in ("src", "dst"))
    real = (first * second).sum(1)
    pairs = np.unique([f"{bank[e.src].encoder} {bank[e.dst].encoder}" for e in edges], return_inverse=True)[1]
    dealt = np.stack([(first * second[_within(pairs, random)]).sum(1) for _ in range(DEALS)])
    owners = np.unique([edge.src for edge in edges], return_inverse=True)[1]
    count = np.bincount(owners)
    ahead = np.bincount(owners, real - dealt.mean(0))
    drawn = random.multinomial(len(count), np.full(len(count), 1 / len(count)), DRAWN)
    low, high = np.quantile((drawn @ ahead) / (drawn @ count), (0.025, 0.975))
    found = {"cosine": real.mean(), "dealt": dealt.mean(), "difference": ahead.sum() / count.sum(), "low": low, "high": high}
    found["reached"] = (dealt.mean(1) >= real.mean()).mean()
    return {"edges": len(edges), **{name: float(value) for name, value in found.items()}}


def _within(pairs: NDArray[Any], random: np.random.Generator) -> NDArray[Any]:
    """Places dealt anew among those of each pair of layers."""
    order = np.arange(len(pairs))
    for pair in np.unique(pairs):
        own = np.flatnonzero(pairs == pair)
        order[own] = random.permutation(own)
    return order


def kinds(bank: sl.ConceptBank) -> dict[str, list[Edge]]:
    """All edges; those that the residual stream carries on, and others, by sign."""
    edges = [edge for edge in bank.graph.edges if edge.relation == "compute"]
    passed = {edge: carried(bank, edge) for edge in edges}
    more = [edge for edge in edges if not passed[edge]]
    return {
        "all": edges,
        "carried on by the residual stream": [edge for edge in edges if passed[edge]],
        "more than carried on": more,
        "… that raise their child": [edge for edge in more if edge.effect > 0],
        "… that lower it": [edge for edge in more if edge.effect < 0],
    }


def table(figures: Mapping[str, Any]) -> str:
    """As Markdown."""
    head = "edges | how many | cosine of labels | of dealt edges | difference (95 %) | deals that reach it"
    lines = []
    for name, f in figures.items():
        told = f"{f['difference']:+.3f} ({f['low']:+.3f} to {f['high']:+.3f})"
        lines.append([name, str(f["edges"]), f"{f['cosine']:.3f}", f"{f['dealt']:.3f}", told, f"{f['reached']:.1%}"])
    return markdown(head, lines)


def main(out: Annotated[Path, typer.Option(help="write the figures here as JSON")] = Path("out/edge_meaning.json")) -> None:
    """Measure and print."""
    bank = sl.ConceptBank.from_pretrained(BANK)
    found = kinds(bank)
    means = meanings(bank, found["all"])
    figures = {name: compared(bank, some, means) for name, some in found.items() if len(some) > 1}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    typer.run(main)
