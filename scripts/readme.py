"""Write the measured parts of the READMEs: `python scripts/readme.py`, with the files of whatever was measured anew.

A part stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->` in the README of the folder that it is about, and is
replaced there. Without options: the first example is run for its answers, the other tables are taken from the shipped banks and
from what `unseen.py` wrote. Each option names the file with the figures of one benchmark, made by its own `--out`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from answering import table as answering
from benchmarks import sections
from causes import table as causes_table
from check_score import table as read_table
from contexts import table as contexts_table
from edge_meaning import table as meaning_table
from edges_again import table as edges_again_table
from measure_scenes import by_factor, damage
from measure_scenes import table as scenes_table
from named import table as named
from quads import table as quads_table
from side_effects import table as side_effects_table

import steerlib as sl
from steerlib.evaluation.report import UNDEFINED
from steerlib.evaluation.report import of as ratio_of
from steerlib.text import chat, complete
from steerlib.training.calibrate.measure import GATED

ROOT = Path(__file__).parent.parent
READMES = [
    ROOT / folder / "README.md" for folder in (".", "concept_banks", "hooks", "scripts", "steerlib", "steerlib/training")
]
RECIPES = ROOT / "concept_banks" / "recipes"
READMES.append(RECIPES / "scenes-32" / "README.md")
put = partial(sections.put, READMES)
ASKED = (("Tell me about your day.", ("sports", "science"), 2), ("Describe a perfect morning.", ("science", "fantasy"), 1))
"""Prompts of the first example, the concepts that each is steered by, and how many sentences are shown."""
SHOWN = 260
"""Letters of an answer that are shown of scopes."""


def output(bank: sl.ConceptBank, source: str) -> str:
    """Answers, unsteered and steered."""
    model, tokenizer = sl.load(source)
    lines = ["| asked | steered by | answer |", "|---|---|---|"]
    for prompt, names, sentences in ASKED:
        for name in (None, *names):
            edits = {name: round(bank[name].useful or 1.0, 2)} if name else {}
            with sl.steer(model, bank, edits):
                text = complete(model, tokenizer, [chat(tokenizer, prompt)], new_tokens=48).texts[0]
            shown = " ".join(re.split(r"(?<=[.!?])\s+", " ".join(text.split()))[:sentences])
            how = f"`{name}` {edits[name]:+.2f}" if name else "nothing"
            lines.append(f"| {'' if name else prompt} | {how} | {shown} |".replace("|  |", "| |"))
    return "\n".join(lines)


def scopes(bank: sl.ConceptBank, source: str) -> str:
    """Answers to look at: swaps, a concept without another, a part of an answer, a gate that the prompt decides."""
    model, tokenizer = sl.load(source)
    fantasy, religion = (bank[name].useful or 1.0 for name in ("fantasy", "religion"))
    gated = sl.Add(religion, gate=sl.Gate("science.present", above=0.6, over="prompt"))
    team, morning, code = (
        "Tell me about my favourite football team.",
        "Describe a perfect morning.",
        "Write a Python function that adds two numbers, and explain it.",
    )
    asked: list[tuple[str, str, dict[Any, Any]]] = [
        (team, "nothing", {}),
        ("", '`"sports": Swap("finance")`', {"sports": sl.Swap("finance")}),
        ("", '`"sports": Swap("music")`', {"sports": sl.Swap("music")}),
        (morning, "`fantasy`", {"fantasy": fantasy}),
        ("", "`fantasy` without `nature`", {bank["fantasy"] - bank["nature"]: fantasy}),
        (code, "`fantasy`", {"fantasy": fantasy}),
        ("", '`fantasy`, `tokens="not-code"`', {"fantasy": sl.Add(fantasy, tokens="not-code")}),
        ("Explain how vaccines work in the body.", "`religion`, if the prompt is of science", {"religion": gated}),
        ("Tell me about my savings account.", "`religion`, if the prompt is of science", {"religion": gated}),
    ]
    lines, prompt = ["| asked | steered by | answer |", "|---|---|---|"], ""
    for said, how, edits in asked:
        prompt = said or prompt
        with sl.steer(model, bank, edits, tokenizer=tokenizer):
            text = complete(model, tokenizer, [chat(tokenizer, prompt)], new_tokens=90).texts[0]
        lines.append(f"| {said} | {how} | {' '.join(text.split())[:SHOWN]} … |".replace("|  |", "| |"))
    return "\n".join(lines)


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
        "| concept | made by | ratio to prompting | in chats only | best random | shuffled labels | KL, gated | specificity |"
    ]
    lines, ratios = [*lines, "|---|---|---|---|---|---|---|---|"], []
    for record in records:
        found = record["conditions"]
        if "ratio" in found["steered"]:
            random = max(line["ratio"] for name, line in found.items() if name.startswith("random-"))
            ratios.append([random if name == "random" else found[name]["ratio"] for name in names])
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios[-1])
        else:
            cells = " | ".join([UNDEFINED] * len(names))
        kl = f"{found['steered']['kl']:.2f}, {found[GATED]['kl']:.2f}"
        method = f"{record['method']} at {record['site']}"
        lines.append(f"| {record['concept']} | {method} | {cells} | {kl} | {found['steered']['specificity']:.2f} |")
    means = " | ".join(f"**{sum(column) / len(column):.2f}**" for column in zip(*ratios, strict=True))
    scorer = records[0]["scorer"]
    said = f"The scorer names the concept of {scorer['accuracy']:.0%} of {scorer['texts']} texts that it never saw."
    return "\n".join([*lines, f"| mean | | {means} | | |"]) + f"\n\n{said}"


def bars(figures: Mapping[str, Any], *more: Mapping[str, Any]) -> str:
    """What was measured of causal graphs, over seeds, beside its bars."""
    lines = ["| | bar | mean | least to most | holds |", "|---|---|---|---|---|"]
    found, bounds = ({k: v for run in (figures, *more) for k, v in run[part].items()} for part in ("figures", "bars"))
    for name, values in found.items():
        said, holds = (bounds[name]["bar"], "yes" if bounds[name]["holds"] else "**no**") if name in bounds else ("", "")
        mean, least, most = (
            f"{v:,.0f}" if v >= 100 else f"{v:.3f}" for v in (sum(values) / len(values), min(values), max(values))
        )
        spread = f"{least} to {most}" if len(values) > 1 else ""
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {said.replace('>=', '≥')} | {mean} | {spread} | {holds} |")
    about = f"Machine: {figures['machine']}, the second for sparse products; torch {figures['torch']}; {figures['seeds']} seeds"
    return "\n".join([*lines, "", f"{about}{', at scale one' if more else ''}."])


def signs(figures: Mapping[str, Any]) -> str:
    """How often a direction moved its word's logit as foretold."""
    lines = ["| added | of the foretold sign | mean change of the logit |", "|---|---|---|"]
    lines += [
        f"| {n} | {v['predicted sign']:.1%} | {v['mean change of the logit']:+.3f} |" for n, v in figures["added"].items()
    ]
    said = f"at `{figures['site']}`, directions from {figures['texts']} texts of {figures['tokens of each']} tokens"
    return "\n".join([*lines, "", f"{figures['words tested']} words, seed {figures['seed']}, {said}."])


