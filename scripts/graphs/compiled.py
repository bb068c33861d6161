"""A tiny transformer whose weights were written down, so that every intermediate variable and every edge is known.

words      one-hot embedding of the token at this place
contexts   one head that attends to all places so far alike; what it writes stands for words that were read before
answers    one hidden layer: a word now and a context, `relu(word + context - 1)`
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, kron, tril
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from graphs.hierarchies import Truth
from steerlib.training.discover.systems import Codes, Contexts, Do, Reading, System, csr


class Compiled(nn.Module, System):
    """An attention layer and a feed-forward layer on a residual stream that has a coordinate for each variable.

    Each context stands for one word; each answer asks for a word where its context is. Most texts contain what some answer
    asks for.
    """

    def __init__(self, texts: int, *, words: int = 192, answers: int = 16, length: int = 12, seed: int = 0):
        super().__init__()
        random = np.random.default_rng(seed)
        self._sizes = {"words": words, "contexts": answers, "answers": answers}
        self.length, starts = length, np.cumsum([0, *self._sizes.values()])
        self._spans = {name: slice(a, b) for name, a, b in zip(self._sizes, starts[:-1], starts[1:], strict=True)}
        self.before = random.permutation(words)[:answers]
        self.now = random.permutation(words)[:answers]
        self.texts = torch.from_numpy(self._written(texts, random))
        width = int(starts[-1])
        self.embed = nn.Embedding.from_pretrained(torch.eye(words, width))
        self.value = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, answers), nn.Linear(answers, width, bias=False)
        self._compile(torch.arange(answers))

    def _written(self, texts: int, random: np.random.Generator) -> NDArray[Any]:
        """Words at random; in nine texts of ten, one of an answer's and later the other."""
        made = random.integers(self._sizes["words"], size=(texts, self.length))
        first = random.integers(self.length // 2, size=texts)
        later = random.integers(self.length // 2, self.length, size=texts)
        asked, planted = random.integers(len(self.now), size=texts), np.flatnonzero(random.random(texts) < 0.9)
        made[planted, first[planted]] = self.before[asked[planted]]
        made[planted, later[planted]] = self.now[asked[planted]]
        return made

    @torch.no_grad()
    def _compile(self, each: Tensor) -> None:
        """Write the weights."""
        for layer in (self.value, self.up, self.down):
            layer.weight.zero_()
        contexts, answers = self._spans["contexts"].start, self._spans["answers"].start
        self.value.weight[contexts + each, torch.from_numpy(self.before)] = 1
        self.up.weight[each, torch.from_numpy(self.now)] = 1
        self.up.weight[each, contexts + each] = 1
        self.up.bias.fill_(-1)
        self.down.weight[answers + each, each] = 1

    @property
    def levels(self) -> Mapping[str, int]:
        return self._sizes

    @property
    def routes(self) -> Sequence[str]:
        return "same", "before"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def truth(self) -> Truth:
        """Direct edges; that of a word to its context is exact by the route `before`."""
        answers, ones = np.arange(len(self.now)), np.ones(len(self.now), np.float32)
        words, contexts = self._sizes["words"], self._sizes["contexts"]
        return {
            ("words", "contexts"): coo_matrix((ones, (self.before, answers)), (words, contexts)).tocsr(),
            ("words", "answers"): coo_matrix((ones, (self.now, answers)), (words, contexts)).tocsr(),
            ("contexts", "answers"): coo_matrix((ones, (answers, answers)), (contexts, contexts)).tocsr(),
        }

    def owners(self, contexts: Contexts) -> NDArray[Any]:
        return np.repeat(np.arange(len(contexts)), self.length)

    def carried(self, route: str, z: Codes, contexts: Contexts) -> Codes:
        """By `before`, the mean of the places so far."""
        if route == "same":
            return z
        mean = tril(np.ones((self.length, self.length), np.float32)) / np.arange(1, self.length + 1)[:, None]
        return csr(csr(kron(np.eye(len(contexts), dtype=np.float32), csr(mean))) @ z)

    @torch.no_grad()
    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        seen: dict[str, Reading] = {}

        def read(name: str, h: Tensor) -> Tensor:
            """What a level reads in the stream, and the stream with what was done there."""
            part = h[..., self._spans[name]]
            natural = csr(part.flatten(0, 1).numpy())
            seen[name] = Reading(natural, do[name](natural) if do and name in do else natural)
            h = h.clone()
            h[..., self._spans[name]] = torch.from_numpy(seen[name].flows.toarray()).view_as(part)
            return h

        h = read("words", self.embed(self.texts[contexts]))
        alike = torch.zeros_like(h)
        h = read("contexts", h + scaled_dot_product_attention(alike, alike, self.value(h), is_causal=True))
        read("answers", h + self.down(self.up(h).relu()))
        return seen
