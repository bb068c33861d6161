"""What each kind of autoencoder is trained for, in nats a picture but for the quantiser.

    VAE         R + K                            K = KL(q(z|x) || p(z))                              Kingma & Welling 2014
    beta-VAE    R + beta K                                                                           Higgins et al. 2017
    FactorVAE   R + K + gamma TC                 TC by a discriminator of z and of z shuffled        Kim & Mnih 2018
    beta-TC-VAE R + K + (beta - 1) TC            TC by minibatch-weighted sampling                   Chen et al. 2018
    DIP-VAE-II  R + K + l1 sum_i (C_ii - 1)^2 + l2 sum_i!=j C_ij^2                                   Kumar et al. 2018
    VQ-VAE      R + |sg(z) - e|^2 + 0.25 |z - sg(e)|^2, each a mean over numbers                     van den Oord et al. 2017

R   -log p(x|z) of a picture whose pixels are Bernoulli, one draw of z ~ q(z|x)
TC  KL(q(z) || prod_i q(z_i)), the total correlation
C   covariance of z ~ q(z), over a batch       e   the nearest entry of the code book       sg   no gradient goes back

What stands beside R has a weight that grows from 0 to 1 (`run.WARM`), but for VQ-VAE.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from .models import Gaussian, Quantised

BETA, GAMMA, BETA_TC, DIAGONAL, OFF_DIAGONAL = 4.0, 10.0, 6.0, 10.0, 10.0
"""Weights within the ranges of the papers: beta, gamma, beta of beta-TC-VAE, l1 and l2."""

Loss = Callable[[Any, Tensor, float], Tensor]
"""Of a model, a batch, and the weight of what is asked of latents: all but R."""


class Draw(NamedTuple):
    """What a step is about: latents of a batch and where they came from."""

    z: Tensor
    q: Normal


def objective(kind: str, latents: int, pictures: int) -> Loss:
    """The loss of a kind; `pictures` is how many the data has."""
    if kind == "VQ-VAE":
        return lambda model, x, _: quantised(model, x)
    own: Callable[[Draw], Tensor | float] = {
        "VAE": lambda _: 0.0,
        "beta-VAE": lambda d: (BETA - 1) * divergence(d.q),
        "FactorVAE": Discriminator(latents),
        "beta-TC-VAE": lambda d: (BETA_TC - 1) * total_correlation(d, pictures),
        "DIP-VAE-II": lambda d: moments(d.q),
    }[kind]

    def loss(model: Gaussian, x: Tensor, asked: float) -> Tensor:
        q = model.encode(x)
        d = Draw(q.rsample(), q)
        return unlikely(model.decoder(d.z), x) + asked * (divergence(q) + own(d))

    return loss


def unlikely(logits: Tensor, x: Tensor) -> Tensor:
    """R."""
    return binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def divergence(q: Normal) -> Tensor:
    """K."""
    return kl_divergence(q, Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))).sum(-1).mean()


def total_correlation(d: Draw, pictures: int) -> Tensor:
    """TC from a batch of `M` of `N` pictures: `q(z) ~ sum_j q(z|x_j) / (N M)`."""
    each = Normal(d.q.mean[None], d.q.stddev[None]).log_prob(d.z[:, None])  # [M of z, M of x, n]
    norm = math.log(len(d.z) * pictures)
    together = each.sum(-1).logsumexp(1) - norm
    apart = (each.logsumexp(1) - norm).sum(-1)
    return (together - apart).mean()


def moments(q: Normal) -> Tensor:
    """The penalty of DIP-VAE-II: by the law of total variance, `C = Cov[mean] + E[variance]`."""
    covariance = torch.cov(q.mean.T, correction=0) + q.variance.mean(0).diag()
    diagonal = covariance.diagonal()
    return DIAGONAL * (diagonal - 1).square().sum() + OFF_DIAGONAL * (covariance - diagonal.diag()).square().sum()


class Discriminator(nn.Module):
    """Of FactorVAE, with its own optimiser: tells `z` from `z` whose numbers come from different pictures; its logits differ
    by `log q(z) - log prod_i q(z_i)` when it is right."""

    def __init__(self, latents: int, width: int = 128):
        super().__init__()
        parts = [nn.Linear(latents, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 2)]
        self.net = nn.Sequential(*parts)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=1e-4, betas=(0.5, 0.9))

    def forward(self, d: Draw) -> Tensor:
        self.learn(d.z.detach())
        told = self.net(d.z)
        return GAMMA * (told[:, 0] - told[:, 1]).mean()

    def learn(self, z: Tensor) -> None:
        """One step on half a batch beside the other half shuffled."""
        own, other = z.chunk(2)
        mixed = torch.stack([column[torch.randperm(len(other))] for column in other.T], -1)
        truth = torch.tensor([0] * len(own) + [1] * len(mixed))
        self.adam.zero_grad()
        cross_entropy(self.net(torch.cat([own, mixed])), truth).backward()
        self.adam.step()


def quantised(model: Quantised, x: Tensor) -> Tensor:
    """Of a quantiser."""
    e, commitment, _ = model.quantize(model.encode(x))
    return unlikely(model.decoder(e), x) * len(x) / x.numel() + commitment