def ported(made: sl.ConceptBank) -> str:
    """Concepts of a bank made for another model, beside the bank whose recipe it was made by."""
    shipped = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    head = "concept | model | made by | score: unsteered, prompted, steered | best random | ratio to prompting"
    loops = "repeated trigrams of greedy answers: unsteered, prompted, steered"
    lines = [f"| {head} | specificity | KL | {loops} |", "|---" * 9 + "|"]
    for name in (concept.name for concept in made.concepts.values() if "conditions" in concept.effects):
        for bank in (shipped, made):
            record = bank[name].effects
            found = record["conditions"]
            scores = ", ".join(f"{found[way]['score']:.2f}" for way in ("unsteered", "prompted", "steered"))
            random = max(line["score"] for way, line in found.items() if way.startswith("random-"))
            ratio = ratio_of(record["joint"])
            sides = [f"{found['steered'][what]:.2f}" for what in ("specificity", "kl")]
            loops = ", ".join(f"{record['loops'][way]:.2f}" for way in ("unsteered", "prompted", "steered"))
            cells = [f"{record['method']} at {record['site']}", scores, f"{random:.2f}", ratio, *sides, loops]
            lines.append(f"| {name if bank is shipped else ''} | {bank.base.id} | {' | '.join(cells)} |".replace("|  |", "| |"))
    answers = {bank.base.id: next(iter(bank.concepts.values())).effects["answers"] for bank in (shipped, made)}
    said = "; ".join(f"{id}: {count} answers to each condition" for id, count in answers.items())
    rough = " The second bank is a rough one (`--quick`)." if made.provenance.get("quick") else ""
    return "\n".join(lines) + f"\n\n{said}.{rough}"


