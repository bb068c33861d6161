"""Tables of the study: what was measured, and the four findings of arXiv 2505.03530 beside it.

An interval is the middle 95 % over draws of as many seeds as there are, with replacement, in every cell of kind and data set;
with one seed there is none.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWN = 1000
"""Draws of seeds."""
SHOWN = {
    "CES": "ces", "relative": "relative", "its control": "control", "specificity": "specificity", "focus": "focus",
    "modularity, published": "published modularity", "mended": "modularity", "DCI": "dci_disentanglement",
    "tells factors": "dci_informativeness", "MIG": "mig", "SAP": "sap", "FactorVAE": "factor_vae", "InfoM": "infom",
    "InfoC": "infoc", "InfoE": "infoe", "active": "active", "unexplained": "unexplained",
}  # fmt: skip
"""Columns of the table, and the figures that they show."""
CONTESTS = ("ces", "specificity", "modularity", "dci_disentanglement", "mig", "sap", "factor_vae", "infom", "infoe")
"""Figures of which the highest wins."""
Cells = dict[tuple[str, str], list[dict[str, float]]]
"""Figures of every seed, by data set and kind."""


def figures_of(run: Mapping[str, Any], part: str = "") -> dict[str, float]:
    """The figures of a run, or of a control, as numbers; what is undefined is left out.

    `ces` is the mean over all latents, those that are passive counted as 0; of other figures of coordinates it is that over
    active ones.
    """
    whole = run["figures"].get(part, {}) if part == "untrained" else run["figures"]
    told = whole.get("shuffled factors" if part == "shuffled" else "disentanglement", {})
    found = dict(told)
    if part != "shuffled":
        each = whole["coordinates"]["each"]
        count = len(each) + sum(not name.startswith("code") for name in whole["passive"])
        found |= {name: mean_of(one[name] for one in each) for name in ("relative", "control", "specificity", "focus")}
        found |= {"ces": sum(one["ces"] for one in each) / max(count, 1), "active": len(each)}
        found["modularity"] = whole["coordinates"]["modularity"]
        found["published modularity"] = whole["coordinates"]["published_modularity"]
        found["unexplained"] = whole.get("unexplained")
        codes = whole.get("codes", {}).values()
        found |= {"swap": mean_of(one["relative"] for one in codes), "swap control": mean_of(one["control"] for one in codes)}
    return {name: float(value) for name, value in found.items() if value is not None}


def mean_of(values: Any) -> float | None:
    """Mean of what is defined; None where nothing is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


class Figure(NamedTuple):
    """A figure, and its interval over seeds."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        ends = "" if self.low is None or self.high is None else f" ({short(self.low)} to {short(self.high)})"
        return short(self.value) + ends


def short(value: float) -> str:
    """Three figures."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def cells_of(runs: Sequence[Mapping[str, Any]], part: str = "") -> Cells:
    """Figures by data set and kind, in the order of seeds."""
    found: Cells = {}
    for run in sorted(runs, key=lambda one: one["seed"]):
        found.setdefault((run["world"], run["kind"]), []).append(figures_of(run, part))
    return found


def over_seeds(cells: Cells, statistic: Callable[[Cells], float | None]) -> Figure:
    """A statistic of all runs, with its interval."""
    value, rng, drawn = statistic(cells), np.random.default_rng(0), []
    if value is None or all(len(runs) < 2 for runs in cells.values()):
        return Figure(value)
    for _ in range(DRAWN):
        some = {key: [runs[k] for k in rng.integers(0, len(runs), len(runs))] for key, runs in cells.items()}
        if (found := statistic(some)) is not None:
            drawn.append(found)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Figure(value, float(low), float(high))


