"""What recording activations costs, beside the model truncated after that layer, interleaved in one run.

    python scripts/bench_record.py [--layer 15] [--rounds 7] [--out bench.json]

One thread, processor time, the same token ids and precision for all. `pass` is the pass that ends at the layer; `recorded`
is `harvest` from text to shards on disk; `hidden states` is the usual way, with all layers and logits. Figures are tokens/s
over those of the truncated model (`plain`), formed within a round; `truncated again` is the noise floor.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from benchmarks.measurement import SOURCE, in_turns, report, spread
from benchmarks.recording import ways

import steerlib as sl
from steerlib.training.record.harvest import PRECISIONS, Precision, is_fast


def main(
    layer: Annotated[list[int], typer.Option(help="record its output; may be repeated")] = [7, 15],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 7,
    tokens: Annotated[int, typer.Option(help="tokens of a pass, a multiple of 128")] = 2048,
    precision: Annotated[list[str], typer.Option(help="bf16 or fp32; default: those the machine is fast at")] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    source: Annotated[str, typer.Option(help="the model")] = SOURCE,
) -> None:
    """Print what recording costs."""
    torch.set_num_threads(1)
    known: list[Precision] = ["fp32", "bf16"]
    chosen = [p for p in known if (p in precision if precision else p == "fp32" or is_fast(torch.device("cpu"), p))]
    figures, speeds = {}, {}
    for p in chosen:
        model, tokenizer = sl.load(source, dtype=PRECISIONS[p])
        for k in layer:
            with torch.no_grad(), TemporaryDirectory() as folder:
                what = f"layers.{k}, {p}"
                seconds = in_turns(ways(model, tokenizer, k, tokens, Path(folder)), rounds, what)
            figures[what] = {
                name: spread(base / own for base, own in zip(seconds["plain"], values, strict=True))
                for name, values in seconds.items()
            }
            speeds[what] = {name: tokens / sorted(values)[len(values) // 2] for name, values in seconds.items()}
    report({"over truncated": figures, "tokens/s": speeds}, out, rounds=rounds, tokens=tokens)


if __name__ == "__main__":
    typer.run(main)
