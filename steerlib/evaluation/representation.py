"""How good a dictionary is: what it keeps, how sparsely, and whether it found the truth where that is known.

x, x^  activations and their reconstruction [N, D]     z  code [N, n]     d  dictionary, one row a latent [n, D]
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ..encoders import Sparse, TopK
from ..errors import MissingExtra
from ..hooks.attach import LOCK, attachment
from ..hosts import host_for
from ..passes import StepState
from ..steering.recording import observing


def explained_variance(x: Float[Tensor, "N D"], kept: Float[Tensor, "N D"]) -> float:
    """`1 - sum |x - x^|^2 / sum |x - mean|^2` (1 - FVU; Gao et al. 2024, 2406.04093)."""
    x = x.double()
    return 1 - float((x - kept).square().sum() / (x - x.mean(0)).square().sum())


def l0(z: Float[Tensor, "N n"]) -> float:
    """Latents that fire on a token, on average."""
    return float((z != 0).sum(-1).double().mean())


def dead_share(z: Float[Tensor, "N n"]) -> float:
    """Share of latents that fire on no token."""
    return float((z == 0).all(0).double().mean())


def dense_share(z: Float[Tensor, "N n"], above: float = 0.1) -> float:
    """Share of latents that fire on more than a tenth of the tokens (SAEBench, 2503.09532)."""
    return float(((z != 0).double().mean(0) > above).double().mean())


class Match(NamedTuple):
    """Truths and learned latents, one to one, so that they are alike in sum as much as can be (Kuhn 1955)."""

    truths: Int[Tensor, " pairs"]
    latents: Int[Tensor, " pairs"]
    likeness: Float[Tensor, " pairs"]
    mcc: float
    """Mean likeness over all truths; those left over count 0."""


def matched(likeness: Float[Tensor, "truths latents"]) -> Match:
    """The best assignment under a table of likenesses."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("matching dictionaries needs scipy: pip install 'steerlib[eval]'") from None
    truths, latents = map(torch.as_tensor, linear_sum_assignment(likeness.numpy(), maximize=True))
    found = likeness[truths, latents]
    return Match(truths, latents, found, float(found.sum() / len(likeness)))


def dictionary_match(truth: Float[Tensor, "m D"], learned: Float[Tensor, "n D"]) -> Match:
    """By `|cos(d_i, d^_j)|`, as SAELens reports."""
    return matched((normalize(truth.double(), dim=-1) @ normalize(learned.double(), dim=-1).T).abs())


def code_match(truth: Float[Tensor, "N m"], learned: Float[Tensor, "N n"]) -> Match:
    """By the size of Pearson's correlation of readings (mean correlation coefficient, Hyvarinen & Morioka 2016)."""
    a, b = (normalize((z - z.mean(0)).double(), dim=0) for z in (truth, learned))
    return matched((a.T @ b).abs())


def uniqueness(truth: Float[Tensor, "m D"], learned: Float[Tensor, "n D"]) -> float:
    """Distinct truths among those that learned latents are most alike, over learned latents: 1 / copies where there are."""
    best = (normalize(learned.double(), dim=-1) @ normalize(truth.double(), dim=-1).T).abs().argmax(-1)
    return len(best.unique()) / len(learned)


def random_dictionary(n: int, width: int, seed: int = 0) -> Float[Tensor, "n D"]:
    """Directions that know nothing: the control for `dictionary_match`."""
    return normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed + 7_919)), dim=-1)


class Stability(NamedTuple):
    """How much of one encoder another found that was trained from another seed."""

    mcc: float
    control: float
    """The same for random directions, as many as the other has."""


def stability(first: Sparse, second: Sparse, x: Float[Tensor, "N D"], *, seed: int = 0) -> Stability:
    """`dictionary_match` of the decoder rows of latents that fire on x (Paulo & Belrose 2025, 2501.16615; Song et al. 2025,
    2505.20254); dead ones would count as what no seed finds."""
    own, other = (encoder.decoder[(encoder.encode(x) > 0).any(0)].float() for encoder in (first, second))
    control = random_dictionary(len(other), own.shape[1], seed)
    return Stability(dictionary_match(own, other).mcc, dictionary_match(own, control).mcc)


