"""What follows from what in scenes: the truth is known, so every edge of a graph can be marked.

`PYTHONPATH=scripts python -m scenes.graph BANK` holds the graph of a bank against the truth, and beside what judges see follow
in the same pictures, which its recipe says. Goes on where it stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from scenes import judges, world
from scenes.measures import WHOLE, Cause, every
from steerlib.bank.concept_bank import ConceptBank
from steerlib.evaluation.pictures import edit_of
from steerlib.evaluation.report import markdown
from steerlib.graph.causal_graph import CausalGraph
from steerlib.hosts import load
from steerlib.text import progress
from steerlib.training.calibrate.prompted import Drawing, steered
from steerlib.training.carry import recipe_in
from steerlib.training.discover.concept_graph import Moved, followed
from steerlib.training.picture_recipe import PictureRecipe
from steerlib.training.store import remembered

LEAST = 0.2
"""Change of share from which a value follows another one."""
TRUE = 4000
"""Scenes from which true effects are computed."""
DEALT = 200
"""Graphs dealt at random, of which the mean is taken."""


def truth() -> Mapping[tuple[str, str], float]:
    """By lever and value of another factor, the true change of its share where the one is set."""
    drawn, found = world.draw(TRUE, seed=(0, 54)), {}
    for cause in every():
        after = world.redraw(drawn, cause.sets).factors
        for other in every():
            if other.factor != cause.factor:
                changes = [_shows(after, name, other) - _shows(drawn.factors, name, other) for name in other.sets]
                found[cause.value, other.value] = float(np.mean(changes))
    return found


def _shows(factors: Mapping[str, NDArray[Any]], name: str, cause: Cause) -> float:
    return float((factors[name] == world.VALUES[name].index(cause.value)).mean())


def marked(graph: CausalGraph, true: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """Edges beside the truth: right are those of a true effect of the same sign, due are true effects as large as an edge's."""
    right = [edge for edge in graph.edges if true[edge.src, edge.dst] * edge.effect > 0]
    due = {ends for ends, effect in true.items() if abs(effect) >= LEAST}
    hit = {(edge.src, edge.dst) for edge in right} & due
    return {
        "edges": len(graph),
        "right": len(right),
        "precision": round(len(right) / max(1, len(graph)), 4),
        "due": len(due),
        "recall": round(len(hit) / max(1, len(due)), 4),
        "wrong": [f"{edge.src} → {edge.dst}" for edge in graph.edges if edge not in right],
    }


def shuffled(graph: CausalGraph, true: Mapping[tuple[str, str], float]) -> float:
    """Precision of as many edges between levers and values dealt at random, signs kept; the mean over draws."""
    rng, pairs = np.random.default_rng(0), list(true)
    signs, found = [np.sign(edge.effect) for edge in graph.edges], []
    for _ in range(DEALT):
        drawn = rng.choice(len(pairs), len(signs), replace=False)
        found.append(np.mean([true[pairs[i]] * sign > 0 for i, sign in zip(drawn, signs, strict=True)]) if signs else 0.0)
    return round(float(np.mean(found)), 4)


def beside_truth(graph: CausalGraph, true: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """The edges between values of different factors, marked, beside chance; of one factor they are counted alone: all
    its values take each other away, and nothing says which is the cause."""
    edges = [edge for edge in graph.edges if edge.relation == "compute"]
    apart = CausalGraph(edge for edge in edges if (edge.src, edge.dst) in true)
    return {**marked(apart, true), "of one factor": len(edges) - len(apart), "dealt": shuffled(apart, true)}


def judged(bank: ConceptBank, work: Path) -> CausalGraph:
    """What follows what by the rule of `[graph]`, where judges tell what the same pictures show."""
    recipe = recipe_in(bank)
    assert isinstance(recipe, PictureRecipe) and recipe.graph is not None, "expected a bank whose recipe has a [graph]"
    dtype = getattr(torch, bank.provenance.get("precision", "float32"))
    pipe, contexts = load(str(bank.file("pipeline")), dtype=dtype)[0], recipe.read_contexts(recipe.graph)
    pipe.set_progress_bar_config(disable=True)
    drawing, judge, (prompts, seeds) = Drawing(pipe, recipe), judges.load("scenes"), zip(*contexts, strict=True)
    shown = [cause for cause in every() if cause.value in bank.concepts]

    def seen(name: str, edits: Mapping[str, Any] | None = None) -> NDArray[Any]:
        def read() -> list[list[float]]:
            with steered(pipe, bank, edits):
                readings = judge.read(drawing.shown(prompts, seeds)[1])
            return np.stack([share(readings, cause) for cause in shown], 1).round(4).tolist()

        return np.array(remembered(work / f"{name}.json", read))

    plain, moves = seen("unsteered"), list[Moved]()
    useful = [bank[cause.value] for cause in shown if bank[cause.value].useful is not None]
    for own in progress(useful, "moving concepts"):
        edit = edit_of(own.useful_as, own.effects["amount"])
        moves.append(Moved(own.name, own.effects["amount"], seen(own.name, {own.name: edit}) - plain))
    names, count = [cause.value for cause in shown], bank.provenance["graph"]["contexts"]
    return followed(moves, names, [True] * len(names), count).graph


def share(readings: Mapping[str, torch.Tensor], cause: Cause) -> NDArray[Any]:
    """How much of each picture shows a value: of an object's factor, the share of its objects."""
    shows = (readings[cause.factor] == cause.index).float()
    if cause.factor in WHOLE:
        return shows.numpy()
    there = (readings["shape"] > 0).float()
    return ((shows * there).sum(-1) / there.sum(-1).clamp(min=1)).numpy()


def table(graphs: Mapping[str, CausalGraph]) -> str:
    """Graphs beside the truth, as Markdown; the last one is that of judges, if there are several."""
    true, last = truth(), [*graphs.values()][-1]
    found = {name: beside_truth(graph, true) for name, graph in graphs.items()}
    sure = {(edge.src, edge.dst): edge.effect for edge in last.edges}
    rows = []
    for name, own in found.items():
        both = sum(sure.get((e.src, e.dst), 0.0) * e.effect > 0 for e in graphs[name].edges if (e.src, e.dst) in true)
        rows.append(
            (
                name,
                *(str(own[what]) for what in ("edges", "right")),
                f"{own['precision']:.0%}",
                f"{own['dealt']:.0%}",
                str(own["due"]),
                f"{own['recall']:.0%}",
                str(both) if len(graphs) > 1 else "",
                str(own["of one factor"]),
            )
        )
    wrong = [f"Not in the truth, {name}: {', '.join(own['wrong']) or 'none'}." for name, own in found.items()]
    head = (
        "graph | edges | right | precision | of as many dealt at random | due | recall | judges see it too "
        "| edges of one factor, not marked"
    )
    return "\n\n".join([markdown(head, rows), *wrong])


def main(
    bank: Annotated[str, typer.Argument(help="its name or folder")],
    work: Annotated[Path, typer.Option(help="keeps what judges saw")] = Path("out/scenes-graph"),
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    made = ConceptBank.from_pretrained(bank)
    print(table({made.name: made.graph, "of judges": judged(made, work)}))


if __name__ == "__main__":
    typer.run(main)
