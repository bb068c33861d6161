"""Frozen readers of factors: what a picture of `scenes` or `faces` shows, as small convolutional networks see it.

Trained on true renders alone (`scripts/train_judges.py`), with noise and shifts of colour added, so that what a model draws is
read by something that never saw it. Factors of a scene are read once, those of objects in each of the six cells: `shape` is 0
where there is none, otherwise one more than in `world.VALUES`. `B` pictures.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from scenes import faces, world

ABSENT = -100
"""In truths: there is nothing to read."""
WINDOW = (14, 12)
"""Rows and columns of a cell, of which eleven rows are above its base."""
Readings = dict[str, Tensor]
"""By factor: `[B]`, or `[B, 6]` for those of objects."""


class Kind(NamedTuple):
    """What a judge reads: factors of the whole and of each cell, with how many values."""

    whole: Mapping[str, int]
    cells: Mapping[str, int]


def _sizes(values: Mapping[str, tuple[str, ...]], names: tuple[str, ...]) -> dict[str, int]:
    return {name: len(values[name]) for name in names}


OF_OBJECTS = {name: len(world.OBJECT[name]) + (name == "shape") for name in ("shape", "hue", "size", "texture")}
KINDS = {
    "scenes": Kind(_sizes(world.VALUES, ("scene", "light", "side", "height", "background", "ground")), OF_OBJECTS),
    "faces": Kind(_sizes(faces.VALUES, ("outline", "eyes", "mouth", "hue", "background", "face")), {}),
}


class PictureJudge(nn.Module):
    """Reads all factors of a kind of picture."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, heads = KINDS[kind], KINDS[kind]
        stages = _halved(3, 16), _halved(16, 32), _halved(32, 32)
        self.overview = nn.Sequential(*sum(stages, ()), nn.Flatten(), nn.Linear(512, 64), nn.ReLU())
        self.whole = nn.Linear(64, sum(heads.whole.values()))
        if heads.cells:
            first = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU()
            near = *first, *_halved(32, 48), *_halved(48, 64)
            self.closeup = nn.Sequential(*near, nn.Flatten(), nn.Linear(768, 64), nn.ReLU())
            self.cells = nn.Sequential(nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, sum(heads.cells.values())))

    def forward(self, x: Float[Tensor, "B 3 32 32"]) -> dict[str, Tensor]:
        """Logits by factor, `[B, values]` or `[B, 6, values]`, of pixels between -1 and 1."""
        seen = self.overview(x)
        found = _split(self.whole(seen), self.kind.whole)
        if self.kind.cells:
            close = self.closeup(windows(x).flatten(0, 1)).unflatten(0, (len(x), -1))
            found |= _split(self.cells(torch.cat([close, seen[:, None].expand_as(close)], -1)), self.kind.cells)
        return found

    @torch.no_grad()
    def read(self, pixels: NDArray[np.uint8] | Tensor, batch: int = 500) -> Readings:
        """The likeliest value of each factor, of `[B, 32, 32, 3]` bytes."""
        pieces = [self(as_input(piece)) for piece in torch.as_tensor(pixels).split(batch)]
        return {name: torch.cat([piece[name].argmax(-1).cpu() for piece in pieces]) for name in pieces[0]}


def _halved(before: int, after: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()


def _split(logits: Tensor, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, logits.split(list(sizes.values()), -1), strict=True))


def as_input(pixels: Any) -> Float[Tensor, "B 3 32 32"]:
    """Bytes `[B, 32, 32, 3]` as networks see them, between -1 and 1."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def windows(x: Float[Tensor, "B 3 32 32"]) -> Float[Tensor, "B 6 3 14 12"]:
    """What is around each cell, zero beyond the picture."""
    x = pad(x, (6, 6, 0, 3))
    corners = [(base - 11, centre) for base in world.BASES for centre in world.CENTRES]
    return torch.stack([x[:, :, row : row + WINDOW[0], column : column + WINDOW[1]] for row, column in corners], 1)


# -- truth -----------------------------------------------------------------------------------------------------


def truth(kind: str, factors: world.Factors) -> Readings:
    """What a judge should read of pictures with these factors."""
    found = {name: torch.from_numpy(factors[name]).long() for name in KINDS[kind].whole}
    if kind == "faces":
        found["hue"][found["outline"] == 0] = ABSENT  # it is the outline's
    return found | (_in_cells(factors) if kind == "scenes" else {})


def _in_cells(factors: world.Factors) -> dict[str, Tensor]:
    n = len(factors["scene"])
    found = {name: np.full((n, len(world.CELLS)), 0 if name == "shape" else ABSENT) for name in OF_OBJECTS}
    for k in range(world.MOST):
        there = np.flatnonzero(world.present(factors, k))
        for name, table in found.items():
            table[there, factors[f"cell.{k}"][there]] = factors[f"{name}.{k}"][there] + (name == "shape")
    return {name: torch.from_numpy(table) for name, table in found.items()}


def accuracy(read: Readings, true: Readings) -> dict[str, float]:
    """Share read right, by factor: those of objects where there should be one; `cells`: all six rightly filled or empty."""
    found = {}
    for name, value in true.items():
        counts = (true["shape"] > 0) if value.ndim > 1 else value != ABSENT
        found[name] = float((read[name] == value)[counts].float().mean())
    if "shape" in true:
        found["cells"] = float(((read["shape"] > 0) == (true["shape"] > 0)).all(-1).float().mean())
    return found


# -- training --------------------------------------------------------------------------------------------------


def loss(judge: PictureJudge, pixels: NDArray[np.uint8], true: Readings, generator: torch.Generator) -> Tensor:
    """Cross-entropy, the mean over factors, on pictures disturbed as drawings of a model are."""
    logits = judge(disturbed(as_input(pixels), generator))
    terms = [cross_entropy(logits[name].flatten(0, -2), value.flatten(), ignore_index=ABSENT) for name, value in true.items()]
    return torch.stack(terms).mean()


def disturbed(x: Float[Tensor, "B 3 32 32"], generator: torch.Generator) -> Float[Tensor, "B 3 32 32"]:
    """Noise of up to a tenth of the range, and colours shifted a little."""
    amount = 0.2 * torch.rand(len(x), 1, 1, 1, generator=generator)
    shift = 0.05 * torch.randn(len(x), 3, 1, 1, generator=generator)
    return x + amount * torch.randn(x.shape, generator=generator) + shift


def save(judges: Mapping[str, PictureJudge], path: Path) -> None:
    """Weights of judges by kind, in half precision."""
    tensors = {f"{kind}.{name}": t.half() for kind, judge in judges.items() for name, t in judge.state_dict().items()}
    save_file(tensors, path)


def load(kind: str, path: Path | None = None) -> PictureJudge:
    """The judge of `scenes` or `faces`, from a file or the shipped one."""
    judge, tensors = PictureJudge(kind), load_file(path or shipped())
    judge.load_state_dict({name.removeprefix(f"{kind}."): t.float() for name, t in tensors.items() if name.startswith(kind)})
    return judge.requires_grad_(False).eval()


def shipped() -> Path:
    """Where the trained judges are."""
    return Path(str(files("steerlib.concept_banks"))) / "recipes" / "scenes-32" / "judges.safetensors"
