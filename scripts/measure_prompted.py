"""Concepts of scenes that were made from captions alone, as judges see them: `python scripts/measure_prompted.py BANK`.

Amounts are the bank's own; judges only measure. Beside them, on the same held-out captions: the rewritten prompt, a random
direction of equal length, another concept, the levers made from the truth, and the amount that a judge would have chosen.
`--pairs FOLDER` writes pairs of captions for a recipe, and measures nothing. Goes on where it stopped.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scenes import judges, measures, prompts, world
from scenes.experiment import Case, Edits, Experiment, every, randomised, score
from scenes.measures import WHOLE, Cause, Effect
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from steerlib import ConceptBank, load
from steerlib.bank.concepts import Concept
from steerlib.evaluation.pictures import Pictures, edit_of
from steerlib.evaluation.report import markdown
from steerlib.steering.masks import Box
from steerlib.training.calibrate.prompted import DOSES, FIRST, Drawing, steered
from steerlib.training.picture_recipe import PictureRecipe
from steerlib.training.store import remembered

CONDITIONS = (
    "captions alone", "amount of a judge", "rewritten prompt", "random direction", "another concept", "truth-made lever",
)  # fmt: skip
AMOUNTS = tuple(sorted((FIRST, *DOSES)))
DEV, TEST = 1, 2
"""Purposes of scenes: a judge chooses an amount on the first, everything is measured on the second."""


class Bench:
    """A bank made from captions, and what it is measured with: `n` scenes for effects, half as many for what amounts do."""

    def __init__(self, experiment: Experiment, made: ConceptBank, n: int):
        self.experiment, self.made, self.n = experiment, made, n
        quiet: Any = {"name": "judge", "base": "", "source": "", "description": ""}
        self.drawing = Drawing(experiment.pipe, PictureRecipe(**quiet, steps=experiment.steps, guidance=2.0, batch=2 * n))

    def measured(self, cause: Cause) -> dict[str, Any]:
        """All figures of a value."""
        own = self.made[cause.value]
        return {
            "other value said": self.compared(cause, own),
            "value unsaid": self.unsaid(cause, own),
            "in other words": self.reworded(cause, own),
            "removed": self.removed(cause, own),
            "one of two": self.one_of_two(cause, own),
            "self-score": self.self_scored(cause, own),
            "chosen": [own.effects["edit"], own.effects["amount"], own.source],
        }

    def compared(self, cause: Cause, own: Concept) -> dict[str, list[float]]:
        """Captions that say another value, under every condition."""
        e, made = self.experiment, self.made
        case, dev, edits = e.case(cause, self.n, TEST), e.case(cause, self.n // 2, DEV), _edits(own)
        said = measures.effect(cause, case.asked, case.before, e.draw(e.saying(case, TEST)), e.judge)
        kind = own.effects["edit"]
        tried = {amount: e.effect(dev, {own.name: edit_of(kind, amount)}, made) for amount in AMOUNTS}
        best = max(tried, key=lambda amount: score(tried[amount]))
        found = {
            "captions alone": e.effect(case, edits, made),
            "amount of a judge": e.effect(case, {own.name: edit_of(kind, best)}, made),
            "rewritten prompt": said,
            "random direction": e.effect(case, edits, randomised(made, own, 0)),
            "another concept": e.effect(case, _edits(self.stranger(own)), made),
            "truth-made lever": e.effect(case, e.lever(cause)),
        }
        return {name: _figures(effect) for name, effect in found.items()}

    def stranger(self, own: Concept) -> Concept:
        """The next concept of the bank that is none of the same factor."""
        factors = {cause.value: cause.factor for cause in every()}
        names = [name for name in factors if name in self.made.concepts]
        later = [*names[names.index(own.name) :], *names]
        return self.made[next(name for name in later if factors[name] != factors[own.name])]

    def unsaid(self, cause: Cause, own: Concept) -> list[float] | None:
        """Captions without a word of the factor."""
        if cause.factor in prompts.NEVER_UNSAID:
            return None
        case = self.experiment.case(cause, self.n, TEST)
        return self.on(case, prompts.unsaid(case.captions, cause.factor), _edits(own))

    def reworded(self, cause: Cause, own: Concept) -> dict[str, list[float]]:
        """Captions in the words of the recipe's pairs, and in the last ones that there are."""
        case = self.experiment.case(cause, self.n, TEST)
        both = {"words of the pairs": 0, "other words": -1}
        return {name: self.on(case, prompts.reworded(case.captions, which), _edits(own)) for name, which in both.items()}

    def on(self, case: Case, captions: list[str], edits: Edits) -> list[float]:
        """Effect and share kept on other captions of the same scenes."""
        other = case._replace(captions=captions, before=self.experiment.draw(captions))
        return _figures(self.experiment.effect(other, edits, self.made))

    def removed(self, cause: Cause, own: Concept) -> dict[str, list[float]]:
        """Captions that say the value: share of what shows it that shows it no more, and share kept of other factors."""
        e, case = self.experiment, self.experiment.case(cause, self.n, TEST)
        said = e.saying(case, TEST)
        before = e.judge.read(e.draw(said))
        way = edit_of(own.effects["removal"], own.effects["removal_amount"])
        drawn = {"removed": e.draw(said, {own.name: way}, self.made), "negative prompt": self.without(said, cause)}
        return {name: _gone(before, e.judge.read(after), cause) for name, after in drawn.items()}

    def without(self, captions: list[str], cause: Cause) -> Pictures:
        """Pictures with the value as the negative prompt."""
        noises = [torch.Generator().manual_seed(self.experiment.seed + k) for k in range(len(captions))]
        how: Any = {"num_inference_steps": self.experiment.steps, "guidance_scale": 2.0, "output_type": "np"}
        drawn = self.experiment.pipe(captions, [prompts.phrase(cause)] * len(captions), generator=noises, **how)
        return (drawn.images * 255).round().astype(np.uint8)

    def one_of_two(self, cause: Cause, own: Concept) -> list[float] | None:
        """Two objects, a box around the first: share of first objects that show the value afterwards, share of second ones that
        read as before."""
        if cause.factor not in ("hue", "size"):
            return None
        e, edit, moved, kept = self.experiment, _edits(own)[own.name], [], []
        case = e.case(cause, self.n, TEST)
        two, first, second = (case.asked.factors[name] for name in ("count", "cell.0", "cell.1"))
        for cell in np.unique(first[two == 1]):
            rows = np.flatnonzero((two == 1) & (first == cell))
            asked = [case.captions[k] for k in rows]
            drawn = (e.draw(asked, edits, self.made) for edits in (None, {own.name: replace(edit, mask=_around(cell))}))
            before, after = (e.judge.read(pictures)[cause.factor] for pictures in drawn)
            at, beside = torch.arange(len(rows)), torch.as_tensor(second[rows]).long()
            moved += (after[at, int(cell)] == cause.index).tolist()
            kept += (after[at, beside] == before[at, beside]).tolist()
        return [round(float(np.mean(each)), 3) for each in (moved, kept)]

    def self_scored(self, cause: Cause, own: Concept) -> dict[str, Any]:
        """How well the pipeline's own errors tell what judges see: area under the curve over plain, prompted and steered
        pictures; by amount, the damage, and the share of other factors that changed."""
        e, case, kind = self.experiment, self.experiment.case(cause, self.n // 2, DEV), own.effects["edit"]
        said, seeds, shown, gains, harm = e.saying(case, DEV), [*range(len(case.captions))], [], [], []
        there = e.judge.read(case.before)["shape"] > 0
        arms: dict[str, tuple[list[str], Edits | None]] = {"plain": (case.captions, None), "prompted": (said, None)}
        arms |= {f"{amount:g}": (case.captions, {own.name: edit_of(kind, amount)}) for amount in AMOUNTS}
        natural = torch.zeros(len(said))
        for name, (captions, edits) in arms.items():
            with steered(e.pipe, self.made, edits):
                latents, pictures = self.drawing.shown(captions, seeds)
            n, p = self.drawing.errors(latents, case.captions, said)
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


def _edits(own: Concept) -> dict[str, Any]:
    return {own.name: edit_of(own.effects["edit"], own.effects["amount"])}


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


def table(found: Mapping[str, Any]) -> str:
    """One line a value: effect / kept under every condition; then the means, and how many values reach both bars."""
    columns = {name: lambda own, name=name: own["other value said"][name] for name in CONDITIONS}
    columns |= {
        "value unsaid": lambda own: own["value unsaid"],
        "words of the pairs": lambda own: own["in other words"]["words of the pairs"],
        "other words": lambda own: own["in other words"]["other words"],
        "removed": lambda own: own["removed"]["removed"],
        "negative prompt": lambda own: own["removed"]["negative prompt"],
        "one of two": lambda own: own["one of two"],
    }
    cells = {name: {value: of(own) for value, own in found.items()} for name, of in columns.items()}
    aurocs = {value: own["self-score"]["auroc"] for value, own in found.items()}
    lines = [
        (value, *(_cell(cells[name][value]) for name in columns), "" if aurocs[value] is None else f"{aurocs[value]:.2f}")
        for value in found
    ]
    several = [[pair for pair in own.values() if pair] for own in cells.values()]
    means = [_cell(np.mean(pairs, 0) if pairs else None) for pairs in several]
    reach = [sum(effect >= 0.9 and kept >= 0.95 for effect, kept in pairs) for pairs in several]
    known = [a for a in aurocs.values() if a is not None]
    lines += [("**mean**", *means, f"{np.mean(known):.2f}" if known else ""), ("reach both bars", *map(str, reach), "")]
    pairs = np.array([pair for own in found.values() for pair in own["self-score"]["damage and lost"]])
    rho = float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)  # type: ignore[union-attr]
    said = f"Damage against what was lost, over {len(pairs)} values and amounts: Spearman {rho:.2f}."
    return f"{markdown(' | '.join(['value', *columns, 'AUROC']), lines)}\n\n{said}"


