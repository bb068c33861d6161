"""A context module in the frozen pipeline of scenes, from lists of prompts: `python scripts/contexts.py [--seeds 3]`.

Contexts are captions by night, with circles, with something blue, with something striped. No prompt of training names two of
them. Every pair of values is then done together on captions that show neither, and judges, which only measure, say how many
pictures show each value, and how much of all else stayed. Beside it: the prompt rewritten, the difference of means of the same
activations, a linear module, one with labels shuffled, and one from lists that are not pairs.

Goes on where it stopped; the figures of all seeds are in `contexts.json` of the folder `--out`, and `python scripts/readme.py
--no-banks --contexts FILE` writes the table.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any
from warnings import catch_warnings, simplefilter

import numpy as np
import torch
import typer
from benchmarks.measurement import machine
from numpy.typing import NDArray
from scenes import judges, measures, world
from scenes.measures import Cause

import steerlib as sl
from steerlib.evaluation.pictures import Pictures, draw_as_told
from steerlib.evaluation.report import markdown
from steerlib.training.context_recipe import FIT, ContextRecipe
from steerlib.training.fit.contexts import OBSERVED
from steerlib.training.record.contexts import aligned, pictures
from steerlib.training.store import remembered

CAUSES = (Cause("scene", "night"), Cause("shape", "circle"), Cause("hue", "blue"), Cause("texture", "striped"))
"""What is intervened on, a factor each."""
SITE = "text_encoder.layers.1"
LISTS, CASES = 11, 12
"""Purposes of captions: to train, to measure."""
BARS = {"effect": 0.85, "preservation": 0.95}


def shows(factors: world.Factors, cause: Cause) -> NDArray[np.bool_]:
    """Which scenes show a value, in the whole or in an object that is there."""
    index = world.VALUES[next(iter(cause.sets))].index(cause.value)
    if cause.factor in measures.WHOLE:
        return factors[cause.factor] == index
    each = [(factors[f"{cause.factor}.{k}"] == index) & world.present(factors, k) for k in range(world.MOST)]
    return np.any(each, 0)


def chosen(factors: Mapping[str, Any], rows: NDArray[np.intp]) -> dict[str, Any]:
    """Some of the scenes."""
    return {name: values[rows] for name, values in factors.items()}


def prompts(n: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Of each value, captions in which it was set, and the same as observed; none names two of the values, and factors of other
    values stay as they were, as in prompts that somebody writes."""
    noise, found = world.noise(64 * n, seed=(seed, LISTS)), {}
    observed = world.solve(noise, {})
    alone = sum(shows(observed, cause).astype(int) for cause in CAUSES) <= 1
    for cause in CAUSES:
        factors = world.solve(noise, cause.sets)
        fits = alone & (sum(shows(factors, each).astype(int) for each in CAUSES) == 1)
        for other in {name for each in CAUSES if each != cause for name in each.sets}:
            fits &= factors[other] == observed[other]
        both = [np.array(world.captions(each, seed=(seed, LISTS))) for each in (factors, observed)]
        rows = np.flatnonzero(fits & (both[0] != both[1]))[:n]
        assert len(rows) == n
        found[cause.value] = [*zip(*(captions[rows].tolist() for captions in both), strict=True)]
    return found


def cases(n: int, seed: int) -> world.Scenes:
    """Scenes that show none of the values."""
    drawn = world.draw(40 * n, seed=(seed, CASES))
    rows = np.flatnonzero(~np.any([shows(drawn.factors, cause) for cause in CAUSES], 0))[:n]
    assert len(rows) == n
    return world.Scenes(chosen(drawn.noise, rows), chosen(drawn.factors, rows), drawn.pixels[rows], drawn.regions[rows])


# -- methods -----------------------------------------------------------------------------------------------------


