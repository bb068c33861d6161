"""What steering breaks of what a model knows: `python scripts/harness.py [--concept music] [--limit 20] [--out damage.json]`.

lm-evaluation-harness, unsteered, with each concept at its useful amount, and with a random direction of equal length at the
same site. The default task needs no download. Never give the harness `use_cache`: its cache does not record what was steered.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import chdir
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

import steerlib as sl
from steerlib.errors import BadRecipe, MissingExtra
from steerlib.evaluation.comparison import random_bank
from steerlib.origins import recipe_of, recipes
from steerlib.text import progress

try:
    evaluator, huggingface, tasks_of = map(import_module, ("lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks"))
except ImportError:
    raise MissingExtra("this needs lm-evaluation-harness: pip install 'steerlib[harness]'") from None
TASKS, OWN = recipes() / "smollm2-135m-instruct" / "harness", "steerlib_cloze"


def conditions(bank: sl.ConceptBank, names: Sequence[str], seed: int) -> dict[str, tuple[sl.ConceptBank, dict[str, float]]]:
    """What is compared, by name: a bank and the amounts to steer by."""
    chosen = {"unsteered": (bank, {})}
    for concept in [bank[name] for name in names or [c.name for c in bank.concepts.values() if c.useful is not None]]:
        if (amount := concept.useful) is None:
            raise BadRecipe(f"{concept.name!r} has no useful amount yet; calibrate the bank first")
        chosen[f"{concept.name} {amount:+.2f}"] = bank, {concept.name: amount}
        chosen[f"random for {concept.name}"] = random_bank(concept, bank, count=1, seed=seed), {"random-1": amount}
    return chosen


def evaluate(lm: Any, tasks: Sequence[str], *, limit: int | None = None) -> dict[str, Any]:
    """What the harness finds for a model as it stands, steered or not, with every item's answer."""
    manager = tasks_of.TaskManager(include_path=str(TASKS), include_defaults={*tasks} != {OWN})  # others take seconds to list
    with chdir(TASKS):  # the harness looks for a task's items from here
        return evaluator.simple_evaluate(lm, tasks=[*tasks], limit=limit, task_manager=manager)


def row(task: str, plain: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one task under one condition, and how its items flipped against the same task unsteered."""
    scores = {name: found["results"][task].get(f"{name},none") for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}
    before, after = ({s["doc_id"]: s["acc"] == 1 for s in result["samples"][task]} for result in (plain, found))
    broken, mended = (sum(before[i] is was and after[i] is not was for i in before) for was in (True, False))
    return {**scores, "items": len(before), "right_to_wrong": broken, "wrong_to_right": mended}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """One task as a Markdown table, one row a condition."""
    lines = ["| | acc ± stderr | acc_norm ± stderr | right → wrong | wrong → right | flips to wrong |\n|" + "---|" * 6]
    for name, r in rows.items():
        scores = ["–" if r[s] is None else f"{r[s]:.3f} ± {r[s + '_stderr']:.3f}" for s in ("acc", "acc_norm")]
        broken, mended = r["right_to_wrong"], r["wrong_to_right"]
        share = f"{broken / (broken + mended):.0%}" if broken + mended else "–"
        lines.append(f"| {name} | {' | '.join(scores)} | {broken} | {mended} | {share} |")
    return "\n".join(lines)


def main(
    bank: Annotated[str, typer.Option(help="a folder, a shipped bank, or a Hub id")] = "smollm2-135m-instruct",
    concept: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(help="items of each task", min=2)] = None,
    tasks: Annotated[str, typer.Option(help="of the harness, with commas between; each must give `acc`")] = OWN,
    seed: Annotated[int, typer.Option(help="of the random directions")] = 0,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Print what steering breaks and mends."""
    opened = sl.ConceptBank.from_pretrained(bank)
    chosen, found = conditions(opened, concept, seed), {}
    model, tokenizer = sl.load(recipe_of(opened, None).source)
    lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    for name in progress(list(chosen), "conditions"):
        with sl.steer(model, *chosen[name]):
            found[name] = evaluate(lm, tasks.split(","), limit=limit)
    figures = {t: {n: row(t, found["unsteered"], f) for n, f in found.items()} for t in found["unsteered"]["samples"]}
    print("\n".join(f"{task}, {rows['unsteered']['items']} items\n\n{table(rows)}\n" for task, rows in figures.items()))
    if out is not None:
        made = {name: import_module(name).__version__ for name in ("lm_eval", "torch", "transformers")}
        out.write_text(json.dumps({"bank": bank, "limit": limit, "seed": seed, **made, "tasks": figures}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
