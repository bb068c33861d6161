"""Recording activations at a layer, beside the same pass done in other ways."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from itertools import count
from pathlib import Path
from typing import Any

import torch

from steerlib.training.record.activations import reading
from steerlib.training.record.harvest import PRECISIONS, harvest

from .measurement import Way, within

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
    path = Path(__file__).parents[2] / "concept_banks" / "recipes" / "common" / "reference.jsonl"
    lines = " ".join(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    return " ".join([lines] * (tokens // len(tokenizer(lines)["input_ids"]) + 2))


def ways(model: Any, tokenizer: Any, layer: int, tokens: int, folder: Path) -> dict[str, Way]:
    """What is compared, by name, in processor time: each reads the same ids, as many as one pass has."""
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
    chosen: dict[str, Callable[[], Any]] = {**plain, "pass": passed, "recorded": recorded, **full}
    return {name: within(nullcontext, run, time.process_time) for name, run in chosen.items()}