def recipes(n: int, seed: int) -> dict[str, ContextRecipe]:
    """What the methods that are trained are trained by; prompts lie in the recipe itself."""
    lists = prompts(n, seed)
    files = {f"{name}.jsonl": _lines(some) for name, some in lists.items()}
    common: Any = {
        "base": "scenes-32",
        "source": str(pipeline()),
        "site": SITE,
        "samples": n,
        "batch": 64,
        "seed": seed,
        "seeds": 1,
    }
    pairs = ContextRecipe(name="pairs", contexts={name: f"{name}.jsonl" for name in lists}, texts=files, **common)
    names = [*lists]
    mixed = {name: [lists[names[(j + k) % len(names)]][k] for k in range(n)] for j, name in enumerate(names)}
    observed = [plain for some in prompts(n, seed + 1000).values() for _, plain in some][:n]
    apart = {OBSERVED: observed, **{name: [done for done, _ in some] for name, some in lists.items()}}
    return {
        "context module": pairs,
        "linear module": replace(pairs, name="linear", fit=replace(FIT, depth=0)),
        "labels shuffled": replace(
            pairs, name="shuffled", texts={f"{name}.jsonl": _lines(some) for name, some in mixed.items()}
        ),
        "lists, not pairs": replace(pairs, name="lists", contexts=apart, texts={}),
    }


def _lines(pairs: Sequence[tuple[str, str]]) -> str:
    return "".join(json.dumps({"positive": done, "negative": plain}) + "\n" for done, plain in pairs)


def pipeline() -> Path:
    """The folder of the pipeline."""
    return Path(str(sl.ConceptBank.from_pretrained("scenes-32").file("pipeline")))


def difference_of_means(pipe: Any, n: int, seed: int) -> sl.ConceptBank:
    """A direction of each value, of the activations that modules are trained on."""
    own: Any = {"level": None, "count": n, "batch": 64, "steps": 1, "seed": 0}
    rows = {}
    for name, some in prompts(n, seed).items():
        done, plain = (pictures(pipe, [pair[k] for pair in some], SITE, **own) for k in (0, 1))
        rows[name] = (aligned(plain, done) - plain).mean((0, 1))
    return sl.ConceptBank.from_directions(rows, site=SITE, base=pipe)


# -- what judges see ---------------------------------------------------------------------------------------------

