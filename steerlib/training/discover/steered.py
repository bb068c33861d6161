"""A language model as a system of latents: what its layers read, and how it goes on where latents were moved."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from ...bank.concept_bank import ConceptBank
from ...encoders import Sparse
from ...errors import BadRecipe, Unanswerable
from ...passes import StepState
from ...steering.recording import Replace, replacing
from ..record.activations import Enough
from .systems import Codes, Contexts, Do, Reading, System, csr, csr_matrix


class SteeredText(System):
    """Latents of a bank's layers, in order. A context is a piece of text, a unit one of its tokens but the first, on which
    attention rests whatever it is; another token is reached by attention, of which the token just before is told apart.

    Latents are moved as `sl.Set` and `sl.Ablate` move them, in the code: what an encoder does not explain stays.
    """

    batch = 64

    def __init__(
        self, model: Any, bank: ConceptBank, ids: Int[Tensor, "C N"], levels: Collection[str] | None = None, first: int = 1
    ):
        """`ids`: the tokens of all contexts, as many of each; `levels`: encoders to look at, if not all; `first`: position of
        the first token that is a unit, 0 for all. Raises `BadRecipe` for a bank without two layers of latents, or with latents
        that are read at another site than they write."""
        found = {name: bank.encoder(name) for name in bank.encoders if levels is None or name in levels}
        self._encoders = {name: encoder for name, encoder in found.items() if isinstance(encoder, Sparse)}
        if len(self._encoders) < 2 or ids.ndim != 2 or ids.shape[1] < 2:
            raise BadRecipe(f"expected latents of two layers or more and ids [C, N >= 2], got {[*found]}, {tuple(ids.shape)}")
        if apart := [name for name in self._encoders if bank.encoders[name].reads]:
            raise BadRecipe(f"expected latents that are read where they write, got the transcoders {', '.join(apart)}")
        depth = {name: int("".join(filter(str.isdigit, bank.encoders[name].site)) or -1) for name in self._encoders}
        self._encoders = {name: self._encoders[name] for name in sorted(depth, key=depth.__getitem__)}
        self._sites = {bank.encoders[name].site: name for name in self._encoders}
        self.model, self.bank, self.ids, self.first = model, bank, ids, first

    @property
    def levels(self) -> Mapping[str, int]:
        return {name: len(encoder.encoder) for name, encoder in self._encoders.items()}

    def __len__(self) -> int:
        return len(self.ids)

    def owners(self, contexts: Contexts) -> NDArray[Any]:
        return np.repeat(np.arange(len(contexts)), self._units)

    @property
    def _units(self) -> int:
        """Of a context."""
        return self.ids.shape[1] - self.first

    @property
    def routes(self) -> Sequence[str]:
        return "same", "before"

    def carried(self, route: str, z: Codes, contexts: Contexts) -> Codes:  # noqa: ARG002
        """`before`: of the token just before, in the same context."""
        if route == "same":
            return z
        units = np.arange(z.shape[0])
        later = units[units % self._units > 0]
        return csr(csr((np.ones(len(later), z.dtype), (later, later - 1)), shape=(len(units), len(units))) @ z)

    def weights(self, src: str, dst: str) -> tuple[Tensor, Tensor]:
        return self._encoders[src].decoder.cpu(), self._encoders[dst].encoder.cpu()

    def place(self, name: str) -> tuple[str, int, float]:
        """Of a concept of the bank, in its units."""
        concept = self.bank[name]
        if concept.encoder not in self._encoders or len(concept.places) > 1:
            raise Unanswerable(f"expected one latent of {', '.join(self._encoders)}, got {name!r}")
        return concept.encoder, concept.index, concept.unit

    def logits(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Float[Tensor, "C V"]:
        """What the model says next, while something is done at some layers: for outcomes (`systems.Outcomes`)."""
        return self._passed(contexts, do, None)[:, -1].float().cpu()

    def run(self, contexts: Contexts, do: Mapping[str, Do] | None = None) -> Mapping[str, Reading]:
        found: dict[str, Reading] = {}
        with suppress(Enough):
            self._passed(contexts, do, found)
        return {name: found[name] for name in self.levels}

    @torch.no_grad()
    def _passed(self, contexts: Contexts, do: Mapping[str, Do] | None, found: dict[str, Reading] | None) -> Tensor:
        """One pass; it ends where all layers were `found`, if that is asked."""

        def at(name: str) -> Replace:
            encoder, change = self._encoders[name], (do or {}).get(name)

            def replace(x: Tensor, state: StepState) -> Tensor:  # noqa: ARG001
                own = x[:, self.first :]
                if found is None and change is None:
                    return x
                natural = csr_matrix(encoder.encode(own).flatten(0, 1).cpu().numpy())
                flows = change(natural) if change else natural
                if found is not None:
                    found[name] = Reading(natural, flows)
                    if len(found) == len(self._encoders):
                        raise Enough
                if change is None:
                    return x
                moved = csr(flows - natural)
                some = np.unique(moved.indices)
                rows = encoder.rows(some.tolist())
                written = torch.from_numpy(moved[:, some] @ rows.write.cpu().numpy()).view(own.shape).to(x.device)
                return torch.cat([x[:, : self.first], own + (written * rows.lengths(own)).to(x.dtype)], 1)

            return replace

        with replacing(self.model, {site: at(name) for site, name in self._sites.items()}):
            return self.model(self.ids[contexts].to(self.model.device), use_cache=False).logits
