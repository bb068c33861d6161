"""Does the joint score see what a reader sees? `python scripts/check_score.py [--out FILE]`.

Reads `scripts/score/read.jsonl`: answers of SmolLM2-135M-Instruct under all kinds of steering and asking, each with a grade and
with a mark from 0 to 10 that a person gave it by reading, before any score was computed: how glad is one of this as an answer
to this request with this concept? Scores each by the anchors of its concept, from answers to the development prompts of the
recipe beside it, and compares. About three minutes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from scipy.stats import spearmanr

import steerlib as sl
from steerlib.evaluation.comparison import Condition, answer
from steerlib.evaluation.report import markdown
from steerlib.evaluation.score import Scores, anchors, joint, scored
from steerlib.evaluation.text import Judge, judge_for, nll
from steerlib.text import chat, progress, tokens_of
from steerlib.training.calibrate.doses import DEV_SEEDS
from steerlib.training.recipe import DirectionRecipe

ROOT = Path(__file__).parent
READ = ROOT / "score" / "read.jsonl"
CHOSEN = ("formality", "anger", "hedging", "french")
"""Concepts whose texts were looked at to choose the two constants of the score, `LOOP` and `LEAST`."""
SHOWN = {"score": "joint score", "before": "without variety and language"}
GRADES = ("good", "weak", "off-topic", "wrong language", "loop", "broken")


def scores_of(
    model: Any, tokenizer: Any, recipe: DirectionRecipe, lines: Sequence[dict[str, Any]]
) -> list[tuple[float, float]]:
    """The joint score of every text, and the score before it had terms for repetition and language."""
    judge, prompts = judge_for(recipe.scorers), recipe.read_prompts("dev")
    found: list[tuple[float, float]] = [(0.0, 0.0)] * len(lines)
    for concept in progress([c for c in recipe.concepts if any(c.name == line["concept"] for line in lines)], "concepts"):
        asked = [Condition(name="prompted", instruction=instruction) for instruction in concept.asked]
        plain = answer(
            model,
            tokenizer,
            [Condition(name="unsteered"), *asked],
            prompts,
            judge,
            seeds=DEV_SEEDS,
            new_tokens=recipe.new_tokens,
        )
        column, own = judge.names.index(concept.name), [i for i, line in enumerate(lines) if line["concept"] == concept.name]
        by = anchors(plain, column, prompted=range(1, 1 + len(asked)))
        said = joint(measured(model, tokenizer, [lines[i] for i in own], prompts, judge), column, by=by)
        for k, i in enumerate(own):
            at = (k, 0, prompts.index(lines[i]["prompt"]))
            found[i] = float(said.total[at]), float(said.before[at])
    return found


def measured(model: Any, tokenizer: Any, lines: Sequence[dict[str, Any]], prompts: Sequence[str], judge: Judge) -> Scores:
    """Of every text as an answer to each request, in one column for each; that of its own request is the one to read."""
    requests = [chat(tokenizer, line["prompt"]) for line in lines]
    texts = [line["text"] for line in lines]
    new = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    done = tokens_of(model, tokenizer, requests, (new["input_ids"], new["attention_mask"].bool()), texts)
    likelihood = nll(model, done)[:, None, None].repeat(len(prompts), 2)
    return scored([[[line["text"]] * len(prompts)] for line in lines], likelihood, prompts, judge)


def compared(lines: Sequence[dict[str, Any]], scores: Sequence[float]) -> dict[str, Any]:
    """Rank correlation with the marks, loops that are not below every good text of their concept, and means by grade."""
    ranks: Any = spearmanr([line["mark"] for line in lines], scores)
    others = [i for i, line in enumerate(lines) if line["concept"] not in CHOSEN]
    apart: Any = spearmanr([lines[i]["mark"] for i in others], [scores[i] for i in others])
    above = [
        (line["concept"], line["text"][:60])
        for i, line in enumerate(lines)
        if line["grade"] == "loop"
        and any(
            scores[i] >= scores[j]
            for j, other in enumerate(lines)
            if other["grade"] == "good" and other["concept"] == line["concept"]
        )
    ]
    means = {grade: float(np.mean([scores[i] for i, line in enumerate(lines) if line["grade"] == grade])) for grade in GRADES}
    return {
        "spearman": float(ranks.statistic),
        "of other concepts": float(apart.statistic),
        "loops above good texts": above,
        "means": means,
    }


def table(figures: dict[str, Any]) -> str:
    """Both scores, as Markdown."""
    rows = []
    for name in ("score", "before"):
        found = figures[name]
        loops = str(len(found["loops above good texts"]))
        correlations = [f"{found[key]:.2f}" for key in ("spearman", "of other concepts")]
        rows.append([SHOWN[name], *correlations, loops, *(f"{found['means'][grade]:.2f}" for grade in GRADES)])
    return markdown(
        " | ".join(
            ["", "rank correlation with reading", "of concepts not looked at", "loops not below every good text", *GRADES]
        ),
        rows,
    )


def main(
    out: Annotated[Path, typer.Option(help="write the figures here as JSON")] = Path("out/score.json"),
) -> None:
    """Measure and print."""
    recipe = DirectionRecipe.from_file(READ.with_name("recipe.toml"), to_train=False)
    model, tokenizer = sl.load(recipe.source)
    lines = [json.loads(line) for line in READ.read_text(encoding="utf-8").splitlines()]
    both = scores_of(model, tokenizer, recipe, lines)
    figures = {name: compared(lines, [pair[k] for pair in both]) for k, name in enumerate(("score", "before"))}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures | {"texts": len(lines), "scores": both}, indent=1) + "\n", encoding="utf-8")
    print(table(figures))


if __name__ == "__main__":
    typer.run(main)
