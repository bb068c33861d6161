"""Context modules: concepts that are switched, as an intervention would (Markham et al. 2025, 2507.04754).

D width   K concepts   I, O widths of a concept's block   P positions that are read together (1: each alone)
a_k      how far concept k is intervened on: 0 observed, 1 intervened, between them both sets of weights are mixed (ours)

    z_k = pool_k x                                                       [I]  of each concept its own noise
    h_k = gelu((1 - a_k) V_k z_k + a_k V'_k z_k)                         [I]  the intervenable noise layer
    e_k = F_k,L ... gelu(F_k,1 h_k)                                      [O]  L expressive layers, the last one linear
    c_i = e_i + (1 - a_i) sum_j ((1 - a_j) A_ij + a_j A'_ij) e_j + b_i   [O]  reduced-form causal layer, over j other than i
    m(x; a) = sum_k c_k unpool_k                                         [P D]

Linear maps have biases. With L = 0 all is linear: e_k is h_k without its gelu, and I is O. Blocks are stored one a concept, so
that neither set of weights can leave its diagonal. A_ii and A'_ii are the identity, all other entries are from 0 to 1. An
intervened concept receives nothing (its row is cut) and sends what its second set of weights says (its column is switched). The
paper normalises batches between layers; here nothing does, because a batch comes from one context, and what it has in common is
what the module has to learn.
"""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import gelu

from ..devices import placed
from ..errors import CorruptBank, WrongWidth
from .base import Encoder, Rows

LAYERS = tuple(f"expressive.{layer}" for layer in range(8))
"""Names of expressive layers, as many as a module can have."""


