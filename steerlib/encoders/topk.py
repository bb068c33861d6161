"""TopK: the k largest potentials of each token are kept (Gao et al. 2024, 2406.04093)."""

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..devices import placed
from ..errors import CorruptBank
from .base import Rows, fired, scale
from .objective import Objective
from .sparse import Sparse

CROWD = 32
"""As many times k latents are computed first: of nearly all tokens, k of these read more than a latent that does not fire."""
PARTS = 8
"""Sets of latents whose rows are kept for the next tokens."""
ROUGH = 2.0**-7
"""More than a product of bfloat16 is off, over the product of the lengths: two factors and the result are each rounded by 2^-9
of themselves at most."""


class TopK(Sparse):
    """`z = max(p, 0)` where p is among the token's k largest, else 0.

    Latents compete: what one reads depends on all. `calibrated` finds the threshold that keeps k on average, by which one can
    be read alone.

    Args: those of `Sparse`, and
        k: Latents that are kept of a token.
        threshold: The potential above which a latent is read to fire where it is read alone.
        disagreement: The share of firings, by either way of reading, that the other way does not have.
        rescaled: Whether latents compete, and count, by what they write: potentials are multiplied by the lengths of the
            decoder's rows, and what those write is divided by them.

    >>> eye = torch.eye(3)
    >>> TopK(encoder=eye, bias=torch.zeros(3), decoder=eye, k=1).encode(torch.tensor([1.0, 3.0, 2.0]))
    tensor([0., 3., 0.])
    """

    kind: ClassVar[str] = "topk"
    objective: ClassVar[Objective] = Objective(keeps="token", settings=("k",), transcodes=True)

    k: int
    threshold: float | None = None
    disagreement: float | None = None
    rescaled: bool = False
    _parts: dict[tuple[int, ...], "TopK"] = field(init=False, default_factory=dict)
    _halved: tuple[Tensor, Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.k) is not int or not 0 < self.k <= len(self.encoder):
            raise CorruptBank(f"expected 0 < k <= {len(self.encoder)} latents, got k={self.k!r}")

    @classmethod
    def competes(cls, settings: Mapping[str, Any]) -> bool:  # noqa: ARG003
        return True

    @classmethod
    def of_rows(cls, settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
        return {**settings, "k": min(settings.get("k", 1), rows)}

    def lengths(self, device: torch.device) -> Float[Tensor, " n"]:
        """Of the decoder's rows."""
        return placed(self.decoder, device).float().norm(dim=-1)

    def potential(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        p = super().potential(x)
        return p * self.lengths(p.device) if self.rescaled else p

    def decode(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D"]:
        return super().decode(z / self.lengths(z.device) if self.rescaled else z)

    def rows(self, indices: Sequence[int]) -> Rows:
        found = super().rows(indices)
        if not self.rescaled:
            return found
        by = found.write.norm(dim=-1)
        return found._replace(read=found.read * by[:, None], bias=found.bias * by, write=found.write / by[:, None])

    def readings(self, x: Float[Tensor, "*batch D"], indices: Sequence[int]) -> Float[Tensor, "*batch K"]:
        """Some latents of the code, exactly.

        On a CPU only the tokens that need it are encoded: where k of the first latents already read more, or a latent's own
        potential is not positive, its reading is 0 whatever the others are. Where the CPU multiplies bfloat16 in hardware, a
        rough product with all latents, over half the bytes, tells which few have to be read in full.
        """
        first = CROWD * self.k
        if self.learns or x.device.type != "cpu" or torch.compiler.is_compiling() or len(self.encoder) < 2 * first:
            return super().readings(x, indices)
        p = self._part((*range(first), *indices)).potential(x)
        others, own = p[..., :first], p[..., first:]
        out = torch.stack([(others > one[..., None]).sum(-1) >= self.k for one in own.unbind(-1)], -1) | (own <= 0)
        z, open_ = torch.zeros_like(own), ~out.all(-1)
        if open_.any():
            code = self._looked(x[open_], own[open_]) if _multiplies_halves() else self.encode(x[open_])
            z[open_] = code[:, list(indices)]
        return z

    def _looked(self, x: Float[Tensor, "tokens D"], own: Float[Tensor, "tokens K"]) -> Float[Tensor, "tokens n"]:
        """A code that is exact for latents of potential `own`. Every other potential is rough, unless it may be on either side
        of one of these: then it is computed in full."""
        if self._halved is None:
            every = self.rows(range(len(self.encoder)))
            self._halved = every.read.bfloat16(), every.bias, every.read.norm(dim=-1).max()
        read, bias, longest = self._halved
        token = x.float() / scale(x, self.norm) if self.norm else x.float()
        p = (token.bfloat16() @ read.T).float() + bias
        margin = ROUGH * longest * token.norm(dim=-1, keepdim=True)
        doubt = torch.stack([((p - one[:, None]).abs() <= margin).any(0) for one in own.unbind(-1)]).any(0)
        doubtful = doubt.nonzero()[:, 0]
        p[:, doubtful] = self.rows(doubtful.tolist()).potential(x)
        return self.select(p)

    def _part(self, chosen: tuple[int, ...]) -> "TopK":
        """Some latents as an encoder of their own, kept for the next tokens."""
        if chosen not in self._parts:
            if len(self._parts) == PARTS:
                self._parts.clear()
            rows = {name: getattr(self, name)[list(chosen)].float() for name in self.tensors}
            self._parts[chosen] = replace(self, **rows, statistics={})
        return self._parts[chosen]

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return top(p, self.k)

    def calibrated(self, x: Float[Tensor, "tokens D"]) -> "TopK":
        """The same with `threshold` and `disagreement` from reference activations."""
        p = self.potential(x)
        positive = p.clamp(min=0).flatten()
        kept = min(self.k * len(p), int((positive > 0).sum()))
        threshold = float(positive.topk(kept).values[-1]) if kept else 0.0
        ranked, alone = self.select(p) > 0, fired(p, torch.full_like(p[0], threshold)) > 0
        differ = (ranked ^ alone).sum() / (ranked | alone).sum().clamp(min=1)
        return replace(self, threshold=threshold, disagreement=round(float(differ), 6))


def _multiplies_halves() -> bool:
    """Whether this processor multiplies bfloat16 in hardware; where it does not, torch imitates it slowly."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def top(p: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch n"]:
    """The k largest of each row where they are positive, 0 elsewhere."""
    values, indices = p.topk(k)
    return torch.zeros_like(p).scatter(-1, indices, values.clamp(min=0))
