"""What latents are about: where they fire most, what they make the model say, how strongly they fire.

Everything is read in one pass over recorded activations; of each latent no more is kept than its highest activations and a
histogram.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...encoders import Sparse
from ...hosts import host_for
from ...text import progress
from ..record.shards import LABELS, Shards

CONTEXTS = 16
"""Highest activations that are kept of each latent."""
SHOWN, AMONG = 3, 10
"""How many of these are shown: the first different ones among the highest."""
BEFORE, AFTER = 12, 4
"""Tokens around the marked one."""
LOWEST, OCTAVES, FINENESS, KEPT = 2.0**-10, 24, 8, 1
"""The histogram: from which reading on, over how many doublings, in how many bins each, and in how many a bank keeps it.
Below and above, readings count in the first and last bin."""


@dataclass(frozen=True, eq=False)
class Sightings:
    """Of each of `n` latents, on `tokens` tokens: its highest activations, the rows of the recording where they are, and a
    histogram of its positive readings. Where `highest` is 0, fewer were seen."""

    tokens: int
    highest: Float[Tensor, "n contexts"]
    rows: Int[Tensor, "n contexts"]
    histogram: Int[Tensor, "n bins"]

    @property
    def frequency(self) -> Float[Tensor, " n"]:
        """Share of tokens that a latent fires on."""
        return self.histogram.sum(-1) / self.tokens

    @property
    def kept(self) -> Int[Tensor, "n bins2"]:
        """The histogram in the bins that a bank keeps."""
        return self.histogram.unflatten(-1, (-1, FINENESS // KEPT)).sum(-1)

    def quantile(self, share: float) -> Float[Tensor, " n"]:
        """The reading below which this share of a latent's firings lies, to a bin's width; 0 for one that never fired."""
        seen = self.histogram.sum(-1, keepdim=True)
        place = (self.histogram.cumsum(-1) < share * seen).sum(-1)
        found = LOWEST * 2 ** ((place + 0.5) / FINENESS)
        return torch.where(seen[:, 0] > 0, found, 0.0)


def bins(z: Float[Tensor, " m"]) -> Int[Tensor, " m"]:
    """The bin of each positive reading."""
    return ((z / LOWEST).log2() * FINENESS).floor().clamp(0, OCTAVES * FINENESS - 1).long()


@torch.no_grad()
def sightings(encoder: Sparse, shards: Shards, site: str, *, start: int = 0, stop: int | None = None) -> Sightings:
    """Read rows `start` to `stop` of a recording through an encoder."""
    n, width = len(encoder.encoder), OCTAVES * FINENESS
    highest, rows = torch.zeros(n, CONTEXTS), torch.zeros(n, CONTEXTS, dtype=torch.long)
    histogram, seen = torch.zeros(n * width, dtype=torch.long), 0
    each = max(64, (1 << 24) // n)
    for x in progress(list(shards.in_order(site, each, start, stop)), f"latents of {site}"):
        z = encoder.encode(x.float())
        token, latent = z.nonzero(as_tuple=True)
        histogram += torch.bincount(latent * width + bins(z[token, latent]), minlength=n * width)
        best = z.T.topk(min(CONTEXTS, len(z)))
        both = torch.cat((highest, best.values), 1).topk(CONTEXTS)
        rows = torch.cat((rows, best.indices + start + seen), 1).gather(1, both.indices)
        highest, seen = both.values, seen + len(x)
    return Sightings(seen, highest, rows, histogram.reshape(n, width))


class Texts:
    """The recorded tokens, to show where something was seen."""

    def __init__(self, tokenizer: Any, shards: Shards):
        self.tokenizer, found = tokenizer, list(shards.in_order(LABELS, 1 << 20))
        self.documents, self.positions, self.ids = (torch.cat([part[name] for part in found]) for name in LABELS)

    def token(self, row: int) -> str:
        """The token of a row."""
        return self.tokenizer.decode([int(self.ids[row])])

    def around(self, row: int) -> str:
        """The text around a row, its own token marked «so»."""
        first, last = row, row
        while first > max(0, row - BEFORE) and self._follows(first):
            first -= 1
        while last < min(len(self.ids) - 1, row + AFTER) and self._follows(last + 1):
            last += 1
        before, through, whole = (self.tokenizer.decode(self.ids[first:end].tolist()) for end in (row, row + 1, last + 1))
        marked = through[len(before) :]
        space = " " if marked[:1].isspace() else ""
        return " ".join(f"{before}{space}«{marked.strip()}»{whole[len(through) :]}".split())

    def _follows(self, row: int) -> bool:
        """Whether a row is the next token of the document after the row before it."""
        steps = self.positions[row] - self.positions[row - 1]
        return bool(self.documents[row] == self.documents[row - 1]) and int(steps) == 1


@torch.no_grad()
def promoted(model: Any, tokenizer: Any, decoder: Float[Tensor, "n D"], count: int = 4) -> list[list[str]]:
    """The tokens that each latent makes likelier most, by the model's own final norm and head (logit lens, nostalgebraist
    2020); none where the model has no head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return [[] for _ in decoder]
    host, weight = host_for(model), head.weight.float()
    norm = host.sites().get("norm")
    gain = getattr(model.get_submodule(norm.module), "weight", None) if norm is not None else None
    rows = decoder.float().to(weight.device) * (1.0 if gain is None else gain.float())
    found = torch.cat([(part @ weight.T).topk(count).indices.cpu() for part in rows.split(256)])
    return [[tokenizer.decode([int(token)]) for token in row] for row in found]


def label(tokens: Sequence[str], promotes: Sequence[str]) -> str:
    """A short description: the tokens it fires on most where few make up most of them, else what it makes the model say."""
    counts = Counter(token.strip().lower() or "␣" for token in tokens)
    common = [token for token, count in counts.most_common(3) if count > 1]
    if sum(counts[token] for token in common) * 2 >= len(tokens):
        return "on " + ", ".join(f"“{token}”" for token in common)
    said = list(dict.fromkeys(token.strip() for token in promotes if token.strip()))[:3]
    return "towards " + ", ".join(f"“{token}”" for token in said) if said else ""
