"""Steering one latent of a sparse encoder: decoding a real model, and opening a bank of a million latents.

Weights are random: what is measured is cost.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

import steerlib as sl
from steerlib.bank import SiteFacts
from steerlib.encoders import Encoder, JumpReLU, ReLU, TopK

from .measurement import Condition, Measurement, Table, Way, over, within
from .steering import decode, real_model

SITE, MILLION, SMALL, K = "layers.15", 1_000_000, 4608, 32


def weights(n: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random rows of length 1, small enough to change no text much."""
    g = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(n, width, generator=g) / width**0.5 for name in ("encoder", "decoder")}
    return {name: tensor.to(dtype) for name, tensor in {**rows, "bias": torch.zeros(n)}.items()}


def bank_around(encoder: Encoder, width: int) -> sl.ConceptBank:
    """A bank of one encoder for any model."""
    return sl.ConceptBank("latents", [], {SITE: encoder}, base=sl.BaseModel(), sites={SITE: SiteFacts(width=width)})


def conditions(model: Any, latents: int) -> dict[str, Condition]:
    """One latent set to a small value at every token, by kind of encoder."""
    width = model.config.hidden_size
    small, large = weights(SMALL, width), weights(latents, width)
    edits = {f"{SITE}/17": sl.Set(0.01, unit="raw")}
    ranked = bank_around(TopK(**large, k=K, threshold=1.0), width)
    firing = bank_around(TopK(**{**large, "bias": 1e3 * (torch.arange(latents) == 17)}, k=K), width)
    jump = JumpReLU(**small, threshold=torch.full((SMALL,), 0.5))
    return {
        "plain": nullcontext,
        "plain again": nullcontext,
        "ReLU": partial(sl.steer, model, bank_around(ReLU(**small), width), edits),
        "JumpReLU": partial(sl.steer, model, bank_around(jump, width), edits),
        "TopK by threshold": partial(sl.steer, model, ranked, edits, exact=False),
        f"TopK of {latents} latents, exact": partial(sl.steer, model, ranked, edits),
        "the same, firing on every token": partial(sl.steer, model, firing, edits),
    }


def decoding(source: str, batch: int, latents: int) -> dict[str, Way]:
    """24 new tokens of the real model."""
    model = real_model(source)
    ids = torch.randint(100, 10_000, (batch, 16), generator=torch.Generator().manual_seed(1))
    return {name: within(c, partial(decode, model, ids, 24)) for name, c in conditions(model, latents).items()}


def measurements(source: str, latents: int = 16_384) -> dict[str, Measurement]:
    """What is measured in turns."""
    title = "decoding, one latent set / unsteered: median (least–most)"
    contests = {f"batch {batch}": partial(decoding, source, batch, latents) for batch in (1, 8)}
    return {"decoding": Measurement(title, contests, over("plain"))}


def opening(rounds: int, width: int) -> Table:
    """Of a million latents, one: milliseconds, and bytes that the kernel counts."""
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder) / "bank"
        encoder = JumpReLU(**weights(MILLION, width, torch.float16), threshold=torch.ones(MILLION, dtype=torch.float16))
        bank_around(encoder, width).save_pretrained(bank)
        del encoder
        file = next((bank / "sites").iterdir())

        def one() -> None:
            opened = sl.ConceptBank.from_pretrained(bank)
            opened.rows(opened[f"{SITE}/654321"])

        some = [spent(one) for _ in range(rounds)]
        everything = spent(file.read_bytes)
    names = ("ms", "bytes read")
    return {
        "open, steer one": dict(zip(names, map(statistics.median, zip(*some, strict=True)), strict=True)),
        "read the whole file": dict(zip(names, everything, strict=True)),
    }


def spent(action: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds and bytes read."""

    def read() -> int:
        return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line).split()[1])

    before, start = read(), time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3, read() - before
