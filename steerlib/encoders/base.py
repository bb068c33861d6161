"""What an encoder is, and the table of its kinds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..devices import placed
from .objective import Objective

KINDS: dict[str, type["Encoder"]] = {}
"""Every kind of encoder by the name a bank stores."""

Norm = Literal["", "layer", "length"]
"""What each token is divided by before it is read: nothing; its standard deviation, after its mean was taken off (layer norm);
or its length over the root of its width."""


class Rows(NamedTuple):
    """What steering needs of `K` concepts: `p = x @ read.T + bias` reads `z = p` where `p > threshold`, else 0; `write` is what
    one raw unit of z adds to x."""

    read: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    write: Float[Tensor, "K D2"]
    threshold: Float[Tensor, " K"]
    """-inf for coordinates that read any value; 0 or more for latents, which never read below 0."""
    norm: Norm = ""

    @property
    def is_sparse(self) -> bool:
        """Whether these are latents of a sparse code."""
        return bool((self.threshold > -inf).all())

    def to(self, device: torch.device) -> "Rows":
        """The same elsewhere."""
        return Rows(*(tensor.to(device) for tensor in self[:4]), norm=self.norm)

    def detached(self) -> "Rows":
        """Their values now, on the CPU."""
        if not any(tensor.requires_grad for tensor in self[:4]):
            return self
        read, bias, write, threshold = (tensor.detach().cpu() for tensor in self[:4])
        return Rows(read, bias, write, threshold, self.norm)

    def reading(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch K"]:
        """z of activations, float32."""
        return fired(self.potential(x), placed(self.threshold, x.device))

    def lengths(self, x: Float[Tensor, "*batch D"]) -> "Tensor | float":
        """What tokens are divided by before they are read, and what is written to them is multiplied by."""
        return scale(x, self.norm) if self.norm else 1.0

    def potential(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch K"]:
        """p of activations, float32."""
        p = x.float() @ placed(self.read, x.device).T
        return (p / self.lengths(x) if self.norm else p) + placed(self.bias, x.device)


def fired(p: Float[Tensor, "*batch K"], threshold: Float[Tensor, "*#batch #K"]) -> Float[Tensor, "*batch K"]:
    """p where it is above its threshold, else 0."""
    return torch.where(p > threshold, p, 0)


EPSILON = 1e-5
"""Added to a token's standard deviation before it is divided by it, as SAELens does; it is not multiplied back."""


def scale(x: Float[Tensor, "*batch D"], norm: Norm) -> Float[Tensor, "*batch 1"]:
    """What tokens are divided by."""
    if norm == "layer":
        return x.float().std(dim=-1, keepdim=True) + EPSILON
    return x.float().norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5


class Encoder(ABC):
    """Activation `x[B, N, D]` <-> coordinates `z[B, N, n]`. A kind is one final subclass in a file of its own.

    >>> encoder = sl.Directions(torch.eye(4)[:2])  # the simplest kind: two directions of width 4
    >>> encoder.encode(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [1.0, 2.0]
    """

    kind: ClassVar[str]
    """The name a bank stores."""
    tensors: ClassVar[tuple[str, ...]]
    """Names of its tensors that have one row per concept."""
    shared: ClassVar[tuple[str, ...]] = ()
    """Names of those that belong to all of its concepts; all may be missing."""
    objective: ClassVar[Objective | None] = None
    """How it is trained; None: not by `fit`."""
    discrete: ClassVar[bool] = False
    """Whether a coordinate is there or not, so that it is swapped and never moved by an amount."""
    switched: ClassVar[bool] = False
    """Whether its concepts are switched by `Do`, all of a site together, and never moved by an amount."""

    def __init_subclass__(cls) -> None:
        if hasattr(cls, "kind") and KINDS.setdefault(cls.kind, cls) is not cls:
            raise TypeError(f"there is an encoder of kind {cls.kind!r} already")

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> "Encoder":
        """From what `to_tensors` and `settings` gave; of `tensors`, which have a row per concept, some rows are enough."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """All of its tensors by name."""

    @classmethod
    def competes(cls, settings: Mapping[str, Any]) -> bool:  # noqa: ARG003
        """Whether the reading of one latent depends on the others."""
        return False

    @classmethod
    def of_rows(cls, settings: Mapping[str, Any], rows: int) -> dict[str, Any]:  # noqa: ARG003
        """The settings of an encoder that is made of some rows only."""
        return dict(settings)

    @property
    def learns(self) -> bool:
        """Whether some of its tensors require gradients: then every pass uses their values at that time."""
        return any(tensor.requires_grad for tensor in self.to_tensors().values())

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that belong to it."""
        return {}

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        """Coordinates of activations, float32."""

    def readings(self, x: Float[Tensor, "*batch D"], indices: Sequence[int]) -> Float[Tensor, "*batch K"]:
        """Some of the coordinates."""
        z = self.encode(x)  # a list as an index would be copied to the device
        return torch.stack([z[..., index] for index in indices], dim=-1)

    @abstractmethod
    def decode(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D"]:
        """The part of an activation that the coordinates describe."""

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> Rows:
        """What steering needs of some concepts."""
