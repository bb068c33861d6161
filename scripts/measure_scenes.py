"""The concepts of the scenes bank, made from captions alone, as judges see them: `python scripts/measure_scenes.py BANK`.

Amounts are the bank's own; judges only measure. Beside them, on the same held-out captions: the rewritten prompt, a random
direction of equal length, another concept, the amount that a judge would have chosen, and concepts of the same names of a bank
that was made from the truth (`--beside`). `--pairs FOLDER` writes pairs of captions for a recipe, and measures nothing. Goes on
where it stopped.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scenes import judges, measures, prompts, world
from scenes.experiment import BARS, Case, Edits, Experiment, score
from scenes.measures import TOLD, WHOLE, Cause, Effect, every
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from steerlib import ConceptBank, load
from steerlib.bank.concepts import Concept
from steerlib.evaluation.pictures import Pictures, edit_of
from steerlib.evaluation.report import markdown
from steerlib.steering.masks import Box
from steerlib.training.calibrate.prompted import DOSES, FIRST, Drawing, steered
from steerlib.training.discover.concept_graph import randomised
from steerlib.training.picture_recipe import PictureRecipe
from steerlib.training.store import remembered

CONDITIONS = (
    "captions alone", "amount of a judge", "rewritten prompt", "random direction", "another concept", "made from the truth",
)  # fmt: skip
AMOUNTS = tuple(sorted((FIRST, *DOSES)))
HARMFUL = (9.0, 14.0)
"""Amounts that no search tries, at which pictures break: of smaller ones nearly everything is kept, with little to rank."""
GONE = 0.8
"""Share of what shows a value that has to show it no more where it is removed."""
DEV, TEST = 1, 2
"""Purposes of scenes: a judge chooses an amount on the first, everything is measured on the second."""


class Bench:
    """What a bank is measured with: `n` scenes for effects, half as many for what amounts do; `beside` is another bank."""

    def __init__(self, experiment: Experiment, n: int, beside: ConceptBank | None = None):
        self.experiment, self.n = experiment, n
        self.beside = None if beside is None else experiment.of(beside)
        quiet: Any = {"name": "judge", "base": "", "source": "", "description": ""}
        self.drawing = Drawing(experiment.pipe, PictureRecipe(**quiet, steps=experiment.steps, guidance=2.0, batch=2 * n))

    def measured(self, cause: Cause) -> dict[str, Any]:
        """All figures of a value."""
        own, e = self.experiment.bank[cause.value], self.experiment
        case, dev = e.case(cause, self.n, TEST), e.case(cause, self.n // 2, DEV)
        said = e.draw(e.saying(case, TEST))
        return {
            "other value said": self.compared(case, dev, said, own),
            "value unsaid": self.unsaid(case),
            "in other words": self.reworded(case),
            "removed": self.removed(case, said, own),
            "one of two": self.one_of_two(case),
            "self-score": self.self_scored(dev, own),
            "chosen": [own.effects["edit"], own.effects["amount"], own.source],
        }

    def compared(self, case: Case, dev: Case, said: Pictures, own: Concept) -> dict[str, list[float]]:
        """Captions that say another value, under every condition."""
        e, cause, kind = self.experiment, case.cause, own.effects["edit"]
        edits, alone = e.lever(cause), e.effect(case, e.lever(cause))
        tried = {amount: e.effect(dev, {own.name: edit_of(kind, amount)}) for amount in AMOUNTS}
        best = max(tried, key=lambda amount: score(tried[amount]))
        found = {
            "captions alone": alone,
            "amount of a judge": alone if best == own.effects["amount"] else e.effect(case, {own.name: edit_of(kind, best)}),
            "rewritten prompt": measures.effect(cause, case.asked, case.before, said, e.judge),
            "random direction": e.effect(case, edits, randomised(e.bank, own, 0)),
            "another concept": e.effect(case, e.lever(self.stranger(cause))),
        }
        if self.beside:
            found["made from the truth"] = self.beside.effect(case, self.beside.lever(cause))
        return {name: _figures(effect) for name, effect in found.items()}

    def stranger(self, cause: Cause) -> Cause:
        """The next value of another factor."""
        known = self.experiment.levers()
        return next(other for other in [*known[known.index(cause) :], *known] if other.factor != cause.factor)

    def unsaid(self, case: Case) -> list[float] | None:
        """Captions without a word of the factor."""
        factor = case.cause.factor
        return None if factor in prompts.NEVER_UNSAID else self.on(case, prompts.unsaid(case.captions, factor))

    def reworded(self, case: Case) -> dict[str, list[float]]:
        """Captions in the words of the recipe's pairs, and in the last ones that there are."""
        both = {"words of the pairs": 0, "other words": -1}
        return {name: self.on(case, prompts.reworded(case.captions, which)) for name, which in both.items()}

    def on(self, case: Case, captions: list[str]) -> list[float]:
        """Effect and share kept on other captions of the same scenes."""
        other = case._replace(captions=captions, before=self.experiment.draw(captions))
        return _figures(self.experiment.effect(other, self.experiment.lever(case.cause)))

    def removed(self, case: Case, said: Pictures, own: Concept) -> dict[str, list[float]]:
        """Captions that say the value: share of what shows it that shows it no more, and share kept of other factors."""
        e, captions = self.experiment, self.experiment.saying(case, TEST)
        way = edit_of(own.effects["removal"], own.effects["removal_amount"])
        drawn = {"removed": e.draw(captions, {own.name: way}), "negative prompt": self.without(captions, case.cause)}
        return {name: _gone(e.judge.read(said), e.judge.read(after), case.cause) for name, after in drawn.items()}

    def without(self, captions: list[str], cause: Cause) -> Pictures:
        """Pictures with the value as the negative prompt."""
        noises = [torch.Generator().manual_seed(self.experiment.seed + k) for k in range(len(captions))]
        how: Any = {"num_inference_steps": self.experiment.steps, "guidance_scale": 2.0, "output_type": "np"}
        drawn = self.experiment.pipe(captions, [prompts.phrase(cause)] * len(captions), generator=noises, **how)
        return (drawn.images * 255).round().astype(np.uint8)

    def one_of_two(self, case: Case) -> list[float] | None:
        """Two objects, a box around the first: share of first objects that show the value afterwards, share of second ones that
        read as before."""
        e, cause, moved, kept = self.experiment, case.cause, [], []
        if cause.factor not in ("hue", "size"):
            return None
        edit = e.lever(cause)[cause.value]
        two, first, second = (case.asked.factors[name] for name in ("count", "cell.0", "cell.1"))
        for cell in np.unique(first[two == 1]):
            rows = np.flatnonzero((two == 1) & (first == cell))
            asked = [case.captions[k] for k in rows]
            drawn = (e.draw(asked, edits) for edits in (None, {cause.value: replace(edit, mask=_around(cell))}))
            before, after = (e.judge.read(pictures)[cause.factor] for pictures in drawn)
            at, beside = torch.arange(len(rows)), torch.as_tensor(second[rows]).long()
            moved += (after[at, int(cell)] == cause.index).tolist()
            kept += (after[at, beside] == before[at, beside]).tolist()
        return [round(float(np.mean(each)), 3) for each in (moved, kept)]

    def self_scored(self, case: Case, own: Concept) -> dict[str, Any]:
        """How well the pipeline's own errors tell what judges see: area under the curve over plain, prompted and steered
        pictures; by amount, the damage, and the share of other factors that changed."""
        e, cause, kind = self.experiment, case.cause, own.effects["edit"]
        said, seeds, shown, gains, harm = e.saying(case, DEV), [*range(len(case.captions))], [], [], []
        there = e.judge.read(case.before)["shape"] > 0
        arms: dict[str | float, tuple[list[str], Edits | None]] = {"plain": (case.captions, None), "prompted": (said, None)}
        arms |= {amount: (case.captions, {own.name: edit_of(kind, amount)}) for amount in (*AMOUNTS, *HARMFUL)}
        natural = torch.zeros(len(said))
        for name, (captions, edits) in arms.items():
            with steered(e.pipe, e.bank, edits):
                latents, pictures = self.drawing.shown(captions, seeds)
            n, p = self.drawing.errors(latents, case.captions, said)
            if name not in HARMFUL:
                gains += (n - p).tolist()
                shown += _shows(e.judge.read(pictures), cause, there)
            if edits is None:
                natural += (n if name == "plain" else p) / 2
            else:
                damage = (torch.minimum(n, p) - natural).clamp(min=0).mean() / natural.mean()
                kept = measures.effect(cause, case.asked, case.before, pictures, e.judge).preservation
                harm.append([round(float(damage), 4), round(1 - kept, 4)])
        sure = [(g, s) for g, s in zip(gains, shown, strict=True) if s is not None]
        auroc = float(roc_auc_score([s for _, s in sure], [g for g, _ in sure])) if len({s for _, s in sure}) == 2 else None
        return {"auroc": auroc and round(auroc, 4), "damage and lost": harm}


