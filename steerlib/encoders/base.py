"""What an encoder is, and the table of its kinds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor

KINDS: dict[str, type["Encoder"]] = {}
"""Every kind of encoder by the name a bank stores."""


class Rows(NamedTuple):
    """What steering needs of `K` concepts: `z = x @ read.T + bias`, and `write` is what one raw unit of z adds to x."""

    read: Float[Tensor, "K D"]
    bias: Float[Tensor, " K"]
    write: Float[Tensor, "K D"]


class Encoder(ABC):
    """Activation `x[B, N, D]` <-> coordinates `z[B, N, n]`. A kind is one final subclass in a file of its own."""

    kind: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]
    """Names of the tensors it is made of; each has one row per concept."""

    def __init_subclass__(cls) -> None:
        if KINDS.setdefault(cls.kind, cls) is not cls:
            raise TypeError(f"there is an encoder of kind {cls.kind!r} already")

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "Encoder":
        """From `tensors`, all of whose rows may be a part of the concepts."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` takes."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        """Coordinates of activations, float32."""

    @abstractmethod
    def decode(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D"]:
        """The part of an activation that the coordinates describe."""

    @abstractmethod
    def rows(self, indices: Sequence[int]) -> Rows:
        """What steering needs of some concepts."""
