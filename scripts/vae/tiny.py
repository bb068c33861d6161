"""An autoencoder that trains fast and is then an `AutoencoderTiny` of diffusers, so that whoever has diffusers can load it.

That class has residual blocks, `relu(x + f(x))`, and the same number of channels everywhere. Here `f` is a bias alone, and only
as many channels are in use as a map of that size needs; the weights of all others are 0. The outcome is the same, at a fraction
of the cost.

`n` latents
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

CHANNELS = (8, 16, 32, 48, 48, 48)
"""In use at 32 pixels, 16, 8, 4, 2 and 1."""


class Bounded(nn.Module):
    """What the decoder of the class does to latents first."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class Plain(nn.Module):
    """Pictures from 0 to 1 to normal distributions of `n` latents, and back."""

    def __init__(self, colours: int, latents: int, channels: tuple[int, ...] = CHANNELS):
        super().__init__()
        steps = list(zip(channels, channels[1:], strict=False))
        down = [layer for i, o in steps for layer in (nn.Conv2d(i, o, 3, 2, 1), nn.ReLU())]
        up = [layer for o, i in steps[::-1] for layer in (nn.Upsample(scale_factor=2), nn.Conv2d(i, o, 3, 1, 1), nn.ReLU())]
        first, last = nn.Conv2d(colours, channels[0], 3, 1, 1), nn.Conv2d(channels[-1], 2 * latents, 3, 1, 1)
        self.encoder = nn.Sequential(first, nn.ReLU(), *down, last, nn.Flatten())
        begin, end = nn.Conv2d(latents, channels[-1], 3, 1, 1), nn.Conv2d(channels[0], colours, 3, 1, 1)
        self.decoder = nn.Sequential(Bounded(), nn.Unflatten(1, (latents, 1, 1)), begin, nn.ReLU(), *up, end)
        for conv in convolutions(self):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> Normal:
        """`q(z | x)`, `[B, n]`."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        return Normal(mean, (log_variance.clamp(-20, 10) / 2).exp())

    def decode(self, z: Tensor) -> Tensor:
        """Pictures, from 0 to 1 if they are like those it was trained on."""
        return self.decoder(z)


def convolutions(part: nn.Module) -> list[nn.Conv2d]:
    """In their order."""
    return [module for module in part.modules() if isinstance(module, nn.Conv2d)]


def empty(colours: int, latents: int, channels: tuple[int, ...] = CHANNELS) -> Any:
    """An `AutoencoderTiny` with room for a `Plain` one: `[B, n, 1, 1]` latents, pictures from -1 to 1."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    stages, wide = len(channels), (max(channels),) * len(channels)
    return AutoencoderTiny(
        in_channels=colours, out_channels=colours, latent_channels=latents, encoder_block_out_channels=wide,
        decoder_block_out_channels=wide, num_encoder_blocks=(1,) * stages, num_decoder_blocks=(0, *(1,) * (stages - 1)),
    ).eval()  # fmt: skip


@torch.no_grad()
def exported(plain: Plain, vae: Any) -> Any:
    """An empty autoencoder with the layers of a plain one, and of its distributions the means."""
    for parameter in vae.parameters():
        parameter.zero_()
    for own, part in ((plain.encoder, vae.encoder.layers), (plain.decoder, vae.decoder.layers)):
        layers = list(part)
        places = [k for k, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        for conv, k in zip(convolutions(own), places, strict=True):
            into, count = layers[k], min(conv.out_channels, layers[k].out_channels)  # without rows of variances
            into.weight[:count, : conv.in_channels] = conv.weight[:count]
            biased = into if into.bias is not None else layers[k + 1].conv[-1]  # the block after it adds the bias
            biased.bias[:count] = conv.bias[:count]  # type: ignore[index]
    return vae
