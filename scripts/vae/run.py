"""One run of the study: pictures, training, and what the tool measures, as JSON values."""

import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from steerlib.bank.autoencoders import decoded, posterior
from steerlib.errors import BadEdit
from steerlib.evaluation.datasets import Data, read
from steerlib.evaluation.study import measured

from .models import Gaussian, Quantised
from .objectives import Loss, objective
from .worlds import WORLDS

KINDS = ("VAE", "beta-VAE", "FactorVAE", "beta-TC-VAE", "DIP-VAE-II", "VQ-VAE")
WARM = 0.5
"""Share of the steps over which what is asked of latents grows to its full weight: asked at once, most would be passive."""
KEPT = 250
"""Steps after which training that is kept in a file is kept again."""
Tick = Callable[[], object]
"""Is called after every step of training."""


class Size(NamedTuple):
    """How much is drawn, trained and measured.

    Args:
        side: pixels, a multiple of 8.
        width, latents: channels of the first layers, and latents.
        pictures, steps, batch, rate: of training.
        told, moved: pictures that were never trained on: for disentanglement, and those whose latents are moved.
        boosted: whether DCI is told by boosted trees, or by random forests.
    """

    side: int = 32
    width: int = 16
    latents: int = 8
    pictures: int = 8000
    steps: int = 12_000
    batch: int = 64
    rate: float = 1e-3
    told: int = 1000
    moved: int = 48
    boosted: bool = True


QUICK = Size(pictures=4000, steps=3000, batch=32, told=400, moved=16, boosted=False)


def run(world: str, kind: str, seed: int, size: Size, *, device: str = "cpu", tick: Tick = lambda: None) -> dict[str, Any]:
    """Train one autoencoder on one data set, and measure it; the seed is of weights, batches and noise."""
    begun = time.monotonic()
    learned, rest = pictures(world, size)
    x = learned.inputs
    model = made(kind, x, seed, size)
    train(model, x, lambda: objective(kind, size.latents, len(x)), size, seed, device=device, tick=tick)
    figures = measured(model, rest, moved=size.moved, boosted=size.boosted, seed=seed).figures
    figures["unexplained"] = unexplained(model, rest.inputs)
    about = {"world": Path(world).stem, "kind": kind, "seed": seed, "size": size._asdict(), "factors": len(rest.factors)}
    return {**about, "figures": figures, "seconds": round(time.monotonic() - begun), "torch": torch.__version__}


@lru_cache(maxsize=1)
def pictures(world: str, size: Size) -> tuple[Data, Data]:
    """To learn from and to measure on, the same for every seed: drawn, or from a file, made smaller by whole numbers."""
    if world in WORLDS:
        drawn = [(WORLDS[world].values(count, k), k) for k, count in enumerate((size.pictures, size.told))]
        parts = [Data(WORLDS[world].pictures(v, size.side), {name: own.tolist() for name, own in v.items()}) for v, _ in drawn]
        return parts[0], parts[1]
    x, factors = read(Path(world), size.pictures + size.told)
    if x.shape[-1] % size.side or x.shape[-1] != x.shape[-2]:
        raise BadEdit(f"expected pictures whose sides are alike and a multiple of {size.side}, got {tuple(x.shape[2:])}")
    x = avg_pool2d(x, x.shape[-1] // size.side)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    halves = (order[size.told :], order[: size.told])
    parts = [Data(x[rows], {name: [v[k] for k in rows.tolist()] for name, v in factors.items()}) for rows in halves]
    return parts[0], parts[1]


def made(kind: str, x: Tensor, seed: int, size: Size) -> Any:
    """An untrained autoencoder."""
    torch.manual_seed(seed)
    if kind != "VQ-VAE":
        return Gaussian(x.shape[1], size.side, size.latents, size.width)
    model = Quantised(x.shape[1], size.latents, size.width)
    model.begin(x[:256])
    return model


def train(
    model: Any,
    x: Tensor,
    loss: Callable[[], Loss],
    size: Size,
    seed: int = 0,
    *,
    device: str = "cpu",
    tick: Tick = lambda: None,
    kept: Path | None = None,
) -> None:
    """With Adam, at a rate that falls to nothing over the last quarter; back on the processor in the end.

    `loss` makes the loss, on the device. In the file `kept` is where training has come to, so that it goes on there, with the
    same outcome as in one piece on a processor, if the loss itself learns nothing.
    """
    torch.manual_seed(seed)
    model.to(device)
    x = x.to(device)
    with torch.device(device):
        of, adam = loss(), torch.optim.Adam(model.parameters(), lr=size.rate)
        for step in range(resumed(kept, model, adam, tick), size.steps):
            adam.param_groups[0]["lr"] = size.rate * min(1.0, 4 * (1 - step / size.steps))
            found = of(model, x[torch.randint(len(x), (size.batch,))], min(1.0, step / (WARM * size.steps)))
            adam.zero_grad()
            found.backward()
            adam.step()
            tick()
            if kept is not None and (step + 1) % KEPT == 0:
                keep(kept, model, adam, step + 1)
    model.cpu().eval().requires_grad_(False)


def keep(path: Path, model: Any, adam: torch.optim.Optimizer, step: int) -> None:
    """Write where training has come to, whole or not at all."""
    part = path.with_suffix(".part")
    torch.save({"model": model.state_dict(), "adam": adam.state_dict(), "draws": torch.get_rng_state(), "step": step}, part)
    part.rename(path)


def resumed(path: Path | None, model: Any, adam: torch.optim.Optimizer, tick: Tick) -> int:
    """Go on from a file, if it is there; returns the step to begin with."""
    if path is None or not path.is_file():
        return 0
    found = torch.load(path, weights_only=True)
    model.load_state_dict(found["model"])
    adam.load_state_dict(found["adam"])
    torch.set_rng_state(found["draws"])
    for _ in range(found["step"]):
        tick()
    return int(found["step"])


@torch.no_grad()
def unexplained(model: Any, x: Tensor) -> float:
    """Squared error of pictures that are decoded from the middle of what the encoder says, over that of their mean."""
    y = decoded(model.decode(posterior(model.encode(x)).mean))
    return float((y - x).square().sum() / (x - x.mean(0)).square().sum())
