"""The direction of a word: what makes it likelier everywhere downstream. It needs a model and ordinary text, no examples.

    J_l = mean over source positions p of the sum over p' >= p of  d y[p'] / d h_l[p]     [D, D]
    d_l = (W[v] - mean of all W) J_l                                                       [D]

`h_l` is the stream at a site, `y` what the unembedding `W` is given, after the final norm; `v` is the word's token. This is the
transposed Jacobian lens (Gurnee et al. 2026). For a few words no J is needed: the row of `W` less the mean row, put as the
gradient of `y` at every position, comes back through the model as the d_l of all sites at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...errors import BadRecipe, UnknownConcept, UnsupportedTarget
from ...hosts import Host, host_for
from ...steering.recording import observing, replacing
from ...text import progress
from ..record.activations import Enough
from .objectives import frozen

BATCH = 8
"""Texts of a pass."""
NEAR = 20
"""A plural counts as a form of a word if the word's row in the unembedding has it among so many nearest."""


def word_directions(
    model: Any,
    tokenizer: Any,
    words: Sequence[str],
    texts: Sequence[str],
    *,
    sites: Sequence[str] | None = None,
    length: int = 64,
    skip: int = 4,
) -> dict[str, dict[str, Float[Tensor, " D"]]]:
    """By word and name of site, the gradient of the word's logit over later positions, averaged over `texts`.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: the model's own.
        words: words that are one token each (see `forms`), or several such words with spaces between them, whose directions are
            averaged. A leading space makes no difference.
        texts: ordinary text. One pass forward a batch of them serves all words, and one pass backward a word all sites.
        sites: names of sites; default: every `layers.k`.
        length: tokens that are read of each text.
        skip: first positions of each text whose gradients are left out, since attention rests there.

    Raises:
        UnknownConcept: a word is several tokens.
        UnsupportedTarget: not a causal language model.

    >>> found = word_directions(model, tokenizer, ["ocean", "winter"], texts)  # doctest: +SKIP
    >>> found["ocean"]["layers.10"].shape  # doctest: +SKIP
    torch.Size([576])
    """
    rows = unembedding(host_for(model).model)[1].weight
    aims = torch.stack([aim_of(tokenizer, rows, word) for word in words])
    found = pulled_back(model, tokenizer, aims, texts, sites=sites, length=length, skip=skip)
    return {word: {site: each[k] for site, each in found.items()} for k, word in enumerate(words)}


def forms(tokenizer: Any, word: str, rows: Float[Tensor, "V D"]) -> list[int]:
    """Tokens that are a word: as it is given, capitalised, and its plurals; empty where it is several tokens.

    Each with a space before it; without one where none has one. A token counts if decoding gives the form back, and a plural if
    the word's row in the unembedding has it among the `NEAR` nearest: "news" is none of "new".
    """
    word = word.strip()
    for space in (" ", ""):
        own = [i for form in dict.fromkeys((word, _capital(word))) if (i := _token(tokenizer, space, form)) is not None]
        if own:
            many = [form for plural in _plurals(word) for form in (plural, _capital(plural))]
            others = [i for form in dict.fromkeys(many) if (i := _token(tokenizer, space, form)) is not None]
            return list(dict.fromkeys(own + [i for i in others if _is_near(rows, own[0], i)]))
    return []


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _plurals(word: str) -> list[str]:
    ending = [f"{word[:-1]}ies"] if word.endswith("y") else []
    return [*ending, f"{word}s", f"{word}es"] if len(word) > 2 and word.isalpha() else []


def _token(tokenizer: Any, space: str, form: str) -> int | None:
    """The one token of a form; None where it has several, or decoding gives another one."""
    ids = tokenizer(space + form, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 and form and tokenizer.decode(ids).strip() == form else None


@torch.no_grad()
def _is_near(rows: Float[Tensor, "V D"], word: int, other: int) -> bool:
    centred = rows.float() - rows.float().mean(0)
    closeness = centred @ centred[word] / centred.norm(dim=-1).clamp(min=1e-12)
    return int((closeness > closeness[other]).sum()) <= NEAR  # the word itself is one of them


@torch.no_grad()
def aim_of(tokenizer: Any, rows: Float[Tensor, "V D"], word: str) -> Float[Tensor, " D"]:
    """What is put as the gradient of `y`: the mean row of the word's forms less that of all tokens, float32."""
    parts = word.split()
    tokens = [forms(tokenizer, part, rows) for part in parts]
    if not parts or not all(tokens):
        part = next((part for part, own in zip(parts, tokens, strict=True) if not own), word)
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(f" {part}", add_special_tokens=False)["input_ids"])
        raise UnknownConcept(
            f"expected a word that is one token of this model, got {part!r:.80}, which is {len(pieces)}: "
            f"{' '.join(map(repr, pieces))!s:.200}; take another word for it, or make the concept from examples"
        )
    return torch.stack([rows[own].float().mean(0) for own in tokens]).mean(0) - rows.float().mean(0)


