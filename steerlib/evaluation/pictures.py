"""Pictures to look at: drawn for captions, and laid out as a table."""

from collections.abc import Mapping, Sequence
from inspect import signature
from io import BytesIO
from textwrap import fill
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import BadRecipe, MissingExtra
from ..steering.interventions import Add, Intervention, Scale, Set
from ..steering.switching import Do

Pictures = NDArray[np.uint8]
"""`[B, H, W, 3]`"""


def grid(cells: Mapping[str, Mapping[str, Pictures]], *, title: str = "") -> bytes:
    """A table of pictures as PNG of 256 colours, for size: rows and columns by name, in every cell a strip of some."""
    try:
        import matplotlib
        from PIL import Image
    except ImportError:
        raise MissingExtra("pictures need matplotlib: pip install 'steerlib[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(next(iter(cells.values())))
    figure, axes = pyplot.subplots(
        len(cells),
        len(columns),
        figsize=(1.9 * len(columns) + 0.8, 0.9 * len(cells) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for row, (name, strip) in zip(axes, cells.items(), strict=True):
        for axis, column in zip(row, columns, strict=True):
            axis.imshow(strip_of(strip[column]), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize="small")
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(fill(column, 26), fontsize="small" if len(column) < 26 else "xx-small")
    figure.suptitle(title)
    with BytesIO() as file, BytesIO() as small:
        figure.savefig(file, format="png", dpi=110)
        pyplot.close(figure)
        Image.open(file).convert("RGB").quantize(256, Image.Quantize.MEDIANCUT).save(small, format="png", optimize=True)
        return small.getvalue()


SMALL, LARGE = 96, 256
"""Pixels that a picture is high at least and at most on a sheet; smaller ones are enlarged by whole numbers."""
GAP, LINE = 4, 14
"""Pixels between pictures, and of a line of letters."""


def sheet(cells: Mapping[str, Mapping[str, NDArray[np.uint8]]]) -> Any:
    """A contact sheet as PIL has pictures: a picture `[H, W, 3]` in every cell, names of rows on the left, of columns above."""
    from PIL import Image, ImageDraw

    columns = [*dict.fromkeys(name for row in cells.values() for name in row)]
    shown = {(row, name): Image.fromarray(picture) for row, own in cells.items() for name, picture in own.items()}
    width, height = next(iter(shown.values())).size
    times = max(1, SMALL // height) if height <= LARGE else LARGE / height
    size = round(width * times), round(height * times)
    letters = max(8, size[0] // 7)
    left, above = [fill_lines(row, 18) for row in cells], [fill_lines(name, letters) for name in columns]
    margin, top = 18 * 7, GAP + LINE * max(name.count("\n") + 1 for name in above)
    whole = Image.new("RGB", (margin + len(columns) * (size[0] + GAP), top + len(cells) * (size[1] + GAP)), "white")
    draw = ImageDraw.Draw(whole)
    for j, name in enumerate(columns):
        draw.multiline_text((margin + j * (size[0] + GAP), 0), above[j], "black")
        for i, row in enumerate(cells):
            if (row, name) in shown:
                place = margin + j * (size[0] + GAP), top + i * (size[1] + GAP)
                way = Image.Resampling.NEAREST if times >= 1 else Image.Resampling.LANCZOS
                whole.paste(shown[row, name].resize(size, way), place)
    for i in range(len(cells)):
        draw.multiline_text((GAP, top + i * (size[1] + GAP)), left[i], "black")
    return whole


def fill_lines(text: str, width: int) -> str:
    """A text whose lines are at most so many letters long."""
    return "\n".join(fill(line, width) for line in text.splitlines())


def strip_of(pictures: Sequence[NDArray[np.uint8]] | Pictures) -> NDArray[np.uint8]:
    """Pictures side by side, a light line between them."""
    line = np.full((len(pictures[0]), 1, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, line)][:-1], 1)


def stills(drawn: NDArray[Any]) -> Pictures:
    """What a pipeline draws, numbers from 0 to 1, as bytes; of a video its middle frame."""
    shown = drawn[:, drawn.shape[1] // 2] if drawn.ndim == 5 else drawn
    return (shown * 255).round().astype(np.uint8)


def saturated(pictures: Pictures) -> float:
    """Share of pixels of which a channel is as dark or as light as bytes can be."""
    return float(((pictures == 0) | (pictures == 255)).any(-1).mean())


LABELS = "class_labels"
"""What pipelines of classes call what is drawn."""


def draws_classes(pipe: Any) -> bool:
    """Whether a pipeline is asked for classes, not by prompts."""
    return LABELS in signature(pipe.__call__).parameters


def asked(pipe: Any, prompts: Sequence[str]) -> list[Any]:
    """What the call of a pipeline takes of some prompts: themselves, or, of one of classes, the numbers of those they name.

    Raises:
        BadRecipe: A prompt is neither the name nor the number of a class.
    """
    if not draws_classes(pipe):
        return list(prompts)
    known: dict[str, int] = getattr(pipe, "labels", {})
    if wrong := [prompt for prompt in prompts if prompt not in known and not prompt.isdecimal()]:
        raise BadRecipe(
            f"{type(pipe).__name__} draws classes: expected lists positive and negative of their names or numbers, "
            f"got {wrong[0]!r:.80}"
        )
    return [known[prompt] if prompt in known else int(prompt) for prompt in prompts]


def draw_as_told(
    pipe: Any, captions: Sequence[str], *, steps: int = 20, guidance: float | None = 2.0, seed: int = 0, batch: int = 64
) -> NDArray[np.uint8]:
    """Bytes `[B, H, W, 3]`; picture `k` starts from a noise of its own. A guidance of None is the pipeline's own."""
    drawn, guided = [], {} if guidance is None else {"guidance_scale": guidance}
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(captions), batch):
        some = list(captions[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(some))]
        options = {"num_inference_steps": steps, "generator": generators, "output_type": "np", **guided}
        drawn.append(stills(pipe(asked(pipe, some), **options)[0]))
    return np.concatenate(drawn)


def edit_of(kind: str, amount: float) -> Intervention:
    """`Set`, `Do`, `Scale` or `Add`, by name."""
    return {"Set": Set, "Do": Do, "Scale": Scale}.get(kind, Add)(amount)
