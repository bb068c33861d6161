"""What a change of the input does, and by which way: through which coordinates of a bank, along which hidden channels.

Inputs are taken in pairs: two that differ in one known factor alone, or any two. Of the change that comes out, a share goes
through coordinates (`by_mediators`), and a share lies along what hidden channels carry (`by_patch`).
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from ..errors import MissingExtra
from .coordinates import Coordinates
from .interventions import Decoder, by_input, by_mediators, by_patch

ANY = "another input"
"""What a change is called where all of the input is another one."""
BUSY, FAINT = 8, 0.05
"""Hidden channels that are patched, those that coordinates move most; and the share below which a line is not drawn."""
Pairs = tuple[Int[NDArray[np.int64], " B"], Int[NDArray[np.int64], " B"]]
"""Rows, and for each one another row."""


def pairs(factors: Mapping[str, Sequence[Any]], count: int, *, most: int, seed: int = 0) -> dict[str, Pairs]:
    """For each factor, rows of `count` inputs and others that differ from them in that factor alone, `most` at most; and last,
    as `another input`, any two. A factor of which there are no two such pairs is left out.

    >>> pairs({"shape": [0, 0, 1, 1], "size": [0, 1, 0, 1]}, 4, most=9).keys()
    dict_keys(['shape', 'size', 'another input'])
    """
    order = np.random.default_rng(seed).permutation(count)
    table = np.stack([np.zeros(count, int), *(np.unique(v, return_inverse=True)[1] for v in factors.values())], 1)
    found = {}
    for k, name in enumerate(factors, 1):
        group = np.unique(np.delete(table, k, 1), axis=0, return_inverse=True)[1].reshape(-1)
        rows = order[np.argsort(group[order], kind="stable")]
        others = np.roll(rows, -1)
        alone = np.flatnonzero((group[rows] == group[others]) & (table[rows, k] != table[others, k]))
        few = np.random.default_rng(seed).permutation(alone)[:most]
        if len(few) > 1:
            found[name] = rows[few], others[few]
    return found | {ANY: (order[:most], np.roll(order[:most], 1))}


def busiest(found: Coordinates) -> list[int]:
    """The hidden channels that coordinates move most, each coordinate as heavy as the others."""
    moved = _relative(found)
    return moved.sum(0).topk(min(BUSY, moved.shape[1])).indices.sort().values.tolist()


def _relative(found: Coordinates) -> Tensor:
    """How much each coordinate moves each channel, beside the channel that it moves most; no channels without a hidden site."""
    most = found.channels.amax(-1, keepdim=True) if found.channels.numel() else found.channels
    return found.channels / most.clamp(min=1e-12)


def changed(
    whole: Decoder,
    value: Any,
    reference: Any,
    names: Sequence[str],
    *,
    spread: float,
    hidden: str | None = None,
    channels: Sequence[int] = (),
    control: Any = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What `value` for `reference` does to the outcome of `whole`, over a `spread`, and the shares of it, as JSON values.

    `through` each concept of `names` and all `together`, `along` each of some channels of the site `hidden`; each beside the
    share of its control. A share is None where nothing changes. `control` as in `by_input`.
    """
    how: dict[str, Any] = {"value": value, "reference": reference, "seed": seed}
    total = by_input(whole, control=control, **how)
    ends = (*total.length, total.by_chance.mean)
    relative, low, high, by_chance = (None if end is None or not spread else end / spread for end in ends)
    ways = {name: by_mediators(whole, concepts=[name], **how).indirect for name in names}
    if names:
        ways["together"] = by_mediators(whole, concepts=names, **how).indirect
    ways |= {f"channel {k}": by_patch(whole, site=str(hidden), channels=[k], **how) for k in channels}
    shares = {name: (effect.share, effect.share_by_chance) for name, effect in ways.items()}
    return {
        **{"pairs": len(total.change[0]), "relative": relative, "low": low, "high": high, "control": by_chance},
        "through": {name: shares[name] for name in names},
        "together": shares.get("together"),
        "along": {str(k): shares[f"channel {k}"] for k in channels},
    }


def circuit(changes: Mapping[str, Mapping[str, Any]], found: Coordinates, names: Sequence[str]) -> bytes:
    """Changes of the input, coordinates and hidden channels as a graph, as PNG: how much of what a change does goes through a
    coordinate, and which of the busiest channels a coordinate moves."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'steerlib[eval]'") from None
    busy = busiest(found)
    columns = [list(changes), list(names), [f"channel {k}" for k in busy]]
    tall = max(map(len, columns))
    at = {(x, text): (x, -(k + 0.5) * tall / len(column)) for x, column in enumerate(columns) for k, text in enumerate(column)}
    lines = [((0, c), (1, n), share or 0) for c, own in changes.items() for n, (share, _) in own["through"].items()]
    moved = _relative(found)
    lines += [((1, n), (2, f"channel {k}"), float(moved[i, k])) for i, n in enumerate(names) for k in busy]
    figure = Figure(figsize=(8, 1.2 + 0.36 * tall), layout="constrained")
    axis = figure.subplots()
    for start, end, weight in lines:
        if weight > FAINT:
            ends = zip(at[start], at[end], strict=True)
            axis.plot(*ends, color=f"C{start[0]}", linewidth=5 * min(weight, 1), alpha=0.15 + 0.7 * min(weight, 1))
    for (x, text), (_, y) in at.items():
        axis.text(x, y, text, ha="center", va="center", fontsize=9, bbox={"facecolor": "white", "edgecolor": "0.7"})
    for x, head in enumerate(("change of the input", "coordinate", "hidden channel")[: 2 + bool(busy)]):
        axis.text(x, 0.45, head, ha="center", va="center", fontsize=9, color="0.4")
    axis.set(xlim=(-0.4, 1.4 + bool(busy)), ylim=(-tall - 0.2, 0.8))
    axis.axis("off")
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
        return file.getvalue()