def unembedding(model: Any) -> tuple[str, Any]:
    """The path of the module that makes logits of `y`, and the module; raises `UnsupportedTarget` where there is none."""
    get = getattr(model, "get_output_embeddings", lambda: None)
    head: Any = None if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else get()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if path is None or not isinstance(getattr(head, "weight", None), Tensor) or head.weight.ndim != 2:
        raise UnsupportedTarget(
            f"expected a causal language model with one unembedding, got {type(model).__name__}; words are directions of a "
            "decoder that reads text alone"
        )
    if model.training:
        raise UnsupportedTarget("expected a model in evaluation mode, since dropout would change the gradients: model.eval()")
    return path, head


def pulled_back(
    model: Any,
    tokenizer: Any,
    aims: Float[Tensor, "K D"],
    texts: Sequence[str],
    *,
    sites: Sequence[str] | None = None,
    length: int = 64,
    skip: int = 4,
) -> dict[str, Float[Tensor, "K D"]]:
    """`aims @ J_l` by name of site, on the CPU, for any gradients of `y`; other arguments are those of `word_directions`."""
    host = host_for(model)
    names = list(sites) if sites is not None else [site for site in host.sites() if site.removeprefix("layers.").isdigit()]
    sums: dict[str, Any] = dict.fromkeys(names, 0)
    count = 0
    for ids, mask in progress([*_batches(tokenizer, texts, length)], "gradients of words"):
        ids, mask = ids.to(model.device), mask.to(model.device)
        source = mask.clone()
        source[:, :skip] = False
        with frozen(model):
            x, y = _pass(host, names, ids, mask)
            if not count:
                _check_causal(x, y)
            found = [_gradients(x, y, aim * mask[..., None]) for aim in aims.to(y)]
        for site, gradients in zip(names, zip(*found, strict=True), strict=True):
            sums[site] = sums[site] + torch.stack([each[source].float().sum(0) for each in gradients]).cpu()
        count += int(source.sum())
    if not count:
        raise BadRecipe(f"expected texts of more than {skip} tokens, got {len(texts)} without any")
    return {site: total / count for site, total in sums.items()}


def _batches(tokenizer: Any, texts: Sequence[str], length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and which are real, pads on the right."""
    read = [torch.tensor(tokenizer(text, truncation=True, max_length=length)["input_ids"]) for text in texts]
    for i in range(0, len(read), BATCH):
        some = read[i : i + BATCH]
        real = pad_sequence([torch.ones_like(ids) for ids in some], batch_first=True)
        yield pad_sequence(some, batch_first=True), real.bool()


def _pass(host: Host, sites: Sequence[str], ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """What flows at the sites, and `y` as a function of it."""
    seen: dict[str, Tensor] = {}

    def keep(site: str, x: Tensor, state: object) -> Tensor:  # noqa: ARG001
        seen[site] = x if x.requires_grad else x.detach().requires_grad_()
        return seen[site].clone()  # which later modules may change in place

    def end(y: Tensor, state: object) -> None:  # noqa: ARG001
        seen[""] = y
        raise Enough

    model: Any = host.model
    with ExitStack() as stack:
        stack.enter_context(replacing(model, {site: partial(keep, site) for site in sites}))
        stack.enter_context(observing(model, {f"{unembedding(model)[0]}.in": end}))
        with suppress(Enough):
            model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    if missed := [site for site in (*sites, "") if site not in seen]:
        raise UnsupportedTarget(f"the model ran and did not reach {missed[0] or 'its unembedding'!r}; name sites of its text")
    if not seen[""].requires_grad or seen[""].shape[:2] != ids.shape:
        raise UnsupportedTarget(f"{type(model).__name__} does not make logits of every token from {', '.join(sites)}")
    return [seen[site] for site in sites], seen[""]


def _gradients(x: Sequence[Tensor], y: Tensor, aim: Float[Tensor, "B N D"]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, x, aim, retain_graph=True, materialize_grads=True)


def _check_causal(x: Sequence[Tensor], y: Tensor) -> None:
    """Raise `UnsupportedTarget` where a token's logits depend on later tokens."""
    first = torch.zeros_like(y)
    first[:, 0] = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0)).to(y)
    if any(gradient[:, 1:].any() for gradient in _gradients(x, y, first)):
        raise UnsupportedTarget("expected a causal language model, and the first token of this one reads later ones")
