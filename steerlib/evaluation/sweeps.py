"""What a sweep over amounts and sites found: a table that can be printed, plotted and written, and a sheet of its pictures."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ..errors import BadEdit, MissingExtra
from .pictures import Pictures, sheet

Record = Mapping[str, Any]
WORN = 1.0
"""Nats per token by which answers may become less likely before a setting counts as damaging."""
MEANING = {
    "score": "the judge's mean",
    "±": "its standard error over prompts and seeds",
    "nll": "nats per token of the answers under the unsteered model",
    "repeated": "share of repeated word trigrams",
    "capped": "share of tokens at which the edit was cut short; allow_ood=True cuts nothing",
}
GIVEN = ("setting", "prompt", "seed", "answer", "picture")
"""Of a record, what is no figure."""


def settings_of(edits: Mapping[str, Sequence[Any]], sites: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every combination of amounts and sites that edits anything, behind the one that edits nothing. Raises `BadEdit` for a
    concept that is called as a column of the table is."""
    if taken := sorted({"site", *MEANING, *GIVEN} & edits.keys()):
        raise BadEdit(f"a concept called {taken[0]!r} cannot be told from that column; bank.rename gives it another name")
    given = [dict(zip(edits, amounts, strict=True)) for amounts in product(*edits.values())]
    edited = [setting for setting in given if any(not isinstance(x, int | float) or x for x in setting.values())]
    return [{}, *(setting | ({"site": site} if site else {}) for site in sites or [""] for setting in edited)]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Sweep:
    """Answers or pictures under every setting, and what was measured of them. Prints as a table of settings.

    Attributes:
        settings: what was edited: of each setting the amount, or the edit, by concept, and `site` where sites were swept. The
            first is that of the unsteered model.
        records: one for each setting, prompt and seed, of plain values: `setting`, its number; `prompt`, `seed`; `answer`, or
            `picture`, its number in `pictures`; the judge's `score` (of several concepts `score of` each, where the judge
            tells them apart); of answers `nll` and `repeated`.
        more: of each setting further figures: what the functions of `also` gave, and how much was `capped`.
        pictures: bytes `[B, H, W, 3]`.
        notes: what else has to be known.
    """

    settings: Sequence[Record]
    records: Sequence[Record]
    more: Sequence[Record]
    pictures: Pictures | None = None
    notes: Sequence[str] = ()

    @property
    def swept(self) -> list[str]:
        """Names of what differs between settings: concepts, and `site`."""
        return [*dict.fromkeys(name for setting in self.settings for name in setting)]

    @property
    def figures(self) -> list[str]:
        """Names of what was measured of each answer or picture."""
        return [name for name in self.records[0] if name not in GIVEN]

    @property
    def scores(self) -> list[str]:
        """Of these, what the judge said."""
        return [name for name in self.figures if name.startswith("score")]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One for each setting: what was edited, and the means of all figures; `±` is the standard error of a score."""
        rows = []
        for k, (setting, more) in enumerate(zip(self.settings, self.more, strict=True)):
            own = [record for record in self.records if record["setting"] == k]
            row: dict[str, Any] = {name: setting.get(name) for name in self.swept}
            for name in self.figures:
                values = [record[name] for record in own]
                row[name] = mean(values)
                if name in self.scores:
                    row[_error(name)] = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            rows.append(row | dict(more))
        return rows

    @property
    def best(self) -> dict[str, Any]:
        """The row with the highest score among those whose answers are at most one nat per token less likely than unsteered
        ones. Raises `BadEdit` without a judge."""
        if not self.scores:
            raise BadEdit("expected a judge to tell which setting is best; give sl.sweep judge=")
        rows = self.rows
        sound = [row for row in rows if row.get("nll", 0.0) <= rows[0].get("nll", 0.0) + WORN]
        return max(sound, key=lambda row: mean(row[name] for name in self.scores))

    def label(self, k: int) -> str:
        """A setting in words."""
        return ", ".join(f"{name} {_text(value)}" for name, value in self.settings[k].items()) or "unsteered"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A picture, as PIL has them: of answers, scores with their standard errors by amount, and likelihoods below; of
        pictures a contact sheet, settings across, prompts and seeds down. With a path, it is saved there too."""
        image = _lines(self) if self.pictures is None else _sheet(self, self.pictures)
        if path is not None:
            image.save(path)
        return image

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Settings, rows, records and notes as JSON; with a path, it is written there too."""
        values = {name: [*getattr(self, name)] for name in ("settings", "rows", "records", "notes")}
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def cells(self) -> list[list[str]]:
        """The table: a head, then a row for each setting."""
        rows = self.rows
        names = [*dict.fromkeys(name for row in rows for name in row)]
        return [names, *([_text(row.get(name)) for name in names] for row in rows)]

    def legend(self) -> str:
        """What the columns say."""
        shown = {name.partition(" ")[0] for name in self.cells()[0]}
        return "; ".join(f"{name}: {text}" for name, text in MEANING.items() if name in shown)

    def __repr__(self) -> str:
        rows = self.cells()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        return "\n".join([*table, *filter(None, (self.legend(), *self.notes))])

    def _repr_html_(self) -> str:
        head, *rows = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.cells())
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in filter(None, (self.legend(), *self.notes)))
        return f"<table><thead><tr>{head.replace('td>', 'th>')}</tr></thead><tbody>{body}</tbody></table>{notes}"


def _error(score: str) -> str:
    return score.replace("score", "±", 1)


def _text(value: Any) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _sheet(sweep: Sweep, pictures: Pictures) -> Any:
    """Every picture in its place, with scores above."""
    scores = [[f"{name} {_text(row[name])}" for name in sweep.scores] for row in sweep.rows]
    across = ["\n".join([sweep.label(k), *scores[k]]) for k in range(len(sweep.settings))]
    cells: dict[str, dict[str, Any]] = {}
    for record in sweep.records:
        row = cells.setdefault(f"{record['prompt']}\nseed {record['seed']}", {})
        row[across[record["setting"]]] = pictures[record["picture"]]
    return sheet(cells)


def _lines(sweep: Sweep) -> Any:
    """Figures by amount of the first concept, a line for each combination of all else that was swept."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'steerlib[eval]'") from None
    from PIL import Image

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots(len(sweep.scores) + 1, sharex=True, squeeze=False)[:, 0]
    (plain, *rows), across = sweep.rows, sweep.swept[0] if sweep.swept else ""
    amounts = [*dict.fromkeys(row[across] for row in rows)]
    are_numbers = not any(isinstance(amount, str) for amount in amounts)
    for values in dict.fromkeys(tuple(row[name] for name in sweep.swept[1:]) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in sweep.swept[1:]) == values]
        x = [0.0, *(float(row[across]) if are_numbers else 1.0 + amounts.index(row[across]) for row in own)]
        order = np.argsort(x, kind="stable")
        style: Any = {"marker": ".", "label": ", ".join(map(_text, values))}
        for axis, name in zip(axes, [*sweep.scores, "nll"], strict=True):
            y, error = ([row.get(key) or 0.0 for row in (plain, *own)] for key in (name, _error(name)))
            axis.errorbar(*(np.array(z)[order] for z in (x, y, error if name != "nll" else [0.0] * len(x))), capsize=2, **style)
            axis.set_ylabel("nats per token" if name == "nll" else name)
    if not are_numbers:
        axes[-1].set_xticks(range(len(amounts) + 1), ["unsteered", *map(str, amounts)])
    axes[-1].set_xlabel(f"amount of {across}" if across else "")
    if len(sweep.swept) > 1:
        axes[0].legend(title=", ".join(sweep.swept[1:]), fontsize=8, frameon=False)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