class Context(Encoder):
    """Concepts that `sl.Do` switches from what was observed to what an intervention makes of them.

    A concept reads `<c_k, axis_k> - mean_k`, with no concept intervened on.

    Args:
        tensors: of K concepts each: `pool` `[K, I, P D]`, `pool.bias` `[K, I]`; V and V', `noise` `[K, 2, I, I]` and
            `noise.bias` `[K, 2, I]`; `expressive.0` `[K, W, I]`, … `[K, O, W]`, each with a `.bias`; A and A' by cause and then
            by effect, `effects` `[K, 2, K, O, O]`; `bias` `[K, O]`; `unpool` `[K, O, P D]`; `axis` `[K, O]`, and of its
            readings on reference data the `mean` `[K]`.
        positions: P.

    Raises `CorruptBank` for tensors that do not fit each other, and for effects that are none.
    """

    kind: ClassVar[str] = "context"
    layers: ClassVar[tuple[str, ...]] = ("pool", "noise", *LAYERS)
    """Those with a bias."""
    tensors: ClassVar[tuple[str, ...]] = (
        *("unpool", "effects", "bias", "axis", "mean"),
        *(name + end for name in ("pool", "noise", *LAYERS) for end in ("", ".bias")),
    )
    switched: ClassVar[bool] = True

    def __init__(self, tensors: Mapping[str, Tensor], positions: int = 1):
        self._tensors, self.positions = {name: tensor.float() for name, tensor in tensors.items()}, positions
        self.depth = sum(name in tensors for name in LAYERS)
        if not self._fits():
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            raise CorruptBank(f"expected the tensors of a context module over {positions!r} positions, got {shapes}")
        own, off = self._diagonal()
        if not (own == torch.eye(own.shape[-1])).all() or not ((off >= 0) & (off <= 1)).all():
            raise CorruptBank("expected effects of a context module from 0 to 1, and the identity of each concept on itself")

    def _fits(self) -> bool:
        """Whether the tensors have the shapes that the class says, of all concepts or of some."""
        found = self._tensors
        if type(self.positions) is not int or self.positions < 1 or not {"pool", "noise", "unpool", "effects"} <= found.keys():
            return False
        if [found[name].ndim for name in ("pool", "unpool", "effects")] != [3, 3, 5]:
            return False
        (n, i, width), (o, every) = found["pool"].shape, (found["unpool"].shape[1], found["effects"].shape[2])
        wide = [i, *(found[name].shape[1] for name in LAYERS[: self.depth])]
        shapes: dict[str, tuple[int, ...]] = {"pool": (n, i, width), "noise": (n, 2, i, i), "effects": (n, 2, every, o, o)}
        shapes |= {name: (n, *pair[::-1]) for name, pair in zip(LAYERS, zip(wide, wide[1:], strict=False), strict=False)}
        shapes |= {f"{name}.bias": shape[:-1] for name, shape in shapes.items() if name in self.layers}
        shapes |= {"bias": (n, o), "unpool": (n, o, width), "axis": (n, o), "mean": (n,)}
        return width % self.positions == 0 and wide[-1] == o and {k: tuple(t.shape) for k, t in found.items()} == shapes

    def _diagonal(self) -> tuple[Tensor, Tensor]:
        """Effects of concepts on themselves, and all others; of some concepts alone their own are not known."""
        effects = self._tensors["effects"].detach().cpu()
        if len(effects) != effects.shape[2]:
            return torch.eye(effects.shape[-1]), effects
        own = effects.diagonal(dim1=0, dim2=2).permute(3, 0, 1, 2)
        return own, effects * (1 - torch.eye(len(effects)))[:, None, :, None, None]

    @classmethod
    def competes(cls, settings: Mapping[str, Any]) -> bool:  # noqa: ARG003
        return True

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Context":
        return cls(tensors, **settings)

    def to_tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.positions == 1 else {"positions": self.positions}

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        z = self.pooled(x)
        c = self.concepts(z, z.new_zeros(self.count))
        return ((c * self._at("axis", x)).sum(-1) - self._at("mean", x)).expand(*x.shape[:-1], -1)

    def decode(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D"]:
        """What readings write, each along its axis."""
        axis = self._at("axis", z)
        return self.unpooled((z + self._at("mean", z))[..., None] * axis / axis.square().sum(-1, keepdim=True).clamp(min=1e-30))

    def rows(self, indices: Sequence[int]) -> Rows:
        """Of each concept alone nothing can be told: its rows are zeros."""
        none = torch.zeros(len(indices), self._tensors["unpool"].shape[-1] // self.positions)
        return Rows(none, none[:, 0], none, torch.full((len(indices),), -inf))

    @property
    def count(self) -> int:
        """K."""
        return len(self._tensors["mean"])

    # -- the module --------------------------------------------------------------------------------------------

    def change(self, x: Float[Tensor, "*batch D"], a: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch D"]:
        """`m(x; a) - m(x; 0)`, float32; exactly 0 where a is."""
        z = self.pooled(x)
        moved = self.concepts(z, a) - self.concepts(z, torch.zeros_like(a))
        return torch.where((a != 0).any(-1, keepdim=True), self.unpooled(moved), 0.0)

    def pooled(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*places K I"]:
        """z of activations; of positions that are read together there is one."""
        return read(x, self._at("pool", x), self._at("pool.bias", x), self.positions)

    def concepts(self, z: Float[Tensor, "*#places K I"], a: Float[Tensor, "*#places K"]) -> Float[Tensor, "*places K O"]:
        """c of noise, with concepts intervened on as far as a says."""
        a, noise, bias = a[..., None], self._at("noise", z), self._at("noise.bias", z)
        observed, intervened = (torch.einsum("...ki,kji->...kj", z, noise[:, s]) + bias[:, s] for s in (0, 1))
        e = (1 - a) * observed + a * intervened
        e = gelu(e) if self.depth else e
        for layer, name in enumerate(LAYERS[: self.depth], 1):
            e = torch.einsum("...ki,kji->...kj", e, self._at(name, z)) + self._at(f"{name}.bias", z)
            e = gelu(e) if layer < self.depth else e
        effects = (
            self._at("effects", z) * (1 - torch.eye(len(self._tensors["effects"]), device=z.device))[:, None, :, None, None]
        )
        sent = torch.einsum("...jp,jiop->...io", (1 - a) * e, effects[:, 0])
        sent = sent + torch.einsum("...jp,jiop->...io", a * e, effects[:, 1])
        return e + (1 - a) * sent + self._at("bias", z)

    def unpooled(self, c: Float[Tensor, "*places K O"]) -> Float[Tensor, "*batch D"]:
        """What concepts write at each place; one that stands for several positions at all of them."""
        write = self._at("unpool", c)
        if self.positions == 1:
            return torch.einsum("...ko,kod->...d", c, write)
        return torch.einsum("...nko,kond->...nd", c, write.unflatten(-1, (self.positions, -1)))

    def _at(self, name: str, x: Tensor) -> Tensor:
        return placed(self._tensors[name], x.device)


def read(
    x: Float[Tensor, "*batch D"], pool: Float[Tensor, "K I PD"], bias: Float[Tensor, "K I"], positions: int
) -> Float[Tensor, "*places K I"]:
    """z of activations by rows of pool. Raises `WrongWidth` where there are not as many positions as they read together."""
    together = x.float()
    if positions > 1:
        if x.ndim < 2 or x.shape[-2] != positions:
            raise WrongWidth(
                f"expected {positions} positions, which a context module reads together, got activations {tuple(x.shape)}; use "
                "pictures of the size that it was trained on"
            )
        together = together.flatten(-2)[..., None, :]
    return torch.einsum("...d,kid->...ki", together, pool) + bias
