"""What recording activations costs, beside the model truncated after that layer, interleaved in one run.

    python scripts/bench_record.py [--layer 15] [--rounds 7] [--out bench.json]

One thread, processor time, the same token ids and precision for all. `pass` is the pass that ends at the layer; `recorded`
is `harvest` from text to shards on disk; `hidden states` is the usual way, with all layers and logits. Figures are tokens/s
over those of the truncated model (`plain`), formed within a round; `truncated again` is the noise floor.
"""

import gc
import json
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from benchmarks.measurement import SOURCE, machine, print_table, ratios

import steerlib as sl
from steerlib.text import progress
from steerlib.training.record.activations import reading
from steerlib.training.record.harvest import PRECISIONS, Precision, harvest, is_fast

CONTEXT = 128


def truncated(model: Any, layer: int) -> Any:
    """The same weights, up to and including a layer, without logits."""
    config = deepcopy(model.config)
    config.num_hidden_layers = layer + 1
    with torch.device("meta"):
        short = type(model.base_model)(config)
    kept = {name: value for name, value in model.base_model.state_dict().items() if name in short.state_dict()}
    short.load_state_dict(kept, assign=True)
    for name, buffer in model.base_model.named_buffers():
        if name in dict(short.named_buffers()):
            short.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    return short.eval()


def a_text(tokenizer: Any, tokens: int) -> str:
    """One document long enough for passes that are all full."""
    path = Path(__file__).parent.parent / "concept_banks" / "recipes" / "common" / "reference.jsonl"
    lines = " ".join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    return " ".join([lines] * (tokens // len(tokenizer(lines)["input_ids"]) + 2))


def ways(model: Any, tokenizer: Any, layer: int, tokens: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is compared, by name: each reads the same ids, as many as one pass has."""
    text, site, short, number = a_text(tokenizer, tokens), f"layers.{layer}", truncated(model, layer), count()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]).view(-1, CONTEXT)
    dtype = next(name for name, dtype in PRECISIONS.items() if dtype == model.dtype)

    def passed() -> torch.Tensor:
        with reading(model, [site]) as read:
            return read(ids, None)[site]

    def recorded() -> Any:
        kept = len(ids) * (CONTEXT - 1)  # without the first token of each piece
        how: dict[str, Any] = {"tokens": kept, "context": CONTEXT, "batch": tokens, "dtype": dtype, "compute": dtype}
        return harvest(model, tokenizer, [text], [site], folder / f"{next(number)}", **how)

    plain = {name: lambda: short(input_ids=ids, use_cache=False) for name in ("plain", "truncated again")}
    full = {"hidden states": lambda: model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[layer + 1]}
    assert torch.equal(passed(), full["hidden states"]())
    return {**plain, "pass": passed, "recorded": recorded, **full}


def interleaved(chosen: dict[str, Callable[[], Any]], rounds: int, what: str) -> dict[str, list[float]]:
    """Processor seconds of each way, every round in another order."""
    names, seconds = list(chosen), {name: [] for name in chosen}
    for name in names:
        chosen[name]()
    for r in progress(range(rounds), what):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            gc.collect()
            start = time.process_time()
            chosen[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


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
                seconds = interleaved(ways(model, tokenizer, k, tokens, Path(folder)), rounds, what)
            figures[what] = {n: [round(1 / x, 3) for x in (m, high, low)] for n, (m, low, high) in ratios(seconds).items()}
            speeds[what] = {name: tokens / sorted(values)[len(values) // 2] for name, values in seconds.items()}
    print_table("tokens/s over the truncated model's: median (least–most)", figures)
    print_table("tokens/s", speeds)
    if out is not None:
        about = {"machine": machine(), "torch": torch.__version__, "rounds": rounds, "tokens": tokens}
        out.write_text(json.dumps({**about, "over truncated": figures, "tokens/s": speeds}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