def mean(name: str) -> Callable[[Cells], float | None]:
    """Of one figure over all runs."""
    return lambda cells: mean_of(one.get(name) for runs in cells.values() for one in runs)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's; None where fewer than three, or one that never changes."""
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """From 0; equal values share the mean of theirs."""
    x = np.asarray(values, float)
    return (x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2


def correlation(name: str, other: str, without: str = "") -> Callable[[Cells], float | None]:
    """Of two figures over runs, those of a kind left out."""

    def found(cells: Cells) -> float | None:
        runs = [run for (_, kind), some in cells.items() if kind != without for run in some if name in run and other in run]
        return rank_correlation([run[name] for run in runs], [run[other] for run in runs])

    return found


def difference(kind: str, other: str, name: str) -> Callable[[Cells], float | None]:
    """One kind's mean less another's, on one data set."""

    def found(cells: Cells) -> float | None:
        means = [mean(name)({key: runs for key, runs in cells.items() if key[1] == k}) for k in (kind, other)]
        return None if means[0] is None or means[1] is None else means[0] - means[1]

    return found


def of_world(cells: Cells, world: str) -> Cells:
    """Those of one data set."""
    return {key: runs for key, runs in cells.items() if key[0] == world}


def of_kind(cells: Cells, kind: str) -> Cells:
    """Those of one kind."""
    return {key: runs for key, runs in cells.items() if key[1] == kind}


# -- tables ----------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def everything(runs: Sequence[Mapping[str, Any]]) -> str:
    """A row for each data set and kind, and the controls of each data set."""
    cells, rows = cells_of(runs), []
    for world in worlds(runs):
        for key in of_world(cells, world):
            rows.append([world, key[1], *(over_seeds({key: cells[key]}, mean(name)) for name in SHOWN.values())])
        for part, said in (("untrained", "untrained, all kinds"), ("shuffled", "factors shuffled, all kinds")):
            control = of_world(cells_of(runs, part), world)
            rows.append([world, f"*{said}*", *(Figure(mean(name)(control)) for name in SHOWN.values())])
    return table(["data", "kind", *SHOWN], rows)


def worlds(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Data sets in the order in which they first come."""
    return [*dict.fromkeys(run["world"] for run in runs)]


def strength_and_disentanglement(runs: Sequence[Mapping[str, Any]]) -> str:
    """Finding i."""
    cells, rows, signs = cells_of(runs), [], []
    asked = [("ces", ""), ("ces", "VQ-VAE"), ("relative", ""), ("focus", "")]
    for world in worlds(runs):
        own = of_world(cells, world)
        found = [over_seeds(own, correlation(name, "dci_disentanglement", without)) for name, without in asked]
        rows.append([world, sum(map(len, own.values())), *found])
        signs += [found[0].value < 0] if found[0].value is not None else []
    head = ["data", "runs", "CES", "CES without VQ-VAE", "relative effect", "focus"]
    return f"{table(head, rows)}\n\nThat of CES is negative in {sum(signs)} of {len(signs)} data sets."


def bottleneck(runs: Sequence[Mapping[str, Any]]) -> str:
    """Finding ii."""
    cells, rows, points = cells_of(runs), [], []
    counts = {run["world"]: (run["factors"], run["size"]["latents"]) for run in runs}
    names = ("dci_informativeness", "infoe", "active", "unexplained")
    for world in worlds(runs):
        found = [over_seeds(of_world(cells, world), difference("beta-VAE", "VAE", name)) for name in names]
        rows.append([world, "{} of {}".format(*counts[world]), *found])
        if found[0].value is not None:
            points.append((counts[world][0], found[0].value))
    trend = rank_correlation(*zip(*points, strict=True)) if points else None
    said = "too few data sets for a correlation" if trend is None else f"rank correlation over data sets {trend:.2f}"
    head = ["data", "factors of latents", "tells factors", "InfoE", "active latents", "unexplained"]
    return f"{table(head, rows)}\n\nOf the number of factors with what beta-VAE tells of them more than VAE: {said}."


def winners(runs: Sequence[Mapping[str, Any]]) -> str:
    """Finding iii."""
    cells, rows, all_ = cells_of(runs), [], []
    for world in worlds(runs):
        row = []
        for name in CONTESTS:
            scores = {key[1]: mean(name)({key: some}) for key, some in of_world(cells, world).items()}
            known = {kind: score for kind, score in scores.items() if score is not None}
            row.append(max(known, key=known.__getitem__, default="–"))
        rows.append([world, *row])
        all_ += row
    counts = {kind: all_.count(kind) for kind in dict.fromkeys(all_)}
    most = max(counts, key=counts.__getitem__)
    said = f"{len(counts)} kinds are best somewhere; {most}, the most often, in {counts[most]} of {len(all_)} cells."
    return table(["data", *CONTESTS], rows) + f"\n\n{said}"


def quantised(runs: Sequence[Mapping[str, Any]]) -> str:
    """Finding iv."""
    cells = cells_of(runs)
    names = ("ces", "relative", "control", "swap", "swap control")
    kinds = [*dict.fromkeys(kind for _, kind in cells)]
    rows = [[kind, *(over_seeds(of_kind(cells, kind), mean(name)) for name in names)] for kind in kinds]
    own, rest = (of_kind(cells, "VQ-VAE"), {key: some for key, some in cells.items() if key[1] != "VQ-VAE"})
    moved, swapped, others = (mean(name)(some) for name, some in (("relative", own), ("swap", own), ("relative", rest)))
    shown = table(["kind", "CES", "one coordinate", "its control", "a swap of codes", "its control"], rows)
    if moved is None or swapped is None or not others:
        return shown
    said = f"One coordinate of VQ-VAE has {moved / others:.2f} of the effect that one of other kinds has"
    return f"{shown}\n\n{said}, a swap of codes {swapped / others:.2f}."


def about(runs: Sequence[Mapping[str, Any]], planned: int) -> str:
    """Which runs the tables are of."""
    size, seeds = runs[0]["size"], sorted({run["seed"] for run in runs})
    by_world = ", ".join(f"{sum(run['world'] == world for run in runs)} of {world}" for world in worlds(runs))
    said = ", ".join(f"{name} {value:g}" for name, value in size.items())
    quickest = min(run["seconds"] for run in runs)
    return (
        f"**{len(runs)} of {planned} runs** ({by_world}; seeds {', '.join(map(str, seeds))}), each of this size: {said}; "
        f"torch {runs[0]['torch']}; the quickest took {quickest} s."
        + (" One seed shows no finding; it is an example." if len(seeds) < 2 else "")
    )


def single(run: Mapping[str, Any]) -> str:
    """A run of another size, in one line."""
    size, own, plain = run["size"], figures_of(run), figures_of(run, "untrained")
    shown = ("unexplained", "active", "ces", "relative", "control", "dci_disentanglement", "infom", "infoe")
    said = {name: known for name, known in SHOWN.items() if known in shown}
    figures = ", ".join(f"{name} {short(own[known])}" for name, known in said.items() if known in own)
    return (
        f"{run['kind']} on {run['world']}, seed {run['seed']}, {size['side']} × {size['side']} pixels, {size['steps']} steps, "
        f"{run['seconds']} s: {figures}; before training CES {short(plain['ces'])}."
    )
