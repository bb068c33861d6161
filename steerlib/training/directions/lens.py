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

from ...errors import BadRecipe, Unanswerable, UnsupportedTarget
from ...hosts import Host, host_for
from ...steering.dispatch import is_edited
from ...steering.recording import observing, replacing
from ...text import progress
from ...vocabulary import aim_of, unembedding
from ..record.activations import Enough
from .objectives import frozen

BATCH = 8
"""Texts of a pass."""


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
        words: words that are one token each (`steerlib.vocabulary.forms` says how), or several such words with spaces between
            them, whose directions are averaged. A leading space makes no difference.
        texts: ordinary text. One pass forward a batch of them serves all words, and one pass backward a word all sites.
        sites: names of sites; default: every `layers.k`.
        length: tokens that are read of each text.
        skip: first positions of each text whose gradients are left out, since attention rests there.

    Raises:
        UnknownConcept: a word is several tokens.
        UnsupportedTarget: not a causal language model.
        Unanswerable: the model is steered here.

    >>> found = word_directions(model, tokenizer, ["ocean", "winter"], texts)  # doctest: +SKIP
    >>> found["ocean"]["layers.10"].shape  # doctest: +SKIP
    torch.Size([576])
    """
    rows = unembedding(host_for(model).model)[1].weight
    aims = torch.stack([aim_of(tokenizer, rows, word) for word in words])
    found = pulled_back(model, tokenizer, aims, texts, sites=sites, length=length, skip=skip)
    return {word: {site: each[k] for site, each in found.items()} for k, word in enumerate(words)}


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
    if is_edited(host := host_for(model)):
        raise Unanswerable(
            "the direction of a word is that of the unsteered model, and a session steers it here; ask for it before"
        )
    names = list(sites) if sites is not None else [site for site in host.sites() if site.removeprefix("layers.").isdigit()]
    sums: dict[str, Any] = dict.fromkeys(names, 0)
    count = 0
    for ids, mask in progress([*_batches(tokenizer, texts, length)], "gradients of words"):
        ids, mask = ids.to(model.device), mask.to(model.device)
        source = mask.clone()
        source[:, :skip] = False
        with torch.inference_mode(False), frozen(model):
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
