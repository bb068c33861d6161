"""Edges of the shipped latents' graph tested again, beside false ones: `python scripts/edges_again.py [--parents 24]`.

On texts that nothing was found, verified or foretold on. Each parent is ablated alone, once for its own edges and for as many
that are planted: to concepts of the same level to which the graph has no edge from it, children of other parents. Needs the
corpus that the recipe of the bank names (`scripts/corpus.py`); goes on where it stopped.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from benchmarks.measurement import machine

import steerlib as sl
from steerlib.evaluation.report import markdown
from steerlib.graph.causal_graph import CausalGraph, Edge
from steerlib.training.discover.steered import SteeredText
from steerlib.training.discover.text_graph import contexts
from steerlib.training.discover.verify import Tested, verify_edges
from steerlib.training.recipe import TextEncoderRecipe

BANK = "smollm2-135m-latents"
RECIPE = Path("concept_banks/recipes") / BANK / "recipe.toml"


def chosen(graph: CausalGraph, parents: int, seed: int = 0) -> list[Edge]:
    """All edges of relation `compute` of some parents."""
    own = [edge for edge in graph.edges if edge.relation == "compute"]
    names = sorted({edge.src for edge in own})
    kept = {names[k] for k in np.random.default_rng([seed, 1]).permutation(len(names))[:parents]}
    return [edge for edge in own if edge.src in kept]


def planted(graph: CausalGraph, edges: Sequence[Edge], seed: int = 0) -> Iterator[tuple[str, str]]:
    """As many pairs of the same parents with children of others, to which they have no edge."""
    rng, joined = np.random.default_rng([seed, 2]), {(edge.src, edge.dst) for edge in graph.edges}
    level = lambda name: name.rpartition("/")[0]  # noqa: E731
    children = sorted({edge.dst for edge in graph.edges if edge.relation == "compute"})
    for src in sorted({edge.src for edge in edges}):
        own = [edge.dst for edge in edges if edge.src == src]
        others = [name for name in children if level(name) == level(own[0]) and (src, name) not in joined]
        yield from ((src, others[k]) for k in rng.permutation(len(others))[: len(own)])


def counted(tested: Sequence[Tested], known: Sequence[Edge] = ()) -> dict[str, Any]:
    """How they fared; of known edges also how many effects lie in the interval that was stored, and in how many the stored
    interval and the new one have something in common."""
    found = {verdict: sum(one.verdict == verdict for one in tested) for verdict in ("verified", "refused", "too few contexts")}
    both = [(one.edge, old) for one, old in zip(tested, known, strict=bool(known)) if one.verdict != "too few contexts"]
    ends = [(_interval(new), _interval(old)) for new, old in both]
    inside = sum(low <= tau <= high for (_, tau, _), (low, _, high) in ends)
    shared = sum(a <= high and low <= b for (a, _, b), (low, _, high) in ends)
    return found | ({"inside": inside, "shared": shared, "tested": len(both)} if known else {})


def _interval(edge: Edge) -> tuple[float, float, float]:
    """The effect of an edge that was tested, between the ends of its interval."""
    assert edge.tau_lo is not None and edge.tau is not None and edge.tau_hi is not None
    return edge.tau_lo, edge.tau, edge.tau_hi


def table(found: dict[str, Any]) -> str:
    """As Markdown."""
    own, false = found["shipped"], found["planted"]
    share = lambda name: f"{own[name]} of {own['tested']}"  # noqa: E731
    rows = [
        (
            "shipped",
            *(str(own[name]) for name in ("verified", "refused", "too few contexts")),
            share("inside"),
            share("shared"),
        ),
        ("planted", *(str(false[name]) for name in ("verified", "refused", "too few contexts")), "", ""),
    ]
    head = "edges | verified again | refused | too few texts | effect in the stored interval | intervals overlap"
    return (
        f"{markdown(head, rows)}\n\n{found['parents']} parents, {found['texts']} texts of {found['length']} tokens. "
        f"Machine: {found['machine']}."
    )


def main(
    parents: Annotated[int, typer.Option(help="how many are ablated")] = 24,
    texts: Annotated[int, typer.Option(help="how many they are ablated in")] = 600,
    work: Annotated[Path, typer.Option(help="keeps what was run")] = Path("out/edges-again-work"),
    out: Annotated[Path, typer.Option(help="write the figures here as JSON")] = Path("out/edges_again.json"),
) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    recipe = TextEncoderRecipe.from_file(RECIPE)
    assert recipe.graph is not None
    model, tokenizer = sl.load(recipe.source, dtype=torch.bfloat16)
    bank = sl.ConceptBank.from_pretrained(BANK)
    more = replace(recipe.graph, contexts=recipe.graph.contexts + texts)
    new = contexts(tokenizer, [recipe.corpus_files()], more)[recipe.graph.contexts :]
    edges = chosen(bank.graph, parents)
    pairs = [*planted(bank.graph, edges)]
    tested = verify_edges(SteeredText(model, bank, new), [*edges, *pairs], folder=work)
    found = {
        "shipped": counted(tested[: len(edges)], edges),
        "planted": counted(tested[len(edges) :]),
        **{"parents": parents, "texts": texts, "length": more.length, "machine": machine()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
