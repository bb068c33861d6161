"""What directions from labelled rows cost, beside a bare loop over the model truncated after their layer, in turns.

    python scripts/bench_directions.py [--rows 5000] [--words 40] [--layer 15] [--rounds 7] [--out bench.json]

One thread, processor time, the same texts in the same batches. The bare loop tokenises, runs the truncated model without
logits, and takes the mean of each text over its tokens but the first and pads. Figures are seconds over those of the bare loop,
formed within a round; `bare again` is the noise floor.
"""

import json
import time
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.measurement import SOURCE, in_turns, report, spread, within
from benchmarks.recording import truncated

import steerlib as sl
from steerlib.training.record.activations import BATCH

REFERENCE = Path(__file__).parents[1] / "concept_banks" / "recipes" / "common" / "reference.jsonl"


def bare(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Mean activations `[n, D]`."""
    found = []
    for k in range(0, len(texts), BATCH):
        batch = tokenizer(texts[k : k + BATCH], return_tensors="pt", padding=True, padding_side="right")
        x = model(**batch, use_cache=False).last_hidden_state
        real = batch["attention_mask"].clone()
        real[:, 0] = 0
        found.append((x * real[..., None]).sum(1) / real.sum(1, keepdim=True))
    return torch.cat(found)


def main(
    rows: Annotated[int, typer.Option(help="texts, half of them with the concept")] = 5000,
    words: Annotated[int | None, typer.Option(help="words that are left of each text; few of them are the harder case")] = None,
    layer: Annotated[int, typer.Option(help="the block after which they are read")] = 15,
    rounds: Annotated[int, typer.Option(help="rounds of the comparison")] = 7,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    source: Annotated[str, typer.Option(help="the model")] = SOURCE,
) -> None:
    """Print what directions cost."""
    torch.set_num_threads(1)
    model, tokenizer = sl.load(source)
    known = [json.loads(line)["text"] for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    texts = [" ".join(text.split()[:words]) for text in islice(cycle(known), rows)]
    data = {"a": sl.Contrast(tuple(texts[::2]), tuple(texts[1::2]))}
    short = truncated(model, layer)
    short.norm = torch.nn.Identity()

    def by_hand() -> torch.Tensor:
        positive, negative = (bare(short, tokenizer, some) for some in (texts[::2], texts[1::2]))
        return positive.mean(0) - negative.mean(0)

    def directions() -> torch.Tensor:
        bank = sl.directions(model, data, sites=[layer], tokenizer=tokenizer)
        return bank.rows(bank["a"]).write[0]

    with torch.no_grad():
        torch.testing.assert_close(directions(), by_hand(), atol=1e-3, rtol=1e-3)
        runs = {"bare": by_hand, "bare again": by_hand, "sl.directions": directions}
        what = f"{rows} rows{f' of {words} words' if words else ''}, layers.{layer}"
        seconds = in_turns({name: within(nullcontext, run, time.process_time) for name, run in runs.items()}, rounds, what)
    figures = {n: spread(own / base for own, base in zip(v, seconds["bare"], strict=True)) for n, v in seconds.items()}
    passes = {"ms a text": {n: round(sorted(v)[len(v) // 2] / rows * 1000, 2) for n, v in seconds.items()}}
    report({"over a bare loop": {what: figures}, "time": passes}, out, rounds=rounds, rows=rows)


if __name__ == "__main__":
    typer.run(main)
