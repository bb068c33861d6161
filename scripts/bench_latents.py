"""What steering one latent of a sparse encoder costs: `python scripts/bench_latents.py [--rounds 7] [--out latents.json]`.

Two tables: decoding on the real SmolLM2-135M-Instruct with one latent set at every token, over plain decoding, interleaved,
one thread; and opening a bank of a million latents and reading one, in milliseconds and in bytes that the kernel counts,
beside reading the whole file. Weights are random: what is measured is cost.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bench_steering import SOURCE, Condition, interleaved, machine, print_table, ratios

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.encoders import Encoder, JumpReLU, ReLU, TopK

SITE, MILLION, K = "layers.15", 1_000_000, 32


def weights(n: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random rows of length 1, small enough to change no text much."""
    g = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(n, width, generator=g) / width**0.5 for name in ("encoder", "decoder")}
    return {name: tensor.to(dtype) for name, tensor in {**rows, "bias": torch.zeros(n)}.items()}


def bank_of(encoder: Encoder, width: int) -> sl.ConceptBank:
    """A bank of one encoder for any model."""
    return sl.ConceptBank("latents", [], {SITE: encoder}, base=sl.BaseModel(), sites={SITE: SiteFacts(width=width)})


def conditions(model: Any, latents: int) -> dict[str, Condition]:
    """One latent set to a small value at every token, by kind of encoder."""
    width = model.config.hidden_size
    small, large = weights(4608, width), weights(latents, width)
    edits = {f"{SITE}/17": sl.Set(0.01, unit="raw")}
    ranked = bank_of(TopK(**large, k=K, threshold=1.0), width)
    firing = bank_of(TopK(**{**large, "bias": 1e3 * (torch.arange(latents) == 17)}, k=K), width)
    chosen: dict[str, Condition] = {"plain": nullcontext, "plain again": nullcontext}
    for name, encoder in {
        "ReLU": ReLU(**small),
        "JumpReLU": JumpReLU(**small, threshold=torch.full((4608,), 0.5)),
    }.items():
        chosen[name] = partial(sl.steer, model, bank_of(encoder, width), edits)
    chosen["TopK by threshold"] = lambda: sl.steer(model, ranked, edits, exact=False)
    chosen[f"TopK of {latents} latents, exact"] = lambda: sl.steer(model, ranked, edits)
    chosen["the same, firing on every token"] = lambda: sl.steer(model, firing, edits)
    return chosen


def decoding(model: Any, rounds: int, latents: int) -> dict[str, Any]:
    """Steered over unsteered decoding."""
    result = {}
    for batch in (1, 8):
        ids = torch.randint(100, 10_000, (batch, 16), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)

        def run(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            model.generate(ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False)

        result[f"batch {batch}"] = ratios(interleaved(run, conditions(model, latents), rounds, f"batch {batch}"))
    return result


def counted(action: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds and bytes read."""

    def read() -> int:
        return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line).split()[1])

    before, start = read(), time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3, read() - before


def opening(rounds: int, width: int) -> dict[str, Any]:
    """Of a million latents, one."""
    with tempfile.TemporaryDirectory() as place:
        encoder = JumpReLU(**weights(MILLION, width, torch.float16), threshold=torch.ones(MILLION, dtype=torch.float16))
        bank_of(encoder, width).save_pretrained(Path(place) / "bank")
        del encoder
        file = next((Path(place) / "bank" / "sites").iterdir())

        def one() -> None:
            bank = sl.ConceptBank.from_pretrained(Path(place) / "bank")
            bank.rows(bank[f"{SITE}/654321"])

        some = [counted(one) for _ in range(rounds)]
        everything = counted(file.read_bytes)
    names = ("ms", "bytes read")
    return {
        "open, steer one": dict(zip(names, map(statistics.median, zip(*some, strict=True)), strict=True)),
        "read the whole file": dict(zip(names, everything, strict=True)),
    }


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
    model: Any = sl.load(source)[0]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    with torch.no_grad():
        figures["decoding, one latent set / unsteered: median (least–most)"] = decoding(model, rounds, latents)
    for title, rows in figures.items():
        print_table(title, rows)
    if out is not None:
        about = {"machine": machine(), "torch": torch.__version__, "rounds": rounds}
        out.write_text(json.dumps({**about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
