"""What concepts of the text bank do to answers beside their own effect, foretold and spared: `python scripts/side_effects.py`.

Moves each concept of the shipped bank alone on requests to learn from, which gives a graph of answers. Then, on requests that
nothing was made from, holds its forecasts against what happens, and compares the amounts that `do="spare"` plans with plain
edits, with `do="hold"`, and with the same amounts dealt to other concepts than those that are carried along. In bfloat16; goes
on where it stopped. With `--into` the bank with the graph is written to a folder.

`M` requests   `O` outcomes   said, happened  mean changes of pairs: a concept, an outcome of another name
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from scipy.special import softmax

import steerlib as sl
from steerlib.evaluation.comparison import TEMPERATURE, Condition, Unrelated, answer
from steerlib.evaluation.report import markdown
from steerlib.evaluation.score import kept_apart
from steerlib.evaluation.text import judge_for, repeated
from steerlib.graph.edge import ANSWERS
from steerlib.origins import recipe_of
from steerlib.steering.sparing import spared
from steerlib.text import chat, complete, progress
from steerlib.training.carry import RECIPE, carried
from steerlib.training.discover.answered import foretold
from steerlib.training.discover.concept_graph import Moved
from steerlib.training.discover.text_graph import r2, scores
from steerlib.training.package.directions import with_answers
from steerlib.training.store import remembered

BANK, PART, NEW = "smollm2-135m-instruct", 0.6, 40
"""The bank; the share of useful amounts at which nothing was learned; tokens of an answer."""
LEARN, SEEDS, SHOWN, DEALT, DRAWN = 24, range(10, 13), 10, 200, 1000
"""Requests to learn from; seeds of what is measured; greedy answers that are kept for reading; how often effects are dealt, and
requests drawn again."""
NEVER_USED = (
    "Describe the view from a bridge at noon.", "Tell me about something you lost and found again.",
    "Write a short message to a new neighbour.", "Explain why people wait in queues.", "How do I keep a promise?",
    "What would you do with an empty room?", "Describe a market early in the morning.", "Tell me a story about a key.",
    "Write a note to whoever finds this bottle.", "Explain what makes a place feel like home.", "How do I ask for help?",
    "What makes a good question?", "Describe the sound of an old house.", "Tell me about a long walk.",
    "Write a review of a very ordinary chair.", "Explain how habits begin.", "How should I spend a rainy afternoon?",
    "What do two old friends talk about?", "Describe someone waiting at a station.", "Tell me about a gift nobody expected.",
    "Write the first lines of a diary.", "Explain why maps are useful.", "How do I learn from a failure?",
    "What is worth remembering about today?",
)  # fmt: skip
"""Requests that nothing was made from or chosen with."""


Edits = Mapping[str, Mapping[str, float]]
"""By concept, the amounts, in units, that move it."""


class Told(NamedTuple):
    """What a judge says of an arm's answers, means over seeds."""

    evidence: NDArray[Any]
    """`[M, O]`, logits."""
    points: NDArray[Any]
    """`[M, O]`, what the bank's specificity is counted in."""
    repeated: float
    """Share of repeated trigrams."""


