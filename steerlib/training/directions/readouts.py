"""Linear readings that tell tokens apart, and the metric of activations that they are made with."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SHRINKAGE = 0.1
"""Share of the mean variance put on the diagonal of a covariance: there are few tokens for so many coordinates."""


class Readout(NamedTuple):
    """A reading `x @ read + bias` of activations at a site."""

    site: str
    read: Float[Tensor, " D"]
    bias: Float[Tensor, ""]

    def __call__(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """The reading of each activation."""
        return x @ self.read + self.bias

    @property
    def row(self) -> Float[Tensor, " D"]:
        """The direction d of `encoders.Directions`, which reads `<x, d> / |d|^2 - mean`, that reads the same."""
        return self.read / self.read.square().sum()

    @property
    def mean(self) -> Float[Tensor, ""]:
        """The reference mean that belongs to `row`."""
        return -self.bias


def metric(x: Float[Tensor, "tokens D"]) -> Float[Tensor, "D D"]:
    """The inverse of the shrunk covariance of activations."""
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    mean = covariance.diagonal().mean()
    return torch.linalg.inv((1 - SHRINKAGE) * covariance + SHRINKAGE * mean * torch.eye(len(covariance)).to(x))


def discriminant(site: str, present: Float[Tensor, " D"], absent: Float[Tensor, " D"], x: Float[Tensor, "tokens D"]) -> Readout:
    """Fisher's discriminant: along `S^-1 (present - absent)`, S the covariance of x; reads 1 at one mean and 0 at the other."""
    read = metric(x) @ (present - absent)
    read = read / (read @ (present - absent))
    return Readout(site, read, -read @ absent)
