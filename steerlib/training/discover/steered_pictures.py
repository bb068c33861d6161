"""A pipeline as a system of latents: what its noise levels read, and how it goes on where latents were moved."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import vstack
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...encoders import Sparse
from ...errors import BadRecipe, SiteNotReached, Unanswerable
from ...passes import StepState
from ...steering.recording import Replace, conditional, replacing
from ..record.contrasts import apart
from ..record.noised import moment_of
from .systems import Around, Codes, Contexts, Do, Reading, System, csr, csr_matrix, entries


class SteeredPictures(System):
    """Latents of a bank's noise levels, the noisiest first. A context is a prompt with the seed of its noise, and its picture
    is the one unit: a latent reads what it reads at its tokens on average, in the pass that is nearest to its level.

    Latents are moved in the code, in every pass of their level's stretch of noise, on the half of guidance that reads the
    prompt: at all tokens where one fires, in proportion; where it fires nowhere, at the token that comes nearest to it.
    """

    batch = 64

    def __init__(
        self,
        pipe: Any,
        bank: ConceptBank,
        contexts: Sequence[tuple[str, int]],
        draw: Callable[[Sequence[str], Sequence[int]], Any],
        size: int = 8,
    ):
        """`draw` draws some prompts, each from the noise of its seed; `size`: pictures that are drawn together. Raises
        `BadRecipe` for a bank without latents of two levels or more, one encoder at each."""
        found = {name: bank.encoder(name) for name in bank.encoders}
        self._encoders = {name: encoder for name, encoder in found.items() if isinstance(encoder, Sparse)}
        level = {name: name.partition("@")[2].partition("#")[0] for name in self._encoders}
        if len(level) < 2 or {*level.values()} - {*bank.levels} or len({*level.values()}) < len(level):
            raise BadRecipe(f"expected latents of two noise levels or more, one encoder at each, got {[*self._encoders]}")
        self._encoders = {name: self._encoders[name] for name in sorted(level, key=lambda name: -int(level[name]))}
        self._moments = {name: moment_of(pipe, int(own)) for name, own in level.items()}
        self._spans = {name: bank.levels[own].numbers()[:2] for name, own in level.items()}
        self.pipe, self.bank, self.contexts, self.draw, self.size = pipe, bank, contexts, draw, size

    @property
    def levels(self) -> Mapping[str, int]:
        return {name: len(encoder.encoder) for name, encoder in self._encoders.items()}

    def __len__(self) -> int:
        return len(self.contexts)

    def place(self, name: str) -> tuple[str, int, float]:
        """Of a concept of the bank, in its units."""
        concept = self.bank[name]
        if concept.encoder not in self._encoders or len(concept.places) > 1:
            raise Unanswerable(f"expected one latent of {', '.join(self._encoders)}, got {name!r}")
        return concept.encoder, concept.index, concept.unit

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        total, parts = len(contexts), []
        for start in range(0, total, self.size):
            some = contexts[start : start + self.size]
            own = {name: _of_some(change, start, total) for name, change in (do or {}).items()}
            parts.append(self._drawn([self.contexts[k] for k in some], own))
        return {
            name: Reading(*(csr(vstack(pieces)) for pieces in zip(*(part[name] for part in parts), strict=True)))
            for name in self.levels
        }

    @torch.no_grad()
    def _drawn(self, contexts: Sequence[tuple[str, int]], do: Mapping[str, Do]) -> dict[str, Reading]:
        """What some pictures read, drawn together."""
        found: dict[str, Reading] = {}
        sites: dict[str, list[Replace]] = {}
        for name in self.levels:
            sites.setdefault(self.bank.encoders[name].site, []).append(self._at(name, do.get(name), found))
        with replacing(self.pipe, {site: _in_turn(own) for site, own in sites.items()}):
            self.draw(*zip(*contexts, strict=True))
        if missed := [name for name in self.levels if name not in found]:
            raise SiteNotReached(f"the pipeline ran and did not reach {', '.join(missed)}")
        return found

    def _at(self, name: str, change: Do | None, found: dict[str, Reading]) -> Replace:
        encoder, moment, (start, stop) = self._encoders[name], self._moments[name], self._spans[name]
        nearest = float("inf")

        def replace(x: Tensor, state: StepState) -> Tensor:
            nonlocal nearest
            if (own := conditional(x, state)) is None or state.progress is None:
                return x
            off, acts = abs(float(state.progress) - moment), change is not None and start <= float(state.progress) < stop
            if not acts and off >= nearest:
                return x
            z = encoder.encode(own)
            natural = csr_matrix(z.mean(1).cpu().numpy())
            flows = change(natural) if change is not None and acts else natural
            if off < nearest:
                nearest, found[name] = off, Reading(natural, flows)
            if not (moved := csr(flows - natural)).nnz:
                return x
            out = x.clone()
            half = conditional(out, state)
            assert half is not None
            half += _written(encoder, own, z, natural, flows, np.unique(moved.indices)).to(x.dtype)
            return out

        return replace


def _of_some(do: Do, start: int, total: int) -> Do:
    """The same for some of all units, those from `start` on."""

    def change(z: Codes) -> Codes:
        before, after = (csr((count, z.shape[1]), dtype=z.dtype) for count in (start, total - start - z.shape[0]))
        return do(csr(vstack([before, z, after])))[start : start + z.shape[0]]

    return change


def _in_turn(own: Sequence[Replace]) -> Replace:
    """One after the other: levels of one site."""

    def replace(x: Tensor, state: StepState) -> Tensor:
        for each in own:
            x = each(x, state)
        return x

    return replace


def _written(encoder: Sparse, x: Tensor, z: Tensor, natural: Codes, flows: Codes, latents: NDArray[Any]) -> Tensor:
    """What is added to tokens `x[B, N, D]` with codes `z`, so that some latents read `flows` in place of `natural`."""
    rows, own = encoder.rows(latents.tolist()).to(x.device), z[..., torch.from_numpy(latents).to(z.device)]
    before, after = (torch.from_numpy(read[:, latents].toarray()).to(own)[:, None] for read in (natural, flows))
    first = rows.potential(x).argmax(1, keepdim=True)
    alone = torch.zeros_like(own).scatter(1, first, after * own.shape[1])
    moved = torch.where(before > 0, own * (after / before.clamp(min=1e-12) - 1), alone)
    return moved @ rows.write * rows.lengths(x)


class Cleared(Around):
    """Pictures in which a latent that reads less than its threshold reads nothing: the mean of many tokens is hardly ever 0."""

    def __init__(self, inner: System, thresholds: Mapping[str, NDArray[Any]]):
        super().__init__(inner)
        self.rates, self.thresholds = (inner.rates[0], 0.5), thresholds

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        found = self.inner.run(contexts, do)
        return {name: Reading(*(self.cleared(name, z) for z in reading)) for name, reading in found.items()}

    def cleared(self, name: str, z: Codes) -> Codes:
        """Readings of a level without those below the threshold."""
        return entries(z, np.where(z.data >= self.thresholds[name][z.indices], z.data, 0))


def thresholds(z: Codes) -> NDArray[Any]:
    """For each latent the least reading of those that are high: readings parted in two classes (Otsu 1979)."""
    read = torch.from_numpy(z.toarray().T)
    return torch.where(apart(read), read, torch.inf).amin(1).numpy()
