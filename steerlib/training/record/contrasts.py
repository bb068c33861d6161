"""How activations of a denoiser differ between prompts that show a concept and prompts that do not: sums, while both are drawn.

Both arms of a pair start from the same noise and are drawn in one batch, so that at every step their activations can be
compared token by token; only sums over tokens, steps and pairs are kept. `b` pairs, `N` tokens of a site, `D` its width.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...errors import SiteNotReached, UnsupportedTarget
from ...hosts import Host
from ...passes import StepState
from ...schedules import Window
from ...steering.recording import conditional, observing
from ...text import progress
from ..picture_recipe import PromptPair
from .noised import spans

WIDE = 512
"""Width of a site above which only the diagonal of its products is kept, so that memory grows with the width alone."""
Sums = dict[str, Tensor]
"""By `site@level|what`, in float32. *What* is one of `count` (tokens), `difference` (of positive less negative), `mean` (of
negative), `length` (of differences), `weighed` (differences times their length), `zero` (negative times that length). Of what
the site is given, at places where both arms differ, `inside`, and elsewhere, `outside`: `count`, `sum` and `square`, the sum of
outer products. Of a text encoder by `site|what`, the first four, where prompts count and not tokens."""


def places(host: Host) -> list[str]:
    """Sites of a pipeline at which a concept is looked for: what cross-attention to the prompt adds to the image; where there
    is none, what blocks add to the image's stream.

    Raises:
        UnsupportedTarget: Nothing of either kind has a name.
    """
    found = [
        name for name, site in host.sites().items() if not site.reads_text and site.module.partition(".")[0] in host.passes()
    ]
    crossing = [name for name in found if name.endswith(".attn2") and _crosses(host, name)]
    adding = [name for name in found if name.endswith(".update") and ":text" not in name and ".resnets." not in name]
    if not (crossing or adding):
        raise UnsupportedTarget("found no cross-attention and no blocks in this pipeline's denoiser; name sites in the recipe")
    return sorted(crossing or adding, key=lambda name: host.order(host.site(name)))


def _crosses(host: Host, name: str) -> bool:
    module: Any = host.module(host.site(name).module)
    return bool(getattr(module, "is_cross_attention", False))


READS = re.compile(r"(?P<encoder>text_encoder\w*)\.(encoder\.)?layers\.(?P<block>\d+)")


def texts(host: Host) -> list[str]:
    """What each text encoder has made of the prompt before its last block: what its output and that of its last block but one,
    which pipelines use, depend on."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in host.sites():
        if match := READS.fullmatch(name):
            found.setdefault(match["encoder"], []).append((int(match["block"]), name))
    return [sorted(blocks)[-2:][0][1] for blocks in found.values()]


def given_to(site: str) -> str:
    """The site of what a module is given that adds at a site."""
    return f"{site.removesuffix('.update')}.in"


