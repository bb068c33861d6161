"""What the gate `answering` tells apart, and edits that act in answers alone: `python scripts/answering.py [--out FILE]`.

Reads the gate of the shipped bank of SmolLM2-135M-Instruct on the same held-out texts as answers, as messages of a user and of
a system, and on prose; then measures each concept on the recipe's evaluation prompts with `tokens="generated"`, beside the
gate and beside no restriction. About 20 minutes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

import steerlib as sl
from steerlib.bank.concepts import Gate
from steerlib.evaluation.comparison import Condition, answer
from steerlib.evaluation.report import UNDEFINED
from steerlib.evaluation.score import joint, ratios
from steerlib.evaluation.text import judge_for
from steerlib.origins import recipe_of
from steerlib.text import progress
from steerlib.training.calibrate.measure import ANSWERING
from steerlib.training.record.activations import answers, tokens

BANK, TEXTS = "smollm2-135m-instruct", 40
MARK = "THE-TEXT"


def turns(model: Any, tokenizer: Any, texts: Sequence[str], prompts: Sequence[str], site: str) -> dict[str, Tensor]:
    """Activations of the same texts in every role, and of prose."""
    asked = [(prompts[i % len(prompts)], text) for i, text in enumerate(texts)]
    found = {"an answer": torch.cat(answers(model, tokenizer, asked, [site], what="as answers")[site])}
    roles = {"a user's message": [{"role": "user", "content": MARK}]}
    roles["a system's message"] = [{"role": "system", "content": MARK}, {"role": "user", "content": prompts[0]}]
    for role, messages in roles.items():
        before = tokenizer.apply_chat_template(messages, tokenize=False).partition(MARK)[0]
        start = len(tokenizer(before, add_special_tokens=False)["input_ids"])
        read = [tokens(model, tokenizer, [before + text], [site], what=role)[site][start - 1 :] for text in texts]
        found[role] = torch.cat(read)  # `tokens` leaves out the first
    return found


def roles(model: Any, tokenizer: Any, bank: sl.ConceptBank, recipe: Any) -> dict[str, dict[str, float]]:
    """By role of a text, the gate's mean reading and on what share of tokens it opens."""
    gate = bank[ANSWERING]
    said = [text for concept in recipe.concepts for text in recipe.read_scoring(concept)[1]]
    site, prompts = bank.site_of(gate), recipe.read_prompts("train")
    found = turns(model, tokenizer, said[:: len(said) // TEXTS], prompts, site)
    found["prose"] = tokens(model, tokenizer, recipe.read_texts(recipe.unrelated), [site], what="prose")[site]
    table = {}
    for role, x in found.items():
        z = bank.rows(gate).reading(x[None])[0, :, 0] / gate.unit
        table[role] = {
            "mean reading": float(z.mean()),
            "opens": float((z > (gate.present or 0.5)).float().mean()),
            "tokens": len(z),
        }
    return table


def restricted(model: Any, tokenizer: Any, bank: sl.ConceptBank, recipe: Any, named: Sequence[str]) -> list[dict[str, Any]]:
    """Joint scores of every concept by where it acts, with those of the plain and of the prompted model."""
    judge, prompts = judge_for(recipe.scorers), recipe.read_prompts("evaluation")
    records = []
    for concept in progress([c for c in recipe.concepts if c.name in named], "concepts"):
        edits = {concept.name: bank[concept.name].useful or 0.0}
        conditions = [
            Condition(name="unsteered"),
            Condition(name="prompted", instruction=bank[concept.name].effects["instruction"]),
            Condition(name="steered", bank=bank, edits=edits),
            Condition(name="in chats only", bank=bank, edits=edits, gate=Gate(ANSWERING)),
            Condition(name="in answers only", bank=bank, edits=edits, tokens="generated"),
        ]
        seeds = range(recipe.seed, recipe.seed + recipe.seeds)
        scores = answer(model, tokenizer, conditions, prompts, judge, seeds=seeds, new_tokens=recipe.new_tokens)
        total = joint(scores, judge.names.index(concept.name)).total
        names = [condition.name for condition in conditions]
        records.append({"concept": concept.name, "joint": {n: total[i].mean(0).tolist() for i, n in enumerate(names)}})
    return records


def table(figures: dict[str, Any]) -> str:
    """Both tables, as Markdown."""
    lines = ["| the same texts as | mean reading | opens on | tokens |", "|---|---|---|---|"]
    lines += [f"| {r} | {v['mean reading']:.2f} | {v['opens']:.0%} | {v['tokens']:,} |" for r, v in figures["roles"].items()]
    names = ("steered", "in chats only", "in answers only")
    lines += ["", "| concept | ratio to prompting, everywhere | in chats only | in answers only |", "|---|---|---|---|"]
    for record in figures["concepts"]:
        found = ratios({name: np.array(cells) for name, cells in record["joint"].items()})
        shown = (f"{found[name]['ratio']:.2f}" if found[name] else UNDEFINED for name in names)
        lines.append(f"| {record['concept']} | {' | '.join(shown)} |")
    spread = (figures["together"][name] for name in names)
    lines.append(f"| together | {' | '.join('**{ratio:.2f}** ({low:.2f} to {high:.2f})'.format(**one) for one in spread)} |")
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="write the figures here as JSON")] = Path("out/answering.json"),
    concept: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
) -> None:
    """Measure and print."""
    bank = sl.ConceptBank.from_pretrained(BANK)
    recipe = recipe_of(bank, None)
    model, tokenizer = sl.load(recipe.source)
    figures: dict[str, Any] = {"roles": roles(model, tokenizer, bank, recipe)}
    figures["concepts"] = restricted(model, tokenizer, bank, recipe, concept or [c.name for c in recipe.concepts])
    cells = [record["joint"] for record in figures["concepts"]]
    figures["together"] = ratios({name: np.concatenate([cell[name] for cell in cells]) for name in cells[0]})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    typer.run(main)
