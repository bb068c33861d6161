"""Write the README's measured parts: `python scripts/readme.py`, with the files of whatever was measured anew.

Runs the README's first example for the output; takes tables of effects from the shipped bank, those of new
concepts from what `unseen.py` wrote, the cost from `--out` of `bench_steering.py`, `bench_latents.py` and
`bench_diffusion.py`, graphs from that of `bench_graph.py`, and the coverage from `coverage_table.py`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from scenes import card as scene_card

import steerlib as sl
from steerlib.evaluation.report import latents_table, summary_table, table
from steerlib.text import chat, complete
from steerlib.training.calibrate.measure import GATED
from steerlib.training.package.card import graph_table, verified

README = Path(__file__).parent.parent / "README.md"
RECIPES = README.parent / "concept_banks" / "recipes"
PROMPT = "Tell me about the place where you live."
SHOWN = ("science", "finance", "music", "french")


def output(bank: sl.ConceptBank, source: str) -> str:
    """The answers to one prompt, unsteered and steered."""
    model, tokenizer = sl.load(source)
    lines = []
    for edits in ({}, *({name: round(bank[name].useful or 1.0, 2)} for name in SHOWN)):
        with sl.steer(model, bank, edits):
            text = complete(model, tokenizer, [chat(tokenizer, PROMPT)], new_tokens=40).texts[0]
        name = ", ".join(f"`{name} {amount:+.2f}`" for name, amount in edits.items()) or "unsteered"
        lines.append(f"| {name} | {' '.join(text.split())} … |")
    return "\n".join(["| | answer |", "|---|---|", *lines])


def records(bank: sl.ConceptBank) -> list[dict[str, Any]]:
    """What was measured of the concepts of a bank."""
    return [dict(concept.effects) for concept in bank.concepts.values() if "conditions" in concept.effects]


def cost(figures: Mapping[str, Any]) -> str:
    """One table a measurement."""
    parts = []
    for title, rows in figures.items():
        if not isinstance(rows, dict):
            continue
        names = list(next(iter(rows.values())))
        parts.append("| " + " | ".join([title, *names]) + " |\n|" + "---|" * (len(names) + 1))
        for what, values in rows.items():
            cells = [f"{v[0]:.2f} ({v[1]:.2f}–{v[2]:.2f})" if isinstance(v, list) else f"{v:.0f}" for v in values.values()]
            parts[-1] += "\n| " + " | ".join([what, *cells]) + " |"
    return "\n\n".join(parts) + f"\n\nMachine: {figures['machine']}; torch {figures['torch']}; {figures['rounds']} rounds."


def training(figures: Mapping[str, Any]) -> str:
    """What a step of training costs beside other libraries, one table a size."""
    parts = []
    for title, rows in figures.items():
        if not isinstance(rows, dict):
            continue
        lines = [
            f"| {title} | tokens/s | time over steerlib's | processor time | MiB of a step | unexplained |",
            "|---" * 6 + "|",
        ]
        for name, row in rows.items():
            ratios = (f"{m:.2f} ({low:.2f}–{high:.2f})" for m, low, high in (row[key] for key in list(row)[1:3]))
            left = f"{[*row['unexplained'].values()][-1]:.3f}" if row["unexplained"] else "–"
            lines.append(f"| {name} | {row['tokens/s'][0]:,} | {' | '.join(ratios)} | {row['peak MiB']} | {left} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + f"\n\nMachine: {figures['machine']}; torch {figures['torch']}; {figures['rounds']} rounds."


def unseen(records: Sequence[Mapping[str, Any]]) -> str:
    """Concepts that no code was made with, and their mean."""
    names = ("steered", GATED, "random", "shuffled labels")
    lines = [
        "| concept | made by | ratio to prompting | in answers only | best random | shuffled labels | KL, gated | specificity |"
    ]
    lines, ratios = [*lines, "|---|---|---|---|---|---|---|---|"], []
    for record in records:
        found = record["conditions"]
        random = max(line["ratio"] for name, line in found.items() if name.startswith("random-"))
        ratios.append([random if name == "random" else found[name]["ratio"] for name in names])
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios[-1])
        kl = f"{found['steered']['kl']:.2f}, {found[GATED]['kl']:.2f}"
        method = f"{record['method']} at {record['site']}"
        lines.append(f"| {record['concept']} | {method} | {cells} | {kl} | {found['steered']['specificity']:.2f} |")
    means = " | ".join(f"**{sum(column) / len(column):.2f}**" for column in zip(*ratios, strict=True))
    scorer = records[0]["scorer"]
    said = f"The scorer names the concept of {scorer['accuracy']:.0%} of {scorer['texts']} texts that it never saw."
    return "\n".join([*lines, f"| mean | | {means} | | |"]) + f"\n\n{said}"


def bars(figures: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    """What was measured of causal graphs, over seeds, beside its bars."""
    lines, bounds = ["| | bar | mean | least to most | holds |", "|---|---|---|---|---|"], {**figures["bars"], **scale["bars"]}
    for name, values in {**figures["figures"], **scale["figures"]}.items():
        said, holds = (bounds[name]["bar"], "yes" if bounds[name]["holds"] else "**no**") if name in bounds else ("", "")
        mean, least, most = (
            f"{v:,.0f}" if v >= 100 else f"{v:.3f}" for v in (sum(values) / len(values), min(values), max(values))
        )
        spread = f"{least} to {most}" if len(values) > 1 else ""
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {said.replace('>=', '≥')} | {mean} | {spread} | {holds} |")
    about = f"Machine: {figures['machine']}, the second for sparse products; torch {figures['torch']}; {figures['seeds']} seeds"
    return "\n".join([*lines, "", f"{about}, at scale one."])


def pictures(text: str) -> str:
    """The parts about the bank of scenes; draws its picture, too."""
    from steerlib.cli import demo

    bank = sl.ConceptBank.from_pretrained("scenes-32")
    demo(only="images", out=README.parent / ".assets" / "scenes.png")
    found = bank.provenance
    parts = {"model": scene_card.examined_line(bank), "levers": scene_card.by_factor(bank)}
    parts |= {"methods": scene_card.methods_table(found["methods"]), "off": scene_card.off_table(found["off"])}
    parts["follow"] = scene_card.followed_table(bank)
    parts |= {"hold": scene_card.holding_table(found["holding"]), "guided": scene_card.guided_table(found["guided"])}
    parts["mediation"] = scene_card.mediation_table(found["mediation"])
    for name, content in (parts | {"windows": scene_card.windows_table(found["windows"])}).items():
        text = put(text, f"scenes-{name}", content)
    return text


def put(text: str, section: str, content: str) -> str:
    """The text with what stands between a section's marks replaced."""
    marks = rf"(<!-- begin: {section} -->\n).*?(<!-- end: {section} -->)"
    assert re.search(marks, text, re.DOTALL), section
    return re.sub(marks, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)


