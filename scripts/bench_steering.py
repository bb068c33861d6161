"""What steering costs, measured beside a bare PyTorch hook, interleaved in one run.

    python scripts/bench_steering.py [--rounds 7] [--out bench.json] [--peers]

Three tables: decoding on the real SmolLM2-135M-Instruct; own cost per token on a model whose layers only pass their
input on; entering and leaving `steer` a second time. One thread; ratios are formed within a round; `plain again` is the
noise floor. With `--peers`, repeng and steering-vectors run too where they are installed.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from benchmarks.measurement import SOURCE, report
from benchmarks.steering import measurements


def main(
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 7,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    peers: Annotated[bool, typer.Option(help="measure repeng and steering-vectors too")] = False,
    source: Annotated[str, typer.Option(help="the real model")] = SOURCE,
    part: Annotated[list[str], typer.Option(help="decoding, own or entering; may be repeated (default: all)")] = [],  # noqa: B006
) -> None:
    """Print what steering costs."""
    torch.set_num_threads(1)
    known = measurements(source, peers)
    with torch.no_grad():
        figures = {known[name].title: known[name].taken(rounds) for name in part or known}
    report(figures, out, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
