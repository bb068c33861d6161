"""Hold banks of figures against the truth: `PYTHONPATH=scripts python -m figures.measure out/figures`.

The folder has the pipeline, and what `steerlib train` made of `recipe.toml` (`bank`) and of `levers.toml` (`levers`). Encoders
of controls are trained here: of another seed, without sparsity, of a model that learned nothing. Goes on where it stopped, and
writes the tables of `scripts/figures/README.md`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks import sections
from scenes.pipeline import pipeline
from scipy.sparse import csr_matrix

from figures import control, measures, world
from figures.measures import Nodes, Z
from steerlib import ConceptBank, load, train
from steerlib.errors import BadRecipe
from steerlib.evaluation.pictures import sheet
from steerlib.evaluation.report import markdown
from steerlib.text import progress
from steerlib.training.discover.discovery import composition
from steerlib.training.discover.steered_pictures import Cleared, SteeredPictures, thresholds
from steerlib.training.package.card import parts_section
from steerlib.training.recipe import PipelineEncoderRecipe, Recipe
from steerlib.training.store import recorded, remembered

OWN, TWIN, DENSE, UNTRAINED = "the bank", "another seed", "not sparse, k = n", "untrained model"
HELD_OUT = 73
"""Purpose of the renders that nodes are found on: no encoder saw them."""
README = Path(__file__).with_name("README.md")


class Bench:
    """A folder with a pipeline and its banks, and what was measured of them, on `n` renders and `cases` prompts an edit."""

    def __init__(self, folder: Path, n: int, cases: int, dtype: str = "float32"):
        self.folder, self.n, self.cases = folder, n, cases
        self.kept = folder / f"measured-{n}-{cases}"
        self.dtype = getattr(torch, dtype)
        self.pipe = load(str(folder / "pipeline"))[0].to(self.dtype)
        self.pipe.set_progress_bar_config(disable=True)

    @cached_property
    def recipe(self) -> PipelineEncoderRecipe:
        """Of the encoders."""
        made = Recipe.from_file(self.folder / "recipe.toml")
        if not isinstance(made, PipelineEncoderRecipe):
            raise BadRecipe(f"expected a recipe of encoders of a pipeline in {self.folder.name}/recipe.toml")
        return made

    def opened(self, kind: str) -> tuple[Any, ConceptBank]:
        """A pipeline and a bank of it: the folder's own or a control, which is trained if it is not there."""
        if kind == OWN:
            return self.pipe, ConceptBank.from_pretrained(self.folder / "bank")
        pipe, place = self.pipe, self.folder / "controls" / kind.replace(", ", "-").replace(" ", "-")
        if kind == UNTRAINED:
            pipe = pipeline("small", seed=1, known=world.vocabulary()).to(self.dtype)
            pipe.set_progress_bar_config(disable=True)
        if not (place / "bank.json").is_file():
            train(pipe, _controlled(self.recipe, kind), work=self.folder / "work").save_pretrained(place)
        return pipe, ConceptBank.from_pretrained(place)

    @cached_property
    def renders(self) -> world.Figures:
        """Pictures that no encoder saw."""
        return world.draw(self.n, seed=(0, HELD_OUT))

    def encoders(self) -> list[dict[str, Any]]:
        """By bank and level, how many concepts have a node, and the edges between nodes by readings of renders."""
        return [
            row for kind in (OWN, TWIN, DENSE, UNTRAINED) for row in remembered(self._place(kind), partial(self.read, kind))
        ]

    def read(self, kind: str) -> list[dict[str, Any]]:
        """Nodes and edges of one bank."""
        pipe, bank = self.opened(kind)
        z = measures.readings(pipe, bank, self.renders)
        levels = dict(zip(sorted(z, key=lambda id: -_level(id)), world.LEVELS, strict=True))
        found = {level: self.nodes(z[id], level) for id, level in levels.items()}
        own = {level: z[id][:, [*found[level].latents]] for id, level in levels.items()}
        ids = {level: id for id, level in levels.items()}
        rows = [{"bank": kind, "level": level, **_row(found[level])} for level in world.LEVELS]
        named = {f"{ids[level]}/{k}": name for level in ids for name, k in zip(*found[level][:2], strict=True)}
        alone = {id: own[level] for id, level in levels.items()}
        columns = {f"{id}/{k}": name for id, level in levels.items() for k, name in enumerate(found[level].concepts)}
        graphs = {
            "minimal, of renders": measures.arrows(minimal(pipe, bank, z), named),
            "the same among nodes alone": measures.arrows(minimal(pipe, bank, alone), columns),
        }
        if kind == OWN:
            graphs |= self._shipped(bank, named) | {
                "correlation": measures.correlated(own),
                "dense": measures.dense(own),
                "minimal, levels shuffled": measures.arrows(minimal(pipe, bank, measures.shuffled(z)), named),
                "among nodes alone, levels shuffled": measures.arrows(minimal(pipe, bank, measures.shuffled(alone)), columns),
                "correlation, levels shuffled": measures.correlated(measures.shuffled(own)),
            }
        return [*rows, *({"bank": kind, "graph": name, "arrows": len(e), **_score(e)} for name, e in graphs.items())]

    def nodes(self, z: Z, level: str) -> Nodes:
        """The latents of all that might be taken for something at a level; of the highest one of its own concepts alone."""
        names = world.LEVELS[level] if level == "wholes" else measures.below(level)
        return measures.nodes(z, torch.from_numpy(world.present(self.renders.factors, names)), names)

    def _shipped(self, bank: ConceptBank, named: Mapping[str, str]) -> dict[str, set[measures.Arrow]]:
        """Arrows of the bank's own graph, which is of pictures that the pipeline drew."""
        if bank.graph is None:
            return {}
        return {"the bank's own": measures.arrows(bank.graph, {bank[id].name: name for id, name in named.items()})}

    def named(self) -> dict[str, list[str]]:
        """By concept, a latent of each level: of its own level that which stands for it, first; then those that go with it."""
        return remembered(self._place("named"), self._named)

    def _named(self) -> dict[str, list[str]]:
        _, bank = self.opened(OWN)
        z = measures.readings(self.pipe, bank, self.renders)
        levels = dict(zip(sorted(z, key=lambda id: -_level(id)), world.LEVELS, strict=True))
        there, found = torch.from_numpy(world.present(self.renders.factors)), dict[str, list[str]]()
        for id, level in levels.items():
            nodes = self.nodes(z[id], level)
            own = {name: k for name, k in zip(*nodes[:2], strict=True) if name in world.LEVELS[level]}
            for j, name in enumerate(world.CONCEPTS):
                r = measures.correlation(z[id], there[:, j : j + 1].expand(-1, z[id].shape[1]))
                latent = bank[f"{id}/{own.get(name, int(r.argmax()))}"].name
                found[name] = [latent, *found.get(name, [])] if name in own else [*found.get(name, []), latent]
        return found

    @cached_property
    def given(self) -> control.Given:
        """What edits are measured with."""
        levers = ConceptBank.from_pretrained(self.folder / "levers")
        return control.Given(self.pipe, self.opened(OWN)[1], levers, self.named(), self.cases)

    def edits(self) -> list[dict[str, Any]]:
        """What every way to set, remove and swap concepts did."""
        found = []
        for change in progress([*control.changes()], "edits"):
            name = f"{change.kind} {change.concept}"
            row = remembered(self._place(name), partial(control.measured, self.given, change))
            few = partial(control.measured_along, self.given, change, self.directions)
            found.append(row | {"ways": row["ways"] | remembered(self._place(f"{name}, along"), few)})
        return found

    def directions(self, concept: str) -> Mapping[str, torch.Tensor]:
        """In which what blocks add differs most where captions say a concept."""
        path = self.kept / f"directions of {concept}.safetensors"
        return recorded(path, partial(control.directions, self.given, concept))

    def composed(self) -> Any:
        """A sheet of wholes and halves with what the bank's graph says they are made of: of latents where they read most."""
        bank = self.opened(OWN)[1]
        z = measures.readings(self.pipe, bank, self.renders)
        best = {bank[f"{id}/{k}"].name: int(row) for id, own in z.items() for k, row in enumerate(own.argmax(0))}
        names = {latents[0]: concept for concept, latents in self.named().items()}
        cells = {}
        for concept in (*world.WHOLES, *world.HALVES):
            whole, own = self.named()[concept][0], [*bank.graph.edges] if bank.graph is not None else []
            parts = [edge.src for edge in own if edge.relation == "selection" and edge.dst == whole][:5]
            shown = {"the latent": whole} | {f"part {k}": part for k, part in enumerate(parts, 1)}
            said = ", ".join(names.get(part, "?") for part in parts)
            cells[f"{concept}: {said}"] = {column: self.renders.pixels[best[name]] for column, name in shown.items()}
        return sheet(cells)

    def _place(self, name: str) -> Path:
        return self.kept / f"{name}.json"