def main(
    bench: Annotated[Path | None, typer.Option(help="figures of bench_steering.py")] = None,
    latents: Annotated[Path | None, typer.Option(help="figures of bench_latents.py")] = None,
    diffusion: Annotated[Path | None, typer.Option(help="figures of bench_diffusion.py")] = None,
    record: Annotated[Path | None, typer.Option(help="figures of bench_record.py")] = None,
    sae: Annotated[Path | None, typer.Option(help="figures of bench_sae_train.py")] = None,
    whole: Annotated[Path | None, typer.Option(help="figures of bench_text_to_encoder.py")] = None,
    coverage: Annotated[Path | None, typer.Option(help="output of coverage_table.py text")] = None,
    pipelines: Annotated[Path | None, typer.Option(help="output of coverage_table.py images")] = None,
    graph: Annotated[Path | None, typer.Option(help="figures of bench_graph.py")] = None,
    scale: Annotated[Path | None, typer.Option(help="figures of bench_graph.py --scale")] = None,
    damage: Annotated[Path | None, typer.Option(help="table that harness.py printed")] = None,
    effects: Annotated[bool, typer.Option(help="run the model for the first example, and write the tables of effects")] = True,
) -> None:
    """Write the measured parts of the README."""
    from steerlib.cli import recipe_of

    text = README.read_text(encoding="utf-8")
    if effects:
        bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
        text, measured = put(text, "output", output(bank, recipe_of(bank, None).source)), records(bank)
        text = put(put(text, "effects", table(measured)), "methods", summary_table(measured))
        sparse = sl.ConceptBank.from_pretrained("smollm2-135m-latents")
        text = put(text, "sparse", latents_table(sparse.provenance["quality"]).partition("\n\n")[0])
        text = put(text, "verified", verified(sparse, 8))
        text = put(text, "text-graph", graph_table(sparse.provenance["graph"]))
        text = pictures(text)
        for name in ("fresh", "unseen"):
            text = put(text, name, unseen(json.loads((RECIPES / name / "measured.json").read_text(encoding="utf-8"))))
    costs = {"cost": bench, "latents": latents, "diffusion": diffusion, "record": record, "whole": whole}
    for section, path in costs.items():
        if path is not None:
            text = put(text, section, cost(json.loads(path.read_text(encoding="utf-8"))))
    if sae is not None:
        text = put(text, "sae", training(json.loads(sae.read_text(encoding="utf-8"))))
    if graph is not None and scale is not None:
        text = put(text, "graphs", bars(*(json.loads(path.read_text(encoding="utf-8")) for path in (graph, scale))))
    for section, path in (("coverage", coverage), ("pipelines", pipelines), ("damage", damage)):
        if path is not None:
            text = put(text, section, path.read_text(encoding="utf-8").strip())
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
