"""What steering one latent of a sparse encoder costs: `python scripts/bench_latents.py [--rounds 7] [--out latents.json]`.

Two tables: decoding on the real SmolLM2-135M-Instruct with one latent set at every token, over plain decoding, interleaved,
one thread; and opening a bank of a million latents and reading one, in milliseconds and in bytes that the kernel counts,
beside reading the whole file. Weights are random: what is measured is cost.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks.latents import MILLION, measurements, opening
from benchmarks.measurement import SOURCE, report


def main(
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 7,
    latents: Annotated[int, typer.Option(help="of the TopK encoder")] = 16_384,
    width: Annotated[int, typer.Option(help="of the million latents")] = 576,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    source: Annotated[str, typer.Option(help="the real model")] = SOURCE,
) -> None:
    """Print what steering a latent costs."""
    torch.set_num_threads(1)
    figures = {f"one of {MILLION} latents of width {width}": opening(rounds, width)}
    with torch.no_grad():
        figures |= {part.title: part.taken(rounds) for part in measurements(source, latents).values()}
    report(figures, out, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