class Study:
    """A bank, its model, and answers, which `work` keeps."""

    def __init__(self, bank: sl.ConceptBank, work: Path):
        self.bank, self.recipe, self.work = bank, recipe_of(bank, None), work
        self.useful = {own.name: own.useful for own in bank.concepts.values() if own.useful is not None}
        self.judge = judge_for(self.recipe.scorers)

    @cached_property
    def model(self) -> tuple[Any, Any]:
        model, tokenizer = sl.load(self.recipe.source)
        return model.to(torch.bfloat16), tokenizer

    @cached_property
    def made(self) -> sl.ConceptBank:
        """With the graph from answers to requests that concepts were made from, as `steerlib train` makes it of it."""
        recipe = replace(self.recipe, answers=LEARN)
        made = with_answers(*self.model, self.bank, recipe, self.judge, self.work)
        return made.with_concepts(files={**made.files, RECIPE: carried(recipe)})

    @property
    def graph(self) -> sl.CausalGraph:
        return self.made.graph

    @cached_property
    def spare(self) -> dict[str, dict[str, float]]:
        """Of concepts that carry others along, the amounts that `do="spare"` plans."""
        found = {}
        for name, useful in self.useful.items():
            planned: Any = spared(self.made, {name: sl.Add(useful)})
            found[name] = {other: edit.amount for other, edit in planned.items()}
        return {name: own for name, own in found.items() if len(own) > 1}

    @cached_property
    def dealt(self) -> dict[str, dict[str, float]]:
        """The same with the amounts of spared concepts, in useful amounts, given to others."""
        random, found = np.random.default_rng(1), {}
        for name, own in self.spare.items():
            free = [other for other in self.useful if other not in own]
            taken = [free[i] for i in random.choice(len(free), len(own) - 1, replace=False)]
            shares = [own[other] / self.useful[other] for other in own if other != name]
            found[name] = {name: own[name]} | {o: share * self.useful[o] for o, share in zip(taken, shares, strict=True)}
        return found

    @property
    def ways(self) -> dict[str, Edits]:
        """What is measured beside holding."""
        full = {name: {name: useful} for name, useful in self.useful.items()}
        part = {name: {name: PART * useful} for name, useful in self.useful.items()}
        return {"plain": full, "part": part, "spare": self.spare, "dealt": self.dealt}

    @cached_property
    def answers(self) -> dict[str, dict[str, Told]]:
        """By way and concept, answers to requests never used as the judge reads them; of `unsteered` under no name."""
        kept = lambda name, make: remembered(self.work / f"{name}.json", make)  # noqa: E731
        found = {"unsteered": {"": self._told(kept("unsteered", lambda: self._answered({"": {}}))[0])}}
        for way, edits in self.ways.items():
            texts = kept(way, lambda edits=edits: self._answered(edits))
            found[way] = {name: self._told(own) for name, own in zip(edits, texts, strict=True)}
        held = {name: kept(f"hold {name}", lambda n=name: self._held(n)) for name in progress([*self.spare], "holding")}
        return {**found, "hold": {name: self._told(texts) for name, texts in held.items()}}

    def _told(self, texts: Sequence[Sequence[str]]) -> Told:
        """`texts[seed][request]`"""
        flat, shape = [text for some in texts for text in some], (len(texts), len(NEVER_USED), -1)
        evidence, points = (score(flat).reshape(shape).mean(0) for score in (self.judge.evidence, self.judge))
        return Told(evidence, points, float(np.mean([repeated(text) for text in flat])))

    def _answered(self, edits: Edits, seeds: Sequence[int | None] = SEEDS, prompts: Sequence[str] = NEVER_USED) -> list[Any]:
        conditions = [Condition(name=name, bank=self.bank, edits=own) for name, own in edits.items()]
        return answer(*self.model, conditions, prompts, self.judge, seeds=seeds, new_tokens=NEW).texts

    def _held(self, name: str) -> list[list[str]]:
        model, tokenizer = self.model
        asked, others = [chat(tokenizer, prompt) for prompt in NEVER_USED], [own for own in self.useful if own != name]
        with sl.steer(model, self.bank, {name: self.useful[name]}, do="hold", hold=others):
            how: dict[str, Any] = {"new_tokens": NEW, "temperature": TEMPERATURE}
            return [complete(model, tokenizer, asked, seed=seed, **how).texts for seed in SEEDS]

    def kl(self) -> dict[str, dict[str, float]]:
        """KL on unrelated text of plain and spared edits that differ, in nats per token."""

        def measure() -> dict[str, dict[str, float]]:
            text = Unrelated(*self.model, self.recipe.read_texts(self.recipe.unrelated))
            told = lambda own: text.side_effects(Condition(name="", bank=self.bank, edits=own)).kl  # noqa: E731
            return {way: {name: told(self.ways[way][name]) for name in self.spare} for way in ("plain", "spare")}

        return remembered(self.work / "kl.json", measure)

    def greedy(self) -> dict[str, dict[str, list[str]]]:
        """Greedy answers to some requests, to be read."""
        found, some = {"unsteered": {"": {}}}, NEVER_USED[:SHOWN]
        found |= {way: {name: self.ways[way][name] for name in self.spare} for way in ("plain", "spare")}

        def write() -> dict[str, dict[str, list[str]]]:
            texts = {way: self._answered(edits, [None], some) for way, edits in found.items()}
            return {way: {name: own[0] for name, own in zip(found[way], texts[way], strict=True)} for way in found}

        return remembered(self.work / "greedy.json", write)


