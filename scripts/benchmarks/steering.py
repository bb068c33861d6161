"""Steering text: decoding a real model, own cost per token, entering and leaving a second time.

A model whose layers pass their input on has next to no cost of its own: what hooks cost is all that is left.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import steerlib as sl
from steerlib.bank import SiteFacts

from .measurement import Condition, Measurement, Seconds, Table, Way, medians, over, within
from .peers import peer_conditions

COUNTS, SHORT, LONG = (1, 8), 2, 130
"""Concepts; new tokens of the short and of the long run."""


class PassOn(LlamaDecoderLayer):
    """A layer that gives back its input; it only keeps the cache's length true."""

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> torch.Tensor:
        if past_key_values is not None and self.self_attn.layer_idx == 0:
            key = hidden_states[:, None, :, :1]
            past_key_values.update(key, key, 0)
        return hidden_states


@cache
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


@cache
def real_model(source: str) -> Any:
    """A model that never ends a text by itself."""
    model: Any = sl.load(source)[0]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def bank_for(model: Any, count: int) -> sl.ConceptBank:
    """One small direction at each of some layers, spread over the model, without caps, as the bare hook adds it."""
    generator = torch.Generator().manual_seed(0)
    width, depth = model.config.hidden_size, model.config.num_hidden_layers
    sites = [f"layers.{round((i + 1) * depth / (count + 1))}" for i in range(count)]
    vectors = {site: torch.randn(1, width, generator=generator) * 0.01 for site in sites}
    return sl.ConceptBank(
        "bench",
        [sl.Concept(name=f"c{i}", encoder=site, index=0) for i, site in enumerate(sites)],
        {site: sl.Directions(vectors[site]) for site in sites},
        base=sl.BaseModel(),
        sites={site: SiteFacts(width=width) for site in sites},
    )


@contextmanager
def bare_hooks(model: Any, vectors: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """The least anyone can do: a forward hook that adds a vector."""
    handles = []
    for layer, vector in vectors.items():
        added = vector.to(model.dtype)
        handles.append(model.model.layers[layer].register_forward_hook(lambda _m, _a, out, v=added: out + v))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def conditions(model: Any, count: int, peers: bool) -> dict[str, Condition]:
    """What is compared, by name."""
    bank = bank_for(model, count)
    vectors = {int(c.encoder.partition(".")[2]): bank.rows(c).write[0] for c in bank.concepts.values()}
    chosen: dict[str, Condition] = {
        "plain": nullcontext,
        "plain again": nullcontext,
        "bare hook": partial(bare_hooks, model, vectors),
        "steerlib": partial(sl.steer, model, bank, dict.fromkeys(bank.concepts, 1.0)),
    }
    return chosen | (peer_conditions(model, vectors) if peers else {})


def decode(model: Any, ids: torch.Tensor, new: int) -> None:
    """Greedy decoding of exactly so many new tokens."""
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False)


def decoding(source: str, batch: int, count: int, peers: bool) -> dict[str, Way]:
    """24 new tokens of the real model."""
    model = real_model(source)
    ids = torch.randint(100, 10_000, (batch, 16), generator=torch.Generator().manual_seed(1))
    return {name: within(c, partial(decode, model, ids, 24)) for name, c in conditions(model, count, peers).items()}


def passing_on(new: int, count: int, peers: bool) -> dict[str, Way]:
    """So many new tokens of the model that does next to nothing, in processor time."""
    model, ids = pass_on_model(), torch.randint(3, 100, (1, 4), generator=torch.Generator().manual_seed(1))
    run = partial(decode, model, ids, new)
    return {name: within(c, run, time.process_time) for name, c in conditions(model, count, peers).items()}


def slopes(contests: Mapping[str, Seconds]) -> Table:
    """Microseconds a token: between the least of the short and of the long runs, less the same of `plain`."""
    table = {}
    for count in COUNTS:
        short, long = (contests[row(count, new)] for new in (SHORT, LONG))
        slope = {name: (min(long[name]) - min(short[name])) / (LONG - SHORT) * 1e6 for name in long}
        table[counted(count, "vector")] = {name: round(value - slope["plain"], 1) for name, value in slope.items()}
    return table


def row(count: int, new: int) -> str:
    """The name of a contest of `passing_on`."""
    return f"{counted(count, 'vector')}, {new} new tokens"


def entering(source: str, count: int, peers: bool) -> dict[str, Way]:
    """Entering and leaving, after a pass in each condition."""
    model, ids = real_model(source), torch.tensor([[1, 2, 3]])
    chosen = conditions(model, count, peers)
    for condition in chosen.values():
        with condition(), torch.no_grad():
            model(ids)

    def once(condition: Condition) -> float:
        start = time.perf_counter()
        with condition():
            pass
        return time.perf_counter() - start

    return {name: partial(once, condition) for name, condition in chosen.items()}


def counted(count: int, what: str) -> str:
    """One thing, two things."""
    return f"{count} {what}{'s' if count > 1 else ''}"


def measurements(source: str, peers: bool = False) -> dict[str, Measurement]:
    """All there is to measure, by the name it is asked for."""
    real = {(count, batch): f"{counted(count, 'concept')}, batch {batch}" for count in COUNTS for batch in (1, 8)}
    own = {(count, new): row(count, new) for count in COUNTS for new in (SHORT, LONG)}
    return {
        "decoding": Measurement(
            "decoding, steered / unsteered: median (least–most)",
            {what: partial(decoding, source, batch, count, peers) for (count, batch), what in real.items()},
            over("plain"),
        ),
        "own": Measurement(
            "own cost, µs per token",
            {what: partial(passing_on, new, count, peers) for (count, new), what in own.items()},
            slopes,
            times=6,
        ),
        "entering": Measurement(
            "enter + leave a second time, µs",
            {counted(count, "concept"): partial(entering, source, count, peers) for count in COUNTS},
            medians(1e6),
            times=10,
        ),
    }
