"""Activations of texts at several sites, from one pass over each batch that ends at the deepest of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import SiteNotReached
from ...passes import StepState
from ...steering.recording import observing
from ...text import behind, chat, is_pair, ordinary, progress, tokens_of

BATCH = 8
LENGTH = 48
"""Most tokens that a decoder writes of an ordinary text."""
Read = Callable[..., dict[str, Tensor]]
"""`ids[B, N]` and `mask[B, N]`, or None without pads, to activations `x[B, N, D]` by site; of an encoder-decoder, what else it
is given by name."""


class Enough(Exception):  # noqa: N818 - nothing went wrong
    """Ends a pass once every site was seen."""


@contextmanager
def reading(model: Any, sites: Sequence[str], dtype: torch.dtype | None = None) -> Iterator[Read]:
    """Inside the block, passes over token ids that end where the last of the sites is reached, without logits.

    With `dtype` they compute in it, on a copy of the weights; the model keeps its own.
    """
    seen: dict[str, Tensor] = {}

    def keeper(site: str) -> Callable[[Tensor, StepState], None]:
        def observe(x: Tensor, state: StepState) -> None:  # noqa: ARG001
            seen.setdefault(site, x.detach().clone())
            if len(seen) == len(sites):
                raise Enough

        return observe

    run = _computing_in(model.base_model, dtype)

    @torch.no_grad()
    def read(ids: Tensor, mask: Tensor | None, **others: Tensor) -> dict[str, Tensor]:
        seen.clear()
        try:
            run(input_ids=ids, attention_mask=mask, use_cache=False, **others)
        except Enough:
            return dict(seen)
        missed = ", ".join(repr(site) for site in sites if site not in seen)
        raise SiteNotReached(f"the model ran and did not reach {missed}; name sites that a plain forward passes")

    with observing(model, {site: keeper(site) for site in sites}):
        yield read


def _computing_in(model: Any, dtype: torch.dtype | None) -> Callable[..., Any]:
    weights = {name: p for name, p in model.named_parameters() if p.is_floating_point() and dtype not in (None, p.dtype)}
    if not weights:
        return model
    cast = {name: p.detach().to(dtype) for name, p in weights.items()}
    return lambda **kwargs: torch.func.functional_call(model, cast, kwargs=kwargs)


@torch.no_grad()
def answers(
    model: Any, tokenizer: Any, texts: Sequence[tuple[Any, str]], sites: Sequence[str], *, what: str
) -> dict[str, list[Float[Tensor, "tokens D"]]]:
    """Activations over the tokens of each answer to a prompt, a string or the messages of a chat, by site, float32."""
    prompts = [chat(tokenizer, prompt, model=model) for prompt, _ in texts]
    if is_pair(model):
        return _decoded(model, tokenizer, prompts, [answer for _, answer in texts], sites, what)
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    whole = [prompt + behind(prompt, answer) for prompt, (_, answer) in zip(prompts, texts, strict=True)]
    starts = [len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts]
    for i, mask, values in _passes(model, tokenizer, whole, sites, what, add_special_tokens=False):
        for row, start in enumerate(starts[i : i + len(mask)]):
            kept = mask[row].clone()
            kept[:start] = False
            for site, x in values.items():
                found[site].append(x[row][kept].float().cpu())
    return found


@torch.no_grad()
def _decoded(
    model: Any, tokenizer: Any, asked: Sequence[str], answers: Sequence[str], sites: Sequence[str], what: str
) -> dict[str, list[Float[Tensor, "tokens D"]]]:
    """Activations of a decoder over the tokens of each answer, its encoder having read what was asked; without answers, over
    what the model writes itself."""
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for i in progress(range(0, len(asked), BATCH), what):
        some = asked[i : i + BATCH]
        if answers:
            how: dict[str, Any] = {"padding": True, "padding_side": "right", "add_special_tokens": False}
            batch = tokenizer(list(answers[i : i + BATCH]), return_tensors="pt", **how)
            done = tokens_of(model, tokenizer, some, (batch["input_ids"], batch["attention_mask"].bool()))
        else:
            done = ordinary(model, tokenizer, some, LENGTH)
        given = {"decoder_input_ids": done.ids, "decoder_attention_mask": done.mask.long()}
        with reading(model, sites) as read:
            values = read(done.read["input_ids"], done.read["attention_mask"], **given)
        for site, x in values.items():
            found[site] += [row[done.prompt :][real].float().cpu() for row, real in zip(x, done.new[1], strict=True)]
    return found


def tokens(
    model: Any, tokenizer: Any, texts: Sequence[str], sites: Sequence[str], *, what: str
) -> dict[str, Float[Tensor, "tokens D"]]:
    """Activations of every token but the first of each text, by site, float32."""
    return {site: torch.cat(parts) for site, parts in by_text(model, tokenizer, texts, sites, what=what).items()}


@torch.no_grad()
def by_text(
    model: Any, tokenizer: Any, texts: Sequence[str], sites: Sequence[str], *, what: str
) -> dict[str, list[Float[Tensor, "tokens D"]]]:
    """The same, text by text."""
    if is_pair(model):
        return _decoded(model, tokenizer, texts, (), sites, what)
    found: dict[str, list[Tensor]] = {site: [] for site in sites}
    for _, mask, values in _passes(model, tokenizer, texts, sites, what, add_special_tokens=True):
        kept = mask.clone()
        kept[:, 0] = False
        for site, x in values.items():
            found[site] += [row[own].float().cpu() for row, own in zip(x, kept, strict=True)]
    return found


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
        with reading(model, sites) as read:
            values = read(ids, mask)
        yield i, mask.bool(), values