def forecasts(study: Study, way: str) -> dict[str, Any]:
    """How well the graph tells what other outcomes do, beside the same effects dealt among its edges."""
    rows = foretold(study.graph, changes(study, way, "evidence"), study.judge.names)
    said, happened = (np.array([getattr(row, name).mean() for row in rows]) for name in ("said", "happened"))
    error = np.array([row.happened.std(ddof=1) / np.sqrt(len(row.happened)) for row in rows])
    away, random, told = np.abs(happened) > 2 * error, np.random.default_rng(0), np.flatnonzero(said)
    chance = []
    for _ in range(DEALT):
        dealt = said.copy()
        dealt[told] = said[random.permutation(told)]
        chance.append((r2(dealt, happened), _signs(dealt, happened, away)["sign"]))
    found = {name: value for name, value in scores(rows).items() if name.startswith("r2")}
    found |= {"pairs": len(rows), "with an edge": len(told), **_signs(said, happened, away)}
    return found | dict(zip(("dealt", "dealt sign"), np.mean(chance, 0).tolist(), strict=True)) | _points(study, way)


def changes(study: Study, way: str, what: str) -> list[Moved]:
    """What each concept that is moved alone did to requests never used."""
    before, amounts = getattr(study.answers["unsteered"][""], what), study.ways[way]
    return [Moved(name, amounts[name][name], getattr(own, what) - before) for name, own in study.answers[way].items()]


def _signs(said: NDArray[Any], happened: NDArray[Any], away: NDArray[Any]) -> dict[str, Any]:
    """Of pairs that surely moved and have an edge, in how many it says the direction."""
    both = away & (said != 0)
    return {"told": int(both.sum()), "sign": float((np.sign(said) == np.sign(happened))[both].mean())}


def _points(study: Study, way: str) -> dict[str, float]:
    """The same for probabilities, as the table of the bank's specificity has them: forecasts are added to the evidence of
    unsteered answers."""
    base, names, said, happened = study.answers["unsteered"][""].evidence, study.judge.names, [], []
    for own in changes(study, way, "points"):
        told = study.graph.forecast({own.name: own.amount})
        change = np.array([told.get(ANSWERS + name, 0.0) for name in names])
        others = [k for k, name in enumerate(names) if name != own.name]
        said.append((softmax(base + change, 1) - softmax(base, 1)).mean(0)[others])
        happened.append(own.d.mean(0)[others])
    return {"r2 of probabilities": r2(np.concatenate(said), np.concatenate(happened))}


def measured(study: Study) -> dict[str, Any]:
    """All figures."""
    before, kl, found = study.answers["unsteered"][""], study.kl(), dict[str, dict[str, Any]]()
    for way in WAYS:
        for name, told in study.answers[way].items():
            own, gains = study.judge.names.index(name), told.points - before.points
            amounts = study.ways.get(way, {}).get(name, {})
            found.setdefault(name, {})[way] = {
                "gain": float(gains.mean(0)[own]),
                "specificity": kept_apart(gains.mean(0), own),
                "kl": kl.get(way, {}).get(name),
                "repeated": told.repeated,
                "amounts": {other: amount / study.useful[other] for other, amount in amounts.items()},
                "gains": gains.round(5).tolist(),
                "column": own,
            }
    told = {"useful amount": forecasts(study, "plain"), f"{PART} of it": forecasts(study, "part")}
    return {"forecasts": told, "concepts": found, "repeated": before.repeated, "greedy": study.greedy()}


