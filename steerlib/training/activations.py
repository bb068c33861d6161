"""Activations of texts at several sites, from one pass over each batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..evaluation.text import chat, progress
from ..recording import record

BATCH = 8


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], sites: Sequence[str], *, what: str
) -> dict[str, list[Float[Tensor, "tokens D"]]]:
    """Activations over the tokens of each answer to a chat prompt, by site, float32."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    prompts = [chat(tokenizer, prompt) for prompt, _ in texts]
    whole = [prompt + answer for prompt, (_, answer) in zip(prompts, texts, strict=True)]
    starts = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    for i, mask, values in _passes(model, tokenizer, whole, sites, what, add_special_tokens=False):
        for row, start in enumerate(starts[i : i + len(mask)]):
            kept = mask[row].clone()
            kept[:start] = False
            for site, x in values.items():
                found[site].append(x[row][kept].float().cpu())
    return found


@torch.no_grad()
def tokens(
    model: Any, tokenizer: Any, texts: Sequence[str], sites: Sequence[str], *, what: str
) -> dict[str, Float[Tensor, "tokens D"]]:
    """Activations of every token but the first of each text, by site, float32."""
    rows: dict[str, list[Tensor]] = {site: [] for site in sites}
    for _, mask, values in _passes(model, tokenizer, texts, sites, what, add_special_tokens=True):
        kept = mask.clone()
        kept[:, 0] = False
        for site, x in values.items():
            rows[site].append(x[kept].float().cpu())
    return {site: torch.cat(parts) for site, parts in rows.items()}


def _passes(
    model: Any, tokenizer: Any, texts: Sequence[str], sites: Sequence[str], what: str, *, add_special_tokens: bool
) -> Iterator[tuple[int, Tensor, dict[str, Tensor]]]:
    """Index of the first text, mask and activations of each batch, pads on the right."""
    for i in progress(range(0, len(texts), BATCH), what):
        batch = tokenizer(
            list(texts[i : i + BATCH]),
            return_tensors="pt",
            padding=True,
            padding_side="right",
            add_special_tokens=add_special_tokens,
        )
        ids, mask = (batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
        with record(model, sites) as tape:
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        yield i, mask.bool(), {site: passes[0][1] for site, passes in tape.items()}
