"""What an encoder keeps of activations it was not trained on, what it costs the model, and what its latents tell of texts.

Every figure of the encoder stands beside that of a random dictionary that keeps as many latents.

x, x^  activations and their reconstruction [N, D]     z  code [N, n]     p  next-token distributions
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..encoders import Sparse
from ..steering.recording import Replace, observing, replacing
from ..text import progress
from .probing import Attribute
from .representation import dead_share, dense_share, explained_variance, l0, random_encoder, stability

BEST = 5
"""Latents that are named for an attribute."""


def kept(encoder: Sparse, x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"], control: Sparse) -> dict[str, Any]:
    """What a code of `x` keeps of `y`, which is `x` itself unless the encoder is a transcoder.

    `explained` and `control`: explained variance, of the encoder and of `control`, which reads `y`. `l0`: latents that fire on
    a token. `dead`, `dense`: shares of latents that fire on no token, and on more than a tenth of them.
    """
    z = encoder.encode(x)
    return {
        "kind": encoder.kind,
        "latents": len(encoder.encoder),
        "tokens": len(x),
        "explained": explained_variance(y, encoder.reconstruct(x)),
        "control": explained_variance(y, control.reconstruct(y)),
        "l0": l0(z),
        "dead": dead_share(z),
        "dense": dense_share(z),
    }


def control_of(encoder: Sparse, x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"]) -> Sparse:
    """A random dictionary that reads and writes `y`, and keeps as many latents on a token as the encoder keeps of `x`."""
    return random_encoder(encoder, y, max(1, round(l0(encoder.encode(x)))))


def quality(
    model: Any,
    tokenizer: Any,
    encoder: Sparse,
    site: str,
    x: Float[Tensor, "N D"],
    texts: Sequence[str],
    *,
    reads: str = "",
    y: Float[Tensor, "N D2"] | None = None,
) -> dict[str, Any]:
    """All figures of an encoder of a language model at a site, on its activations `x` and on texts.

    Those of `kept`, and `recovered`, `control_recovered`: `1 - (loss with x^ - loss) / (loss with the mean - loss)` (loss
    recovered, Bricken et al. 2023); `kl`: KL(p || p with x^), nats per token. A transcoder reads `x` at another site, `reads`,
    and writes `y`.
    """
    y = x if y is None else y
    control, middle = control_of(encoder, x, y), y.mean(0)
    plain = _next_tokens(model, tokenizer, texts)

    def passing(make: Replace, reads: str = "") -> NextTokens:
        """Predictions while activations at the site are what a function makes of them, or of those at `reads`."""
        seen: list[Tensor] = []
        observers = {reads: lambda x, _: seen.append(x)} if reads else {}
        edits: dict[str, Replace] = {site: lambda x, state: make(seen.pop() if reads else x, state).to(x.dtype)}
        with observing(model, observers), replacing(model, edits):
            return _next_tokens(model, tokenizer, texts)

    mean = passing(lambda a, _: middle.to(a.device).expand_as(a))
    own = passing(lambda a, _: encoder.reconstruct(a), reads)
    random = passing(lambda a, _: control.reconstruct(a))
    whole = float(mean.loss - plain.loss) or 1e-9
    return kept(encoder, x, y, control) | {
        "recovered": 1 - float(own.loss - plain.loss) / whole,
        "control_recovered": 1 - float(random.loss - plain.loss) / whole,
        "kl": float((plain.scores.exp() * (plain.scores - own.scores)).sum(-1).mean()),
    }


class NextTokens(NamedTuple):
    """Predictions of a model on texts: the mean cross-entropy in nats per token, and log-probabilities where there is a next
    token."""

    loss: Float[Tensor, ""]
    scores: Float[Tensor, "tokens vocab"]


@torch.no_grad()
def _next_tokens(model: Any, tokenizer: Any, texts: Sequence[str], length: int = 32) -> NextTokens:
    """Text by text, so that there are no pads."""
    scores, own = [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=length)["input_ids"].to(model.device)
        if ids.shape[1] > 1:
            scores.append(model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).cpu())
            own.append(scores[-1].gather(-1, ids[0, 1:, None].cpu()))
    return NextTokens(-torch.cat(own).mean(), torch.cat(scores))


def probed(encoder: Sparse, labelled: Mapping[str, Attribute]) -> dict[str, Any]:
    """Under `probes`, by attribute: accuracies of probes by how many latents they look at, and the latents that go best with
    it, with their selection scores. Nothing where there are no attributes."""
    found = {}
    for name, attribute in progress(list(labelled.items()), "probing latents"):
        probes = asdict(attribute.probes(encoder))
        by_size = {side: {str(k): a for k, a in value.items()} for side, value in probes.items() if side != "dense"}
        best = [[i, round(score, 4)] for i, score in zip(*map(Tensor.tolist, attribute.best(encoder, BEST)), strict=True)]
        found[name] = {**by_size, "dense": probes["dense"], "best": best}
    return {"probes": found} if found else {}


def apart(runs: Sequence[Sparse], x: Float[Tensor, "N D"]) -> dict[str, float]:
    """How much of the first encoder its twins from other seeds found, on average; nothing where it has no twins."""
    found = [stability(runs[0], twin, x) for twin in runs[1:]]
    if not found:
        return {}
    mcc, control = (sum(values) / len(found) for values in zip(*found, strict=True))
    return {"stability": mcc, "stability_control": control}


def used(z: Float[Tensor, "N n"]) -> float:
    """Share of the dictionary that is in use: the exponential of the entropy of how often latents fire, over their number."""
    share = (z > 0).double().sum(0)
    share = share / share.sum().clamp(min=1)
    return float(torch.exp(-(share * share.clamp(min=1e-12).log()).sum()) / len(share))