def _around(cell: int) -> Box:
    """Eleven pixels above a cell's base, and as many wide."""
    x, y = world.CENTRES[cell % 3], world.BASES[cell // 3]
    return Box(*((end / world.SIDE) for end in (x - 5.5, y - 11, x + 5.5, y + 0.5)))


def _figures(one: Effect) -> list[float]:
    return [round(one.effectiveness, 3), round(one.preservation, 3)]


def _shows(readings: Mapping[str, torch.Tensor], cause: Cause, there: torch.Tensor) -> list[bool | None]:
    """Of each picture, whether it shows a value: the whole of it, or every object that was there; None where some do."""
    right = readings[cause.factor] == cause.index
    if cause.factor in WHOLE:
        return right.tolist()
    shares = [float(row[own].float().mean()) for row, own in zip(right, there, strict=True)]
    return [share == 1 if share in (0, 1) else None for share in shares]


def _gone(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], cause: Cause) -> list[float]:
    showed = before[cause.factor] == cause.index
    if cause.factor not in WHOLE:
        showed &= before["shape"] > 0  # of nothing judges read something, too
    gone = (after[cause.factor] != cause.index)[showed].float().mean()
    kept = measures.preservation(dict(before), dict(after), cause)
    return [round(float(gone), 3), round(float(np.mean([*kept.values()])), 3)]


