"""Take the facts of shipped concepts away, measure them again, and say how near they come to what is shipped.

    python scripts/calibrate_again.py religion formality [--out again.json]

By what the bank carries: prompts, scorer and grid are those of the search that chose the shipped amounts. That had several
methods in one batch, so that the sampled half of the answers is drawn anew here; the greedy half is the same.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import steerlib as sl
from steerlib.origins import source_of

BANK = "smollm2-135m-instruct"


def stripped(concept: sl.Concept) -> sl.Concept:
    """A concept of which only the direction is known, with the vector itself as unit."""
    parts = tuple(replace(part, unit=part.unit / concept.unit) for part in concept.parts)
    unknown: dict[str, Any] = {"natural": None, "range": None, "useful": None, "beyond": "", "effects": {}, "examples": ()}
    return replace(concept, unit=1.0, parts=parts, **unknown)


def main(
    concepts: Annotated[list[str], typer.Argument(help="some of the shipped ones")],
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    threads: Annotated[int, typer.Option(help="of the processor")] = 1,
) -> None:
    """Print shipped and found figures of each concept."""
    torch.set_num_threads(threads)
    bank = sl.ConceptBank.from_pretrained(BANK)
    model, tokenizer = sl.load(source_of(bank))
    known = [stripped(concept) if concept.name in concepts else concept for concept in bank.concepts.values()]
    bare, figures = sl.ConceptBank(**{**bank.contents(), "concepts": known}), {}
    for name in concepts:
        start = time.perf_counter()
        pairs = {"shipped": bank[name], "found": sl.calibrate(model, bare, [name], tokenizer=tokenizer)[name]}
        figures[name] = {which: {"unit": c.unit, "useful": c.useful, "range": c.range} for which, c in pairs.items()}
        useful, shipped = pairs["found"].useful, pairs["shipped"].useful or 0.0
        said = (
            "no useful amount"
            if useful is None
            else f"useful amount {useful:.3g} for {shipped:.3g} ({useful / shipped - 1:+.0%})"
        )
        ends = ", range {} for {}".format(*(figures[name][which]["range"] for which in ("found", "shipped")))
        print(f"{name}: {said}{ends}; {time.perf_counter() - start:.0f} s", flush=True)
        if out is not None:
            out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