AMOUNTS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Of a direction, of which a judge chooses one for each pair, on other captions."""
Done = tuple[Cause, ...]
DONE: list[Done] = [*((cause,) for cause in CAUSES), *combinations(CAUSES, 2)]
"""Each value alone, and every pair."""


class Bench:
    """A pipeline, a judge, and scenes that show none of the values."""

    def __init__(self, pipe: Any, n: int, seed: int):
        self.pipe, self.judge, self.asked, self.seed = pipe, judges.load("scenes"), cases(n, seed), seed
        self.captions = world.captions(self.asked.factors, seed=(seed, CASES))
        self.before = self.judge.read(self.draw(self.captions))

    def draw(self, captions: list[str], bank: sl.ConceptBank | None = None, edits: Mapping[str, Any] | None = None) -> Pictures:
        """Pictures of captions, always from the same noise."""
        with catch_warnings():
            simplefilter("ignore")  # a direction goes beyond its safe range on purpose
            how: Any = {"branch": "cond", "allow_ood": True}
            with sl.steer(self.pipe, bank, edits, **how) if bank is not None and edits else nullcontext():
                return draw_as_told(self.pipe, captions, steps=10, seed=self.seed)

    def seen(self, done: Done, after: Pictures) -> list[float]:
        """Share of pictures, or of their objects, that show each value, and at last the mean share of other factors kept."""
        now = self.judge.read(after)
        effects = [measures.effectiveness(self.before, now, cause) for cause in done]
        kept = [measures.preservation(self.before, now, cause) for cause in done]
        common = [kept[0][name] for name in kept[0] if all(name in each for each in kept)]
        return [round(float(v), 3) for v in (*effects, np.mean(common))]

    def switched(self, bank: sl.ConceptBank) -> dict[str, list[float]]:
        """With `Do` of each value and pair."""
        return {_name(done): self.seen(done, self.draw(self.captions, bank, {c.value: sl.Do() for c in done})) for done in DONE}

    def added(self, bank: sl.ConceptBank, done: Done, amount: float) -> list[float]:
        """With directions of an amount."""
        return self.seen(done, self.draw(self.captions, bank, {c.value: sl.Add(amount, unit="raw") for c in done}))

    def rewritten(self) -> dict[str, list[float]]:
        """With prompts that say the values."""
        found = {}
        for done in DONE:
            sets = {name: value for cause in done for name, value in cause.sets.items()}
            factors = world.solve(self.asked.noise, sets)
            found[_name(done)] = self.seen(done, self.draw(world.captions(factors, seed=(self.seed, CASES))))
        return found


def _name(done: Done) -> str:
    return " + ".join(cause.value for cause in done)


def _score(found: Sequence[float]) -> float:
    """By how much the bar that is hardest to reach is passed."""
    return min(*(effect - BARS["effect"] for effect in found[:-1]), found[-1] - BARS["preservation"])


def by_directions(bench: Bench, dev: Bench, bank: sl.ConceptBank) -> dict[str, list[float]]:
    """With the amount that a judge chooses on other captions."""
    best = {done: max(AMOUNTS, key=lambda amount, done=done: _score(dev.added(bank, done, amount))) for done in DONE}
    return {_name(done): bench.added(bank, done, amount) for done, amount in best.items()}


# -- what is printed ---------------------------------------------------------------------------------------------


def table(found: Mapping[str, Any]) -> str:
    """Effects and what is kept of every value and pair, by method, over seeds; pairs that reach both bars are counted."""
    runs: Sequence[Mapping[str, Any]] = found["runs"]
    methods, lines = [*runs[0]], []
    for done in runs[0][methods[0]]:
        each = [[_over(values) for values in zip(*(run[name][done] for run in runs), strict=True)] for name in methods]
        lines.append((done, *(f"{', '.join(own[:-1])} / {own[-1]}" for own in each)))
    pairs = [done for done in runs[0][methods[0]] if " + " in done]
    reached = [[sum(_score(run[name][done]) >= 0 for done in pairs) for run in runs] for name in methods]
    lines.append(("pairs that reach both bars", *(f"{_over(counts, '.0f')} of {len(pairs)}" for counts in reached)))
    several = f"Means over {len(runs)} seeds (least–most). " if len(runs) > 1 else ""
    said = (
        f"Effect of each value / mean share of other factors kept, on {found['cases']} captions that name none of them; bars "
        f"are {BARS['effect']} for every value and {BARS['preservation']}. {found['prompts']} pairs of prompts a value. "
        f"{several}Machine: {found['machine']}; torch {found['torch']}."
    )
    return f"{markdown(' | '.join(['done', *methods]), lines)}\n\n{said}"


def _over(values: Sequence[float], how: str = ".2f") -> str:
    """A mean, with the ends where they differ as shown."""
    mean, least, most = (format(v, how) for v in (sum(values) / len(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least}–{most})"


def measured(count: int, pictured: int, seed: int, out: Path) -> dict[str, Any]:
    """What judges see of every method, from one seed."""
    own = out / f"{count}-{pictured}-{seed}"
    pipe = sl.load(str(pipeline()))[0]
    banks = {name: sl.train(pipe, recipe, work=out / "work") for name, recipe in recipes(count, seed).items()}
    means = difference_of_means(pipe, count, seed)
    pipe = pipe.to(torch.bfloat16)
    bench = Bench(pipe, pictured, seed)
    methods = {name: remembered(own / f"{name}.json", lambda bank=bank: bench.switched(bank)) for name, bank in banks.items()}
    methods["difference of means"] = remembered(
        own / "means.json", lambda: by_directions(bench, Bench(pipe, pictured // 2, seed + 1), means)
    )
    return methods | {"prompt rewritten": remembered(own / "rewritten.json", bench.rewritten)}


def main(
    count: Annotated[int, typer.Option(help="pairs of prompts of each value")] = 300,
    pictured: Annotated[int, typer.Option(help="captions that are measured")] = 32,
    seeds: Annotated[int, typer.Option(help="number of seeds, of captions, noise and fits")] = 3,
    out: Annotated[Path, typer.Option(help="folder that keeps what was made")] = Path("out/contexts"),
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    runs = [
        remembered(out / f"{count}-{pictured}-{seed}.json", partial(measured, count, pictured, seed, out))
        for seed in range(seeds)
    ]
    found = {"machine": machine(), "torch": torch.__version__, "cases": pictured, "prompts": count, "runs": runs}
    (out / "contexts.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    typer.run(main)