@torch.no_grad()
def contrasts(
    pipe: Any,
    pairs: Sequence[PromptPair],
    draw: Callable[[Sequence[str], Sequence[int]], Any],
    *,
    sites: Sequence[str],
    levels: Sequence[int],
    batch: int,
    texts: Sequence[str] = (),
) -> Sums:
    """Sums over pairs of prompts.

    Args:
        draw: draws some prompts, each from the noise of its seed.
        levels: timesteps; what passes belongs to the nearest one.
        texts: sites of text encoders.
        batch: pictures that are drawn together, two of each pair.
    """
    windows, found = spans(pipe, levels), _Found()
    for start in progress(range(0, len(pairs), batch // 2), "drawing pairs"):
        some = pairs[start : start + batch // 2]
        seen = [observer for site in sites for observer in _observers(site, windows, found)]
        seen += [(site, _reader(site, len(some), found)) for site in texts]
        with observing(pipe, dict(seen)):
            prompts = [pair.positive for pair in some] + [pair.negative for pair in some]
            draw(prompts, [pair.seed for pair in some] * 2)
    if missed := [site for site in sites if not any(key.startswith(f"{site}@") for key in found)]:
        raise SiteNotReached(f"the pipeline ran and did not reach {', '.join(missed)}; name sites of its denoiser")
    return {key: value.cpu() for key, value in sorted(found.items())}


class _Found(defaultdict[str, Any]):
    """Sums by key; what is missing is 0."""

    def __init__(self) -> None:
        super().__init__(lambda: 0)

    def add(self, key: str, values: Mapping[str, Tensor]) -> None:
        for what, value in values.items():
            self[f"{key}|{what}"] = self[f"{key}|{what}"] + value.float()


def _observers(
    site: str, windows: Mapping[str, Window], found: _Found
) -> list[tuple[str, Callable[[Tensor, StepState], None]]]:
    """What keeps the input of a site until its output comes, and then adds both to the sums."""
    held: list[Tensor] = []

    def enter(x: Tensor, state: StepState) -> None:
        held[:] = [x] if (own := conditional(x, state)) is None else [own]

    def leave(x: Tensor, state: StepState) -> None:
        if (own := conditional(x, state)) is not None and state.progress is not None:
            moment = float(state.progress)
            for level, window in windows.items():
                if window.start <= moment < window.stop or (window.stop == 1 and moment >= 1):
                    found.add(f"{site}@{level}", summed(own.float(), held[0].float()))

    return [(given_to(site), enter), (site, leave)]


def _reader(site: str, pairs: int, found: _Found) -> Callable[[Tensor, StepState], None]:
    """What adds to the sums what a text encoder makes of prompts, where it reads all of a batch in one pass."""

    def read(x: Tensor, state: StepState) -> None:
        own = None if state.branches is None else conditional(x, state)
        if own is not None and len(own) == 2 * pairs:
            real = torch.ones(own.shape[:2]) if state.real is None else state.real.float()
            shares = (real / real.sum(1, keepdim=True)).to(own.device)
            positive, negative = (shares[..., None] * own.float()).sum(1).chunk(2)
            difference = positive - negative
            own = {"difference": difference.sum(0), "mean": negative.sum(0), "length": difference.norm(dim=-1).sum()}
            found.add(site, {**own, "count": torch.tensor(float(pairs))})

    return read


def summed(x: Float[Tensor, "B N D"], given: Float[Tensor, "B N E"]) -> dict[str, Tensor]:
    """The sums of one pass: of positive rows, then of negative ones, at a site and of what it is given."""
    positive, negative = x.chunk(2)
    difference = positive - negative
    length = difference.norm(dim=-1)
    inside = apart(length)
    found = {
        "count": torch.tensor(float(length.numel())),
        "difference": difference.sum((0, 1)),
        "length": length.sum(),
        "weighed": (length[..., None] * difference).sum((0, 1)),
        "zero": (length[..., None] * negative).sum((0, 1)),
        "mean": negative.sum((0, 1)),
    }
    for name, where in (("inside", inside), ("outside", ~inside)):
        chosen = given[torch.cat((where, where))]
        found |= {f"{name} count": torch.tensor(float(len(chosen))), f"{name} sum": chosen.sum(0)}
        found |= {f"{name} square": chosen.T @ chosen if chosen.shape[1] <= WIDE else chosen.square().sum(0)}
    return found


def numbers_at(width: int, given: int) -> int:
    """How many numbers `summed` gives of a site of this width that is given another."""
    return sum(value.numel() for value in summed(torch.zeros(2, 2, width), torch.zeros(2, 2, given)).values())


def apart(length: Float[Tensor, "b N"]) -> Bool[Tensor, "b N"]:
    """Where values are high: each row parted in two classes of the largest variance between them (Otsu 1979)."""
    ordered = length.sort(-1, descending=True).values
    n = length.shape[-1]
    k = torch.arange(1, n, device=length.device)
    top = ordered.cumsum(-1)[:, :-1]
    between = k * (n - k) * (top / k - (ordered.sum(-1, keepdim=True) - top) / (n - k)) ** 2
    last = between.argmax(-1, keepdim=True)
    return length >= ordered.gather(-1, last)
