"""What all sparse encoders share: an overcomplete code whose latents are mostly 0 and never negative.

p = n(x - [b_d]) E^T + b        potentials; n normalises each token, b_d is taken off where the encoder is centred
z = select(p)                   what a kind keeps of them
x^ = n^-1(z D + b_d)            reconstruction
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, dataclass_transform, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..devices import placed
from ..errors import CorruptBank
from .base import EPSILON, Encoder, Norm, Rows, fired, scale

STATISTICS = ("unit", "frequency", "high")
"""Of each latent, on reference data: the median of its positive readings, the share of tokens it fires on, and the value above
which 0.5 % of its positive readings lie."""


@dataclass_transform(kw_only_default=True, eq_default=False)
@dataclass(kw_only=True, eq=False, repr=False)
class Sparse(Encoder):
    """Every row of `encoder` and `decoder` is a latent. Tensors are kept in their precision; all is computed in float32.

    A subclass declares further fields as a dataclass does, and becomes one.

    Args:
        encoder: `[n, D]`, E.
        bias: `[n]`, b.
        decoder: `[n, D2]`, what one unit of each latent writes; D2 is D but for a transcoder.
        decoder_bias: `[D2]`, b_d.
        centred: Whether `decoder_bias` is taken off before encoding.
        norm: What each token is divided by before it is read, and multiplied by after: see `Norm`.
        statistics: Some of `STATISTICS`, `[n]` each.

    Raises `CorruptBank` for tensors that do not fit each other.
    """

    tensors: ClassVar[tuple[str, ...]] = ("encoder", "bias", "decoder")
    shared: ClassVar[tuple[str, ...]] = ("decoder_bias",)

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor | None = None
    centred: bool = False
    norm: Norm = ""
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(cls, kw_only=True, eq=False, repr=False)

    def __post_init__(self) -> None:
        encoder, decoder, decoder_bias, norm = self.encoder, self.decoder, self.decoder_bias, self.norm
        n, shapes = len(encoder), {name: tuple(tensor.shape) for name, tensor in self.to_tensors().items()}
        rows = all(shapes[name][0] == n for name in (*self.tensors, *self.statistics))
        fits = decoder_bias is None or decoder_bias.shape == decoder.shape[1:]
        if encoder.ndim != 2 or decoder.ndim != 2 or not (rows and fits):
            raise CorruptBank(f"expected tensors of {n} latents that fit each other, got {shapes}")
        if norm not in get_args(Norm) or (self.centred and (decoder_bias is None or encoder.shape[1:] != decoder_bias.shape)):
            raise CorruptBank(f"expected norm '', 'layer' or 'length', and a decoder bias to centre by, got {norm!r}, {shapes}")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Any:
        statistics = {name: tensors[name] for name in STATISTICS if name in tensors}
        others = {name: tensor for name, tensor in tensors.items() if name not in statistics}
        try:
            return cls(**others, **settings, statistics=statistics)
        except TypeError as error:
            raise CorruptBank(f"an encoder of kind {cls.kind!r} is not made of this: {error}") from None

    def to_tensors(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in (*self.tensors, *self.shared)}
        return {**{name: tensor for name, tensor in found.items() if tensor is not None}, **self.statistics}

    @property
    def settings(self) -> dict[str, Any]:
        """Fields that are no tensors, without those that have their default value."""
        plain = [f for f in fields(self) if f.init and f.name not in (*self.tensors, *self.shared, "statistics")]
        return {f.name: value for f in plain if (value := getattr(self, f.name)) != f.default}

    def select(self, p: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        """The code that a kind makes of potentials: as a rule, those above a threshold of 0 or more."""
        return fired(p, self.thresholds().to(p).clamp(min=0))

    def thresholds(self) -> Float[Tensor, " n"]:
        """The potential above which each latent fires, taken alone: the field `threshold` of kinds that have one, else 0."""
        given = getattr(self, "threshold", None)
        return given if isinstance(given, Tensor) else torch.full((len(self.encoder),), given or 0.0)

    def projected(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        """p without its bias, float32."""
        x = x.float()
        if self.norm:
            x = (x - (x.mean(dim=-1, keepdim=True) if self.norm == "layer" else 0.0)) / scale(x, self.norm)
        if self.centred and self.decoder_bias is not None:
            x = x - placed(self.decoder_bias, x.device).to(x)
        return x @ placed(self.encoder, x.device).T.to(x)

    def potential(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        """p of activations, float32."""
        p = self.projected(x)
        return p + placed(self.bias, p.device).to(p)

    def encode(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch n"]:
        return self.select(self.potential(x))

    def decode(self, z: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch D2"]:
        y = z @ placed(self.decoder, z.device).to(z)
        return y if self.decoder_bias is None else y + placed(self.decoder_bias, z.device).to(z)

    def reconstruct(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D2"]:
        """What the code keeps of activations."""
        y = self.decode(self.encode(x))
        if self.norm == "layer":
            return y * (scale(x, "layer") - EPSILON) + x.float().mean(dim=-1, keepdim=True)
        return y * scale(x, self.norm) if self.norm else y

    def rows(self, indices: Sequence[int]) -> Rows:
        chosen = list(indices)
        read, bias = self.encoder[chosen].float(), self.bias[chosen].float()
        if self.centred and self.decoder_bias is not None:
            bias = bias - read @ self.decoder_bias.float()
        if self.norm == "layer":
            read = read - read.mean(dim=-1, keepdim=True)
        return Rows(read, bias, self.decoder[chosen].float(), self.thresholds()[chosen].float().clamp(min=0), self.norm)

    def calibrated(self, x: Float[Tensor, "tokens D"]) -> "Sparse":  # noqa: ARG002
        """The same encoder with what its kind measures on reference activations, if anything."""
        return self
