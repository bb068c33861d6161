"""What differs between families of pipelines: one entry in `DENOISERS` for a denoiser, one in `GUIDANCE` for a pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from steerlib.passes import Branch


@dataclass(frozen=True, kw_only=True)
class Denoiser:
    """What a denoiser's class does not show by itself. The defaults are what diffusers does nearly everywhere.

    Args:
        lists: names of the lists of its blocks, in the order of a pass.
        noise: the noise level, 1 for pure noise and 0 for none, of a time as the denoiser is given it; the second argument
            is the scheduler's `num_train_timesteps`.
        video: axes of frames, height and width, where it is given a video.
        text_first: whether blocks that join image and text in one tensor put the text first; nothing is laid over others.
        drops_pads: whether it puts each prompt's own tokens, without pads, in front of the image's.
        time: what its forward may call the time; a component whose forward has none of these is no denoiser.
        sample: what its forward may call the noisy image.
        identity: fields of its configuration that a bank must agree with.
    """

    lists: tuple[str, ...] = (
        *("blocks", "transformer_blocks", "single_transformer_blocks", "layers", "visual_transformer_blocks"),
        *("temporal_transformer_blocks", "joint_transformer_blocks", "noise_refiner", "context_refiner"),
    )
    noise: Callable[[Any, int], Any] = lambda t, n: t / n
    video: tuple[int, int, int] = (2, 3, 4)
    text_first: bool = True
    drops_pads: bool = False
    time: tuple[str, ...] = ("timestep", "timesteps", "t")
    sample: tuple[str, ...] = ("sample", "hidden_states", "x")
    identity: tuple[str, ...] = (
        *("in_channels", "out_channels", "num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim"),
        *("cross_attention_dim", "block_out_channels", "layers_per_block", "patch_size", "joint_attention_dim"),
    )


GIVEN_NOISE = Denoiser(noise=lambda t, _: t)
"""Its time is the noise level itself."""
GIVEN_IMAGE = Denoiser(noise=lambda t, _: 1 - t)
"""Its time is the share of the image."""
DENOISERS = {
    "AuraFlowTransformer2DModel": GIVEN_NOISE,
    "BriaTransformer2DModel": GIVEN_NOISE,
    "ChromaTransformer2DModel": GIVEN_NOISE,
    "CogVideoXTransformer3DModel": Denoiser(video=(1, 3, 4)),
    "Flux2Transformer2DModel": GIVEN_NOISE,
    "FluxTransformer2DModel": GIVEN_NOISE,
    "HunyuanImageTransformer2DModel": replace(GIVEN_NOISE, text_first=False),
    "HunyuanVideo15Transformer3DModel": Denoiser(text_first=False),
    "HunyuanVideoFramepackTransformer3DModel": Denoiser(text_first=False),
    "HunyuanVideoTransformer3DModel": Denoiser(text_first=False),
    "Kandinsky5Transformer3DModel": Denoiser(video=(1, 2, 3)),
    "Krea2Transformer2DModel": GIVEN_NOISE,
    "LongCatImageTransformer2DModel": GIVEN_NOISE,
    "Lumina2Transformer2DModel": replace(GIVEN_IMAGE, drops_pads=True),
    "LuminaNextDiT2DModel": GIVEN_IMAGE,
    "MochiTransformer3DModel": Denoiser(noise=lambda t, n: 1 - t / n),
    "MotifVideoTransformer3DModel": Denoiser(text_first=False),
    "OvisImageTransformer2DModel": GIVEN_NOISE,
    "QwenImageTransformer2DModel": GIVEN_NOISE,
    "UNetSpatioTemporalConditionModel": Denoiser(video=(1, 3, 4)),
    "ZImageTransformer2DModel": GIVEN_IMAGE,
}
"""By the class of the denoiser, or a class that it inherits from; others have the defaults."""

Halves = Mapping[int, tuple[Branch, ...]]
"""The order in which a pipeline stacks the halves of guidance in a batch, by how many it stacks."""
PERTURBED: Halves = {2: ("cond", "cond"), 3: ("uncond", "cond", "cond")}
"""With perturbed-attention guidance, in any pipeline."""
GUIDANCE: dict[str, Halves] = {}
"""The order in a loop whose source does not show it, by the name of the function: `MyPipeline.__call__`."""