def ahead(concepts: Sequence[Mapping[str, Any]], other: str) -> tuple[float, float, float]:
    """By how much `spare` is more specific than another way, a mean over concepts; 95 % interval by bootstrap over requests."""
    random = np.random.default_rng(0)
    pairs = [[(np.array(own[w]["gains"]), own[w]["column"]) for w in ("spare", other)] for own in concepts]
    count = len(pairs[0][0][0])
    picks = [np.arange(count), *random.integers(0, count, (DRAWN, count))]
    found = [np.mean([kept_apart(x[p].mean(0), k) - kept_apart(y[p].mean(0), k) for (x, k), (y, _) in pairs]) for p in picks]
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return float(found[0]), float(low), float(high)


WAYS = ("plain", "hold", "spare", "dealt")


def table(figures: Mapping[str, Any]) -> str:
    """Both tables, as Markdown."""
    head = "amount | R² | R², probabilities | right sign | dealt: R² | dealt: right sign | pairs with an edge, of all"
    concepts = figures["concepts"]
    carrying = [own for own in concepts.values() if "spare" in own]
    lines = [
        [name, *(_cell(own[way]) if way in own else "as plain" if way == "spare" else "" for way in WAYS), _amounts(own)]
        for name, own in sorted(concepts.items())
    ]
    lines.append([f"**mean of these {len(carrying)}**", *(_mean([own[way] for own in carrying]) for way in WAYS), ""])
    whole = {way: [own.get(way, own["plain"]) for own in concepts.values()] for way in ("plain", "spare")}
    lines.append([f"**mean of all {len(concepts)}**", *(_mean(whole[way]) if way in whole else "" for way in WAYS), ""])
    more = ["{} {:+.2f} ({:+.2f} to {:+.2f})".format(way, *ahead(carrying, way)) for way in WAYS if way != "spare"]
    said = f"Specificity of `spare`, on these {len(carrying)}, less that of {', of '.join(more)}."
    return "\n\n".join(
        [
            markdown(head, [[name, *_told(own)] for name, own in figures["forecasts"].items()]),
            markdown(f"concept | {' | '.join(WAYS)} | amounts of `spare`, in useful amounts", lines),
            f"{said} Unsteered answers repeat {figures['repeated']:.3f} of their trigrams.",
        ]
    )


def _told(own: Mapping[str, Any]) -> list[str]:
    whole = "{:.2f} ({:.2f} to {:.2f})".format(own["r2"], *own["r2 interval"])
    right = f"{own['sign']:.0%} of {own['told']}"
    dealt = [f"{own['dealt']:.2f}", f"{own['dealt sign']:.0%}"]
    return [whole, f"{own['r2 of probabilities']:.2f}", right, *dealt, f"{own['with an edge']} of {own['pairs']}"]


def _amounts(own: Mapping[str, Any]) -> str:
    return ", ".join(f"{other} {amount:+.2f}" for other, amount in own["spare"]["amounts"].items()) if "spare" in own else ""


def _cell(own: Mapping[str, Any]) -> str:
    kl = "–" if own["kl"] is None else f"{own['kl']:.2f}"
    return f"{own['gain']:.2f}, **{own['specificity']:.2f}**, {kl}, {own['repeated']:.3f}"


def _mean(some: Sequence[Mapping[str, Any]]) -> str:
    columns = {key: [own[key] for own in some] for key in ("gain", "specificity", "kl", "repeated")}
    return _cell({key: None if None in own else float(np.mean(own)) for key, own in columns.items()})


def main(
    out: Annotated[Path, typer.Option(help="write the figures here as JSON")] = Path("out/side_effects.json"),
    work: Annotated[Path, typer.Option(help="where a run that stops goes on")] = Path("out/side-effects"),
    into: Annotated[Path | None, typer.Option(help="write the bank with the graph to this folder")] = None,
) -> None:
    """Measure and print."""
    study = Study(sl.ConceptBank.from_pretrained(BANK), work)
    figures = measured(study)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    print(table(figures))
    if into is not None:
        study.made.save_pretrained(into)


if __name__ == "__main__":
    typer.run(main)