# -- what is printed ---------------------------------------------------------------------------------------------


def columns(own: Mapping[str, Any]) -> dict[str, list[float] | None]:
    """Effect and share kept of one value, by what was measured."""
    found = {name: own["other value said"].get(name) for name in CONDITIONS}
    found |= {"value unsaid": own["value unsaid"], **own["in other words"], **own["removed"], "one of two": own["one of two"]}
    return found


def table(found: Mapping[str, Any]) -> str:
    """One line a value: effect / kept under every condition; then the means, and how many values reach both bars."""
    cells = {value: columns(own) for value, own in found.items()}
    names, aurocs = [*next(iter(cells.values()))], {value: own["self-score"]["auroc"] for value, own in found.items()}
    lines = [(value, *map(_cell, cells[value].values()), _number(aurocs[value])) for value in found]
    several = [[pair for own in cells.values() if (pair := own[name])] for name in names]
    known = [auroc for auroc in aurocs.values() if auroc is not None]
    lines.append(("**mean**", *(_cell(_mean(pairs)) for pairs in several), _number(_mean(known))))
    least = [GONE if name in ("removed", "negative prompt") else BARS["effectiveness"] for name in names]
    reach = (f"{_reach(*both)} of {len(both[0])}" for both in zip(several, least, strict=True))
    lines.append(("reach both bars", *reach, ""))
    return markdown(" | ".join(["value", *names, "AUROC"]), lines)


def by_factor(found: Mapping[str, Any]) -> str:
    """The same, a line a factor, where captions say another value."""
    lines, shown = [], CONDITIONS
    for factor in TOLD:
        own = [found[cause.value]["other value said"] for cause in every() if cause.factor == factor and cause.value in found]
        pairs = {name: [figures[name] for figures in own if name in figures] for name in shown}
        count = _reach(pairs["captions alone"])
        lines.append((factor, str(len(own)), *(_cell(_mean(pairs[name])) for name in shown), str(count)))
    return markdown(" | ".join(["factor", "values", *shown, "reach both bars"]), [line for line in lines if line[1] != "0"])


def damage(found: Mapping[str, Any]) -> str:
    """Rank correlation of the damage that a bank measures by itself with the share of other factors that changed, of all values
    and amounts together, and of the amounts of one value, as a sentence."""
    each = [np.array(own["self-score"]["damage and lost"]) for own in found.values()]
    pairs, some = np.concatenate(each), [own for own in each if len({*own[:, 1]}) > 1]
    within = float(np.mean([_spearman(own) for own in some]))
    rank = f"over {len(pairs)} values and amounts {_spearman(pairs):.2f}, over the amounts of one value {within:.2f}"
    return f"Damage against what was lost, Spearman: {rank} on average (of {len(some)} values of which any is lost)."


def _spearman(pairs: Any) -> float:
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)  # type: ignore[union-attr]


def _mean(values: Any) -> Any:
    return np.mean(values, 0) if values else None


def _reach(pairs: Any, least: float = BARS["effectiveness"]) -> int:
    return sum(effect >= least and kept >= BARS["preservation"] for effect, kept in pairs)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cell(pair: Any) -> str:
    return "" if pair is None else f"{pair[0]:.2f} / {pair[1]:.2f}"


def main(
    bank: Annotated[Path, typer.Argument(help="a bank made from captions; with --pairs, not read")],
    value: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
    count: Annotated[int, typer.Option(help="captions, or pairs of them, for a value")] = 32,
    pairs: Annotated[Path | None, typer.Option(help="write pairs of captions there, and measure nothing")] = None,
    beside: Annotated[Path | None, typer.Option(help="a bank with concepts of the same names, measured on the same")] = None,
    work: Annotated[Path, typer.Option(help="keeps what was measured")] = Path("out/scenes-measured"),
    out: Annotated[Path | None, typer.Option(help="file for the figures")] = None,
    steps: Annotated[int, typer.Option(help="scheduler steps of a picture")] = 10,
) -> None:
    """Print the table."""
    causes = [cause for cause in every() if not value or cause.value in value]
    if pairs is not None:
        prompts.write(pairs, causes, count)
        return
    torch.set_num_threads(1)
    made = ConceptBank.from_pretrained(bank)
    pipe = load(str(ConceptBank.from_pretrained("scenes-32").file("pipeline")))[0].to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    experiment = Experiment(pipe, made, judges.load("scenes"), steps=steps)
    bench = Bench(experiment, count, beside and ConceptBank.from_pretrained(beside))
    found = {
        c.value: remembered(work / f"{c.value}.json", lambda c=c: bench.measured(c)) for c in causes if c in experiment.levers()
    }
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found), by_factor(found), damage(found), sep="\n\n")


if __name__ == "__main__":
    typer.run(main)