def _controlled(recipe: PipelineEncoderRecipe, kind: str) -> PipelineEncoderRecipe:
    """The recipe of a control: without a graph, from one seed; of an untrained model from a quarter of the tokens."""
    how = {TWIN: lambda own: {"seed": own.seed + 1}, DENSE: lambda own: {"k": own.latents}}.get(kind, lambda _: {})
    encoders = tuple(replace(one, seeds=1, recipe=replace(one.recipe, **how(one.recipe))) for one in recipe.encoders)
    return replace(recipe, encoders=encoders, graph=None, tokens=recipe.tokens // (4 if kind == UNTRAINED else 1))


def _level(id: str) -> int:
    return int(id.partition("#")[0].rpartition("@")[2])


def minimal(pipe: Any, bank: ConceptBank, z: Mapping[str, Z]) -> Any:
    """The graph that `steerlib train` would find from readings."""
    system = SteeredPictures(pipe, bank, [("", 0)] * len(next(iter(z.values()))), lambda *_: None)
    codes = {id: csr_matrix(z[id].numpy()) for id in system.levels}
    cleared = Cleared(system, {id: thresholds(own) for id, own in codes.items()})
    return composition(cleared, {id: cleared.cleared(id, own) for id, own in codes.items()}).graph


def _row(found: Nodes) -> dict[str, Any]:
    own = [k for k, name in enumerate(found.concepts) if name not in world.SEEN_WITH]
    r = found.correlation[own]
    return {"mcc": round(float(r.mean()), 4), "found": round(float((r >= measures.CLEAR).float().mean()), 4)}


def _score(arrows: set[measures.Arrow]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in measures.edge_score(arrows)._asdict().items()}


# -- tables ------------------------------------------------------------------------------------------------------


def nodes_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Nodes of every bank, level by level."""
    by = {(row["bank"], row["level"]): row for row in rows if "level" in row}
    cells = lambda bank: [f"{by[bank, level]['found']:.0%} ({by[bank, level]['mcc']:.2f})" for level in world.LEVELS]  # noqa: E731
    return markdown(
        f"encoders | {' | '.join(world.LEVELS)}", [[bank, *cells(bank)] for bank in dict.fromkeys(b for b, _ in by)]
    )


def edges_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Arrows of every graph beside the truth."""
    figures = ("precision", "recall", "f1", "direction")
    lines = [
        [row["bank"], row["graph"], str(row["arrows"]), *(f"{row[name]:.2f}" for name in figures)]
        for row in rows
        if "graph" in row
    ]
    return markdown("encoders | graph | arrows | " + " | ".join(figures), lines)


def tables(bench: Bench) -> Iterator[tuple[str, str]]:
    """Every table of the README, by its mark."""
    rows = bench.encoders()
    yield "nodes", nodes_table(rows)
    yield "edges", edges_table(rows)
    yield "verified", parts_section(bench.opened(OWN)[1]).partition("\n\n")[2]
    edits = bench.edits()
    yield "edits", control.table(edits)
    yield "windows", control.windows(edits)
    yield "stretches", control.stretches(edits)
    yield "each", control.each(edits)


def main(
    folder: Annotated[Path, typer.Argument(help="with the pipeline and its banks")],
    renders: Annotated[int, typer.Option(help="pictures that nodes are looked for on")] = 2000,
    cases: Annotated[int, typer.Option(help="prompts of every edit")] = 24,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    readme: Annotated[Path, typer.Option(help="whose tables are written")] = README,
) -> None:
    """Measure, and write the tables."""
    bench = Bench(folder, renders, cases, dtype)
    for mark, text in tables(bench):
        sections.put([readme], mark, text)
        print(f"{mark}\n\n{text}\n")
    for name, picture in (("edits", control.shown(bench.given, bench.edits(), bench.directions)), ("graph", bench.composed())):
        picture.quantize(128).save(readme.with_name(f"{name}.png"), optimize=True)


if __name__ == "__main__":
    typer.run(main)