def from_names(found: Sequence[Path]) -> str:
    """Concepts made from their names alone, a table a model."""
    return "\n\n".join(named(json.loads(path.read_text(encoding="utf-8"))) for path in found)


def examined(found: Mapping[str, Any]) -> str:
    """How often the unsteered model draws what captions ask for: what `train_scenes.py` wrote."""
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found["as asked"].items())
    return f"Of {found['captions']:,} captions that it was never trained on, drawn as asked, unsteered: {shares}."


def from_banks() -> None:
    """The parts that need no file: the first example, new concepts, and levers of pictures; draws the pictures, too."""
    from steerlib.cli import Half, demo
    from steerlib.origins import recipe_of

    bank = sl.ConceptBank.from_pretrained("smollm2-135m-instruct")
    put("output", output(bank, recipe_of(bank, None).source))
    put("scopes", scopes(bank, recipe_of(bank, None).source))
    put("named", from_names(sorted((RECIPES / "named").glob("*.json"), reverse=True)))
    for name in ("fresh", "unseen"):
        put(name, unseen(json.loads((RECIPES / name / "measured.json").read_text(encoding="utf-8"))))
    scenes = json.loads((RECIPES / "scenes-32" / "measured.json").read_text(encoding="utf-8"))
    put("scenes-examined", examined(json.loads((RECIPES / "scenes-32" / "examined.json").read_text(encoding="utf-8"))))
    put("scenes-levers", by_factor(scenes))
    put("scenes-values", f"{scenes_table(scenes)}\n\n{damage(scenes)}")
    demo(only=Half("images"), out=ROOT / ".assets" / "scenes.png")


COSTS = {
    "cost": "steering", "latents": "latents", "diffusion": "diffusion", "switched": "switched", "rebuilt": "rebuilt",
    "record": "record", "whole": "whole", "gpu": "gpu",
}  # fmt: skip
"""Tables of cost by section, and the option that names the figures of each."""
TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    **{name: (option, cost) for name, option in COSTS.items()},
    "sae": ("sae", training),
    "answering": ("answers", answering),
    "score": ("score", read_table),
    "words": ("words", signs),
    "quads": ("quads", quads_table),
    "quads-64": ("quads_64", quads_table),
    "quads-long": ("quads_long", quads_table),
    "contexts": ("contexts", contexts_table),
    "side-effects": ("side_effects", side_effects_table),
    "edge-meaning": ("meaning", meaning_table),
    "edges-again": ("edges_again", edges_again_table),
    "wholes": ("wholes", bars),
    "causes": ("causes", causes_table),
}
"""By section, the option that names its figures, and the table that is made of them."""


