"""What steering a denoiser costs: `python scripts/bench_diffusion.py [--rounds 7] [--out diffusion.json]`.

Time to make an image, steered over unsteered, interleaved, one thread: a U-Net with cross-attention and a transformer of image
patches, of 5 to 15 million parameters, eight steps with guidance. Weights are random: what is measured is cost.
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks.diffusion import measurements
from benchmarks.measurement import report


def main(
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 7,
    batch: Annotated[int, typer.Option(help="images at once")] = 1,
    only: Annotated[list[str], typer.Option(help="an edit that is measured, by its name; may be repeated (default: all)")] = [],  # noqa: B006
    busy: Annotated[bool, typer.Option(help="compare processor time, on a machine that does other things too")] = False,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
) -> None:
    """Print what steering a denoiser costs."""
    torch.set_num_threads(1)
    parts = measurements(batch, only, time.process_time if busy else time.perf_counter).values()
    report({part.title: part.taken(rounds) for part in parts}, out, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