# -- quality of an encoder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """What an encoder keeps of activations it was not trained on, beside a random dictionary that keeps as many latents."""

    explained: float
    control: float
    l0: float
    dead: float
    dense: float
    recovered: float
    """`1 - (loss with x^ - loss) / (loss with the mean - loss)` (loss recovered, Bricken et al. 2023)."""
    control_recovered: float
    kl: float
    """KL(p || p with x^), nats per token."""


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
    seed: int = 0,
) -> Quality:
    """All figures of an encoder at a site, on its activations `x` and on texts. A transcoder reads `x` at another site,
    `reads`, and writes `y`; its control is a random dictionary that reads `y` itself."""
    z, y = encoder.encode(x), x if y is None else y
    control = random_encoder(encoder, y, max(1, round(l0(z))), seed=seed)
    middle = y.mean(0)
    plain = _next_tokens(model, tokenizer, texts)
    lost, kl = {}, 0.0
    for name, replace in {
        "mean": lambda a: middle.to(a.device).expand_as(a),
        "own": encoder.reconstruct,
        "control": control.reconstruct,
    }.items():
        with replaced(model, site, replace, reads=reads if name == "own" else ""):
            found = _next_tokens(model, tokenizer, texts)
        lost[name] = float(found.loss - plain.loss)
        if name == "own":
            kl = float((plain.scores.exp() * (plain.scores - found.scores)).sum(-1).mean())
    whole = lost["mean"] or 1e-9
    return Quality(
        explained=explained_variance(y, encoder.reconstruct(x)),
        control=explained_variance(y, control.reconstruct(y)),
        l0=l0(z),
        dead=dead_share(z),
        dense=dense_share(z),
        recovered=1 - lost["own"] / whole,
        control_recovered=1 - lost["control"] / whole,
        kl=kl,
    )


def random_encoder(encoder: Sparse, x: Float[Tensor, "N D"], k: int, *, seed: int = 0) -> Sparse:
    """As many random directions around the mean, the k largest of which are kept, on the scale that explains most of `x`."""
    directions = random_dictionary(len(encoder.encoder), x.shape[1], seed)
    middle = x.mean(0)
    made = TopK(
        encoder=directions,
        bias=torch.zeros(len(directions)),
        decoder=directions,
        decoder_bias=middle,
        centred=True,
        k=k,
    )
    rest, kept = x - middle, made.reconstruct(x) - middle
    by = float((rest * kept).sum() / kept.square().sum().clamp(min=1e-12))
    return TopK.from_tensors({**made.to_tensors(), "decoder": by * directions}, made.settings)


class NextTokens(NamedTuple):
    """What a model expects of texts."""

    loss: Float[Tensor, ""]
    """Mean cross-entropy, nats per token."""
    scores: Float[Tensor, "tokens vocab"]
    """Log-probabilities where there is a next token."""


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


@contextmanager
def replaced(model: Any, site: str, by: Callable[[Tensor], Tensor], *, reads: str = "") -> Iterator[None]:
    """Inside the block, activations at a site are what a function makes of them, or of those at an earlier site, `reads`."""
    host = host_for(model)
    place, at = attachment(host), host.site(site)
    with LOCK:
        place.require(host, [at])
    socket = place.sockets[at.name]
    before = socket.edit

    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, state: StepState) -> None:  # noqa: ARG001
        seen[reads] = x

    def edit(x: Tensor, state: StepState) -> Tensor:  # noqa: ARG001
        return by(seen.pop(reads) if reads else x).to(x.dtype)

    socket.edit = edit
    try:
        with observing(model, {reads: keep} if reads else {}):
            yield
    finally:
        socket.edit = before
        with LOCK:
            place.release(host, [at])