def write(given: Mapping[str, Any]) -> None:
    """Every part of which something is given, by the name of its option."""
    if given["banks"]:
        from_banks()
    for section, (option, table) in TABLES.items():
        if given[option] is not None:
            put(section, table(json.loads(given[option].read_text(encoding="utf-8"))))
    if given["port"] is not None:
        put("port", ported(sl.ConceptBank.from_pretrained(str(given["port"]))))
    if given["graph"] is not None and given["scale"] is not None:
        put("graphs", bars(*(json.loads(given[name].read_text(encoding="utf-8")) for name in ("graph", "scale"))))
    for section in ("coverage", "pipelines", "fits", "damage", "scenes-graph"):
        if (path := given[section.replace("-", "_")]) is not None:
            put(section, path.read_text(encoding="utf-8").strip())


def main(
    steering: Annotated[Path | None, typer.Option(help="figures of bench_steering.py")] = None,
    latents: Annotated[Path | None, typer.Option(help="figures of bench_latents.py")] = None,
    diffusion: Annotated[Path | None, typer.Option(help="figures of bench_diffusion.py")] = None,
    switched: Annotated[Path | None, typer.Option(help="figures of bench_diffusion.py of a context module alone")] = None,
    rebuilt: Annotated[Path | None, typer.Option(help="figures of bench_beside.py")] = None,
    record: Annotated[Path | None, typer.Option(help="figures of bench_record.py")] = None,
    sae: Annotated[Path | None, typer.Option(help="figures of bench_sae_train.py")] = None,
    whole: Annotated[Path | None, typer.Option(help="figures of bench_text_to_encoder.py")] = None,
    gpu: Annotated[Path | None, typer.Option(help="figures of check_gpu.py")] = None,
    answers: Annotated[Path | None, typer.Option(help="figures of answering.py")] = None,
    score: Annotated[Path | None, typer.Option(help="figures of check_score.py")] = None,
    graph: Annotated[Path | None, typer.Option(help="figures of bench_graph.py")] = None,
    scale: Annotated[Path | None, typer.Option(help="figures of bench_graph.py --scale; both or none")] = None,
    wholes: Annotated[Path | None, typer.Option(help="figures of bench_graph.py --wholes")] = None,
    coverage: Annotated[Path | None, typer.Option(help="output of coverage_table.py text")] = None,
    pipelines: Annotated[Path | None, typer.Option(help="output of coverage_table.py images")] = None,
    fits: Annotated[Path | None, typer.Option(help="output of coverage_table.py fits")] = None,
    port: Annotated[Path | None, typer.Option(help="a bank that steerlib port made of the shipped one")] = None,
    damage: Annotated[Path | None, typer.Option(help="table that harness.py printed")] = None,
    words: Annotated[Path | None, typer.Option(help="figures of word_signs.py")] = None,
    scenes_graph: Annotated[Path | None, typer.Option(help="table that scenes.graph printed")] = None,
    quads: Annotated[Path | None, typer.Option(help="figures of quads.py")] = None,
    quads_64: Annotated[Path | None, typer.Option(help="figures of quads.py --side 64")] = None,
    quads_long: Annotated[Path | None, typer.Option(help="figures of quads.py --steps 12000 --rate 3e-3")] = None,
    contexts: Annotated[Path | None, typer.Option(help="figures of contexts.py")] = None,
    side_effects: Annotated[Path | None, typer.Option(help="figures of side_effects.py")] = None,
    meaning: Annotated[Path | None, typer.Option(help="figures of edge_meaning.py")] = None,
    edges_again: Annotated[Path | None, typer.Option(help="figures of edges_again.py")] = None,
    causes: Annotated[Path | None, typer.Option(help="figures of causes.py")] = None,
    banks: Annotated[bool, typer.Option(help="run the first example, and read the shipped banks")] = True,
) -> None:
    """Write the measured parts of the READMEs."""
    write(locals())


if __name__ == "__main__":
    typer.run(main)
