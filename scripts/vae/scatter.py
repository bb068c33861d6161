"""The picture of the study, as SVG: strength beside disentanglement, a panel for each data set, a mark for each run."""

from collections.abc import Mapping, Sequence
from typing import Any

from .findings import figures_of, short, worlds

PANEL, EDGE = 190, 34
"""Pixels of a panel's side, and around it."""
COLOURS = ("#3366cc", "#dc3912", "#ff9900", "#109618", "#990099", "#555555")
X, Y = "ces", "dci_disentanglement"


def scatter(runs: Sequence[Mapping[str, Any]]) -> str:
    """A file's text."""
    kinds, sets = [*dict.fromkeys(run["kind"] for run in runs)], worlds(runs)
    width, height = len(sets) * (PANEL + EDGE) + EDGE, PANEL + 3 * EDGE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for k, world in enumerate(sets):
        parts += panel(EDGE + k * (PANEL + EDGE), world, [run for run in runs if run["world"] == world], kinds)
    for k, kind in enumerate(kinds):
        x, y = EDGE + k * 105, PANEL + 2.6 * EDGE
        parts += [dot(x, y, kind, kinds), f'<text x="{x + 8}" y="{y + 4}">{kind}</text>']
    return "\n".join([*parts, "</svg>\n"])


def panel(left: float, world: str, runs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    """One data set: both axes from 0 to a little more than the most."""
    found = [(run["kind"], figures_of(run)) for run in runs]
    points = [(kind, own[X], own[Y]) for kind, own in found if X in own and Y in own]
    most_x, most_y = (1.1 * max((point[k] for point in points), default=1.0) or 1.0 for k in (1, 2))
    base = EDGE + PANEL
    parts = [
        f'<rect x="{left}" y="{EDGE}" width="{PANEL}" height="{PANEL}" fill="none" stroke="#999"/>',
        f'<text x="{left}" y="{EDGE - 8}">{world}: DCI up to {short(most_y)}</text>',
        f'<text x="{left}" y="{base + 14}">CES from 0 to {short(most_x)}</text>',
    ]
    return parts + [dot(left + x / most_x * PANEL, base - y / most_y * PANEL, kind, kinds) for kind, x, y in points]


def dot(x: float, y: float, kind: str, kinds: Sequence[str]) -> str:
    """A mark in the colour of a kind."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[kinds.index(kind) % len(COLOURS)]}" fill-opacity="0.8"/>'
