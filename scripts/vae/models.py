"""Autoencoders of pictures, small and alike (after Burgess et al. 2018): with a vector of latents, or with a map of codes.

`n` latents, `h` channels of the first layers
"""

import torch
from torch import Tensor, nn
from torch.distributions import Normal

CODES = 32
"""Entries of a code book."""


def down(channels: int, h: int) -> list[nn.Module]:
    """Pictures to maps of an eighth of their side."""
    return [
        *(nn.Conv2d(channels, h, 4, 2, 1), nn.ReLU(), nn.Conv2d(h, h, 4, 2, 1), nn.ReLU()),
        *(nn.Conv2d(h, 2 * h, 4, 2, 1), nn.ReLU()),
    ]


def up(channels: int, h: int) -> list[nn.Module]:
    """And back."""
    return [
        *(nn.ConvTranspose2d(2 * h, h, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(h, h, 4, 2, 1), nn.ReLU()),
        nn.ConvTranspose2d(h, channels, 4, 2, 1),
    ]


class Gaussian(nn.Module):
    """Pictures to normal distributions of `n` latents, and back."""

    def __init__(self, channels: int, side: int, latents: int, width: int):
        super().__init__()
        map_ = (2 * width, side // 8, side // 8)
        flat = map_[0] * map_[1] * map_[2]
        read = [nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, 2 * latents)]
        write = [nn.Linear(latents, 128), nn.ReLU(), nn.Linear(128, flat), nn.ReLU(), nn.Unflatten(1, map_)]
        self.encoder = nn.Sequential(*down(channels, width), *read)
        self.decoder = nn.Sequential(*write, *up(channels, width))

    def encode(self, x: Tensor) -> Normal:
        """`q(z | x)`, `[B, n]`."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return Normal(mean, (log_variance.clamp(-20, 10) / 2).exp())

    def decode(self, z: Tensor) -> Tensor:
        """Pictures, from 0 to 1."""
        return self.decoder(z).sigmoid()


class Quantised(nn.Module):
    """Pictures to maps of `n` channels, each place one of `CODES` vectors, and back. The quantiser is that of diffusers."""

    def __init__(self, channels: int, latents: int, width: int):
        super().__init__()
        from diffusers.models.autoencoders.vae import VectorQuantizer

        self.encoder = nn.Sequential(*down(channels, width), nn.Conv2d(2 * width, latents, 1))
        self.quantize = VectorQuantizer(CODES, latents, beta=0.25, legacy=False)  # legacy puts beta before the other term
        self.decoder = nn.Sequential(nn.Conv2d(latents, 2 * width, 1), nn.ReLU(), *up(channels, width))

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """Take the code book from what the untrained encoder gives, so that its entries are used."""
        found = self.encode(x).permute(0, 2, 3, 1).flatten(0, 2)
        self.quantize.embedding.weight.copy_(found[torch.randperm(len(found))[:CODES]])

    def encode(self, x: Tensor) -> Tensor:
        """Latents before they are quantised, `[B, n, side / 8, side / 8]`."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures, from 0 to 1; latents are quantised first."""
        return self.decoder(self.quantize(z)[0]).sigmoid()