def _cell(pair: Any) -> str:
    return "" if pair is None else f"{pair[0]:.2f} / {pair[1]:.2f}"


def main(
    bank: Annotated[Path, typer.Argument(help="a bank made from captions; with --pairs, not read")],
    value: Annotated[list[str], typer.Option(help="only these; may be repeated")] = [],  # noqa: B006
    count: Annotated[int, typer.Option(help="captions, or pairs of them, for a value")] = 32,
    pairs: Annotated[Path | None, typer.Option(help="write pairs of captions there, and measure nothing")] = None,
    work: Annotated[Path, typer.Option(help="keeps what was measured")] = Path("out/prompted"),
    steps: Annotated[int, typer.Option(help="scheduler steps of a picture")] = 10,
) -> None:
    """Print the table."""
    causes = [cause for cause in every() if not value or cause.value in value]
    if pairs is not None:
        prompts.write(pairs, causes, count)
        return
    torch.set_num_threads(1)
    made, shipped = ConceptBank.from_pretrained(bank), ConceptBank.from_pretrained("scenes-32")
    pipe = load(str(shipped.file("pipeline")))[0].to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    bench = Bench(Experiment(pipe, shipped, judges.load("scenes"), steps=steps), made, count)
    known = [cause for cause in causes if cause.value in made.concepts]
    found = {c.value: remembered(work / f"{c.value}.json", lambda c=c: bench.measured(c)) for c in known}
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
