"""Ways to run what generates, the same way every time: inputs to an outcome `[B, ...]`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bank.autoencoders import decoded, posterior
from .interventions import Run


def decoding(autoencoder: Any, decode: Callable[[Tensor], Tensor] | None = None) -> Run:
    """Latents to pictures: `autoencoder.decode(z)`, of which diffusers gives the `sample`, or a function of your own.

    >>> vae = torch.nn.Module()
    >>> vae.decode = torch.nn.Linear(2, 6)
    >>> decoding(vae)(torch.zeros(3, 2)).shape
    torch.Size([3, 6])
    """

    def run(z: Tensor) -> Tensor:
        return decoded((decode or autoencoder.decode)(z))

    return run


def reconstructing(autoencoder: Any) -> Run:
    """Pictures to what is decoded from the middle of what the encoder says of them.

    >>> vae = torch.nn.Module()
    >>> vae.encode, vae.decode = torch.nn.Linear(6, 2), torch.nn.Linear(2, 6)
    >>> reconstructing(vae)(torch.zeros(3, 6)).shape
    torch.Size([3, 6])
    """
    return lambda x: decoded(autoencoder.decode(posterior(autoencoder.encode(x)).mean))


def drawing(pipe: Any, *, seed: int = 0, **options: Any) -> Run:
    """Prompts to pictures `[B, 3, H, W]` between 0 and 1; picture k starts from a noise of its own, the same in every run.

    `options` are those of the pipeline's call, such as `num_inference_steps`.
    """

    def run(prompts: Sequence[str]) -> Tensor:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
        drawn = pipe(list(prompts), generator=generators, output_type="np", **options).images
        return torch.as_tensor(np.asarray(drawn)).permute(0, 3, 1, 2)

    return run


def predicting(model: Any) -> Run:
    """Token ids `[B, N]`, without pads, to the square roots of the next token's probabilities, `[B, vocabulary]`.

    The length of a change is then the root of 2 times the Hellinger distance of the two distributions, at most root of 2.

    >>> run = predicting(model)
    >>> float(run(torch.tensor([[1, 2, 3]])).square().sum().round(decimals=4))
    1.0
    """

    def run(ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits[:, -1].detach().float().softmax(-1).sqrt()

    return run
