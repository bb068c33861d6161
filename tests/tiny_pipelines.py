"""Pipelines of diffusers at toy size: the library's own classes, random weights, no network.

A family is one entry of `PIPELINES`. Image `k` of a batch has a prompt and a noise of its own, both seeded by `k`: it is the
same image, but for rounding, in a batch of any size. Prompts are embeddings; `WITH_TEXT` has pipelines that read words.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

d: Any = diffusers  # whose annotations do not know that parts of a pipeline can be absent
STRENGTH = 3.0
"""Of guidance, where it is on."""
LONGEST = 7
"""Tokens of the longest prompt."""


# -- what pipelines are given ----------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sized(n: int, h: int, w: int) -> dict[str, Any]:
    return {"height": h, "width": w, "output_type": "latent"}


def filmed(n: int, h: int, w: int) -> dict[str, Any]:
    return sized(n, h, w) | {"num_frames": 9}


def unbinned(n: int, h: int, w: int) -> dict[str, Any]:
    """For pipelines that would take the nearest of their own sizes, and whose negative prompt is not None by default."""
    return sized(n, h, w) | {"use_resolution_binning": False, "negative_prompt": None}


def worded(n: int) -> dict[str, Any]:
    half = len(WORDS) // 2
    return {"prompt": [f"{WORDS[k % half]} {WORDS[half + k % half]}" for k in range(n)], "negative_prompt": ["fog"] * n}


def picture(n: int, h: int, w: int) -> Tensor:
    """Pictures to start from, between 0 and 1."""
    return torch.stack([torch.rand(3, h, w, generator=seeded(200 + k)) for k in range(n)])


def left_half(n: int, h: int, w: int) -> Tensor:
    """Masks that leave the right half as it is."""
    return (torch.arange(w) < w // 2).float().expand(n, 1, h, w)


# -- a family --------------------------------------------------------------------------------------------------


class Streams(NamedTuple):
    """Where a block that works on image and text together has which, in the tuple it gives."""

    image: int
    text: int


@dataclass(frozen=True)
class Tiny:
    """A family of pipelines at toy size."""

    name: str
    make: Callable[[], Any]
    """The pipeline, with weights from torch's global generator."""
    sites: Mapping[str, int | Streams]
    """Modules to look at, and which element of what they give is the image's; 0 also where they give one tensor."""
    prompt: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The shape of a prompt's embeddings and masks, by what the pipeline calls them."""
    scale: str | None = "guidance_scale"
    """What it calls the strength of guidance; None where there is none."""
    off: float = 1.0
    """The strength at which it runs without."""
    takes: Callable[[int, int, int], dict[str, Any]] = sized
    """What else it is given, for `n` images of `h` by `w` pixels."""
    join: Callable[[list[Tensor]], Any] = torch.stack
    """How it wants the embeddings of several prompts."""

    def build(self) -> Any:
        """The pipeline, seeded, quiet, in evaluation mode."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            pipe = self.make()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        pipe.set_progress_bar_config(disable=True)
        pipe.family = self.name
        return pipe

    def call(
        self, pipe: Any, *, batch: int = 1, steps: int = 3, guidance: bool = True, height: int = 32, width: int = 64
    ) -> dict[str, Any]:
        """Everything to give to `pipe`; with `guidance` it runs its denoiser with and without the prompt."""
        given = self.takes(batch, height, width) | self._prompts(batch)
        given |= {"num_inference_steps": steps, "generator": [seeded(k) for k in range(batch)]}
        if self.scale is not None:
            given[self.scale] = STRENGTH if guidance else self.off
        if guidance:
            given |= {f"negative_{name}": value for name, value in self._prompts(batch, first=100).items()}
        return given

    def _prompts(self, batch: int, first: int = 0) -> dict[str, Any]:
        """A batch of prompts; masks leave out the last token of every second one."""
        found: dict[str, Any] = {}
        for name, shape in self.prompt.items():
            if "mask" in name:
                found[name] = torch.stack([torch.arange(LONGEST) < LONGEST - k % 2 for k in range(batch)])
            else:
                found[name] = self.join([torch.randn(shape, generator=seeded(first + k)) for k in range(batch)])
        return found


def run(target: Any, **options: Any) -> Tensor:
    """Latents, or images where a family has none, from a pipeline or the one of this name; options are those of `call`."""
    pipe = ALL[target].build() if isinstance(target, str) else target
    return pipe(**ALL[pipe.family].call(pipe, **options), return_dict=False)[0]


# -- autoencoders and schedulers -------------------------------------------------------------------------------

FILM = {"base_dim": 8, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
FILM |= {"z_dim": 4, "latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}


def stages(n: int) -> dict[str, Any]:
    """Of an autoencoder, each but the first at half the size of the one before."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    return {"block_out_channels": (8,) * n, "norm_num_groups": 4} | kinds


def autoencoder(n: int = 2) -> Any:
    """Four channels, at half the size with two stages."""
    return d.AutoencoderKL(latent_channels=4, shift_factor=0.1, **stages(n))


def quantizer() -> Any:
    """Sixteen vectors of four channels, at half the size."""
    return d.VQModel(latent_channels=4, num_vq_embeddings=16, **stages(2))


def flow(shift: float = 3.0, **options: Any) -> Any:
    return d.FlowMatchEulerDiscreteScheduler(shift=shift, **options)


def shifting() -> Any:
    """Whose noise levels depend on the size of the image."""
    return flow(use_dynamic_shifting=True)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
"""For schedulers that can also do otherwise."""

# -- families --------------------------------------------------------------------------------------------------

UNET = {"sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
CROSS |= UNET | {"cross_attention_dim": 16, "attention_head_dim": 2}
BLOCKS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
LATENT = {"in_channels": 4, "out_channels": 4}
FLUX = BLOCKS | {"in_channels": 16, "num_single_layers": 2, "joint_attention_dim": 16}
NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}
NO_TEXTS = NO_TEXT | {"text_encoder_2": None, "tokenizer_2": None}


def ddpm() -> Any:
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = d.UNet2DModel(**UNET | kinds | {"sample_size": (8, 16), "attention_head_dim": 4})
    return d.DDPMPipeline(unet, d.DDPMScheduler())


def dit() -> Any:
    transformer = d.DiTTransformer2DModel(sample_size=8, out_channels=8, norm_num_groups=4, **BLOCKS)
    return d.DiTPipeline(transformer, autoencoder(), d.DDIMScheduler())


def sd1(pipeline: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    """A pipeline of the first generation of Stable Diffusion."""
    unsafe = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    scheduler = d.DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    given = {"vae": autoencoder(), "unet": d.UNet2DConditionModel(**CROSS), "scheduler": scheduler}
    return getattr(d, pipeline)(**given | NO_TEXT | unsafe | parts)


def sdxl() -> Any:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = d.UNet2DConditionModel(use_linear_projection=True, projection_class_embeddings_input_dim=6 * 8 + 8, **added, **CROSS)
    parts = {"unet": unet, "vae": autoencoder(), "scheduler": d.EulerDiscreteScheduler()}
    return d.StableDiffusionXLPipeline(add_watermarker=False, **parts, **NO_TEXTS)


def sd3() -> Any:
    widths = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 8}
    transformer = d.SD3Transformer2DModel(**LATENT, **BLOCKS, **widths)
    return d.StableDiffusion3Pipeline(transformer, flow(), autoencoder(), text_encoder_3=None, tokenizer_3=None, **NO_TEXTS)


def flux() -> Any:
    transformer = d.FluxTransformer2DModel(pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(2, 2, 4), **FLUX)
    return d.FluxPipeline(shifting(), autoencoder(), transformer=transformer, **NO_TEXTS)


def flux2() -> Any:
    """Klein, which has guidance; the other Flux 2 is told its strength and runs once."""
    options = {"timestep_guidance_channels": 16, "guidance_embeds": False, "axes_dims_rope": (2, 2, 2, 2)}
    transformer = d.Flux2Transformer2DModel(**FLUX, **options)
    vae = d.AutoencoderKLFlux2(latent_channels=4, **stages(2))
    return d.Flux2KleinPipeline(shifting(), vae, transformer=transformer, **NO_TEXT)


def chroma() -> Any:
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # it imports a class from where it used to be
        transformer = d.ChromaTransformer2DModel(axes_dims_rope=(2, 2, 4), **approximator, **FLUX)
    return d.ChromaPipeline(flow(), autoencoder(), transformer=transformer, **NO_TEXT)


def pixart() -> Any:
    options = {"sample_size": 8, "use_additional_conditions": False}
    transformer = d.PixArtTransformer2DModel(cross_attention_dim=16, caption_channels=16, **options, **BLOCKS)
    parts = {"transformer": transformer, "vae": autoencoder(), "scheduler": d.DPMSolverMultistepScheduler()}
    return d.PixArtSigmaPipeline(**parts, **NO_TEXT)


def sana() -> Any:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 16}
    transformer = d.SanaTransformer2DModel(sample_size=16, **LATENT, **BLOCKS, **cross)
    kinds = {"block_types": ("ResBlock", "EfficientViTBlock"), "qkv_multiscales": ((), (5,))}
    half = {"block_out_channels": (8, 8), "layers_per_block": (1, 1)} | kinds
    vae = d.AutoencoderDC(latent_channels=4, attention_head_dim=2, **twice(half, "encoder_", "decoder_"))
    return d.SanaPipeline(transformer=transformer, vae=vae, scheduler=d.DPMSolverMultistepScheduler(**FLOW), **NO_TEXT)


def qwenimage() -> Any:
    options = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 16, "axes_dims_rope": (4, 2, 2)}
    transformer = d.QwenImageTransformer2DModel(**BLOCKS, **options)
    return d.QwenImagePipeline(shifting(), d.AutoencoderKLQwenImage(**FILM), transformer=transformer, **NO_TEXT)


def wan() -> Any:
    """Version 2.2: one transformer for much noise, one for little."""
    early, late = (d.WanTransformer3DModel(text_dim=16, freq_dim=16, ffn_dim=32, **LATENT, **BLOCKS) for _ in range(2))
    parts = {"vae": d.AutoencoderKLWan(**FILM), "scheduler": d.UniPCMultistepScheduler(**FLOW)}
    return d.WanPipeline(transformer=early, transformer_2=late, boundary_ratio=0.875, **parts, **NO_TEXT)


def lumina2() -> Any:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
    transformer = d.Lumina2Transformer2DModel(
        in_channels=4, cap_feat_dim=16, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(16, 16, 16), **sizes
    )
    return d.Lumina2Pipeline(transformer, flow(6.0), autoencoder(4), **NO_TEXT)


def hunyuanvideo() -> Any:
    sizes = {"text_embed_dim": 16, "pooled_projection_dim": 8, "num_single_layers": 2, "num_refiner_layers": 1}
    transformer = d.HunyuanVideoTransformer3DModel(rope_axes_dim=(4, 2, 2), **sizes, **LATENT, **BLOCKS)
    options = {"layers_per_block": 1, "norm_num_groups": 4, "mid_block_add_attention": False}
    vae = d.AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8,) * 4, **options)
    return d.HunyuanVideoPipeline(transformer=transformer, vae=vae, scheduler=flow(7.0), **NO_TEXTS)


def ltx() -> Any:
    transformer = d.LTXVideoTransformer3DModel(cross_attention_dim=16, caption_channels=16, **LATENT, **BLOCKS)
    half = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
    vae = d.AutoencoderKLLTXVideo(latent_channels=4, patch_size=1, **twice(half, "", "decoder_"))
    return d.LTXPipeline(shifting(), vae, transformer=transformer, **NO_TEXT)


def zimage() -> Any:
    sizes = {"dim": 16, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
    transformer = d.ZImageTransformer2DModel(in_channels=4, axes_dims=[4, 2, 2], axes_lens=[64, 64, 64], **sizes)
    return d.ZImagePipeline(flow(), autoencoder(), transformer=transformer, **NO_TEXT)


def twice(options: dict[str, Any], *prefixes: str) -> dict[str, Any]:
    """The same options for both halves of an autoencoder."""
    return {f"{prefix}{name}": value for prefix in prefixes for name, value in options.items()}


EMBEDS: dict[str, tuple[int, ...]] = {"prompt_embeds": (LONGEST, 16)}
POOLED = EMBEDS | {"pooled_prompt_embeds": (8,)}
MASKED = EMBEDS | {"prompt_attention_mask": (LONGEST,)}
TEXT_FIRST, IMAGE_FIRST = Streams(1, 0), Streams(0, 1)
UNET_SITES: dict[str, int | Streams] = {"unet.mid_block.attentions.0": 0, "unet.up_blocks.1.attentions.0": 0}
BLOCK, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"

PIPELINES = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "ddpm",
            ddpm,
            {"unet.mid_block.attentions.0": 0, "unet.up_blocks.0": 0},
            scale=None,
            takes=lambda n, h, w: {"batch_size": n, "output_type": "pt"},  # its size is its own
        ),
        Tiny("dit", dit, {BLOCK: 0}, takes=lambda n, h, w: {"class_labels": list(range(n)), "output_type": "pt"}),
        Tiny("sd1", sd1, UNET_SITES, EMBEDS),
        Tiny("sdxl", sdxl, UNET_SITES, POOLED),
        Tiny("sd3", sd3, {BLOCK: TEXT_FIRST}, POOLED),
        Tiny("flux", flux, {BLOCK: TEXT_FIRST, SINGLE: TEXT_FIRST}, POOLED, scale="true_cfg_scale"),
        Tiny("flux2", flux2, {BLOCK: TEXT_FIRST, SINGLE: 0}, EMBEDS),
        Tiny("pixart", pixart, {BLOCK: 0}, MASKED, takes=unbinned),
        Tiny("sana", sana, {BLOCK: 0}, MASKED, takes=unbinned),
        Tiny("qwenimage", qwenimage, {BLOCK: TEXT_FIRST}, EMBEDS | {"prompt_embeds_mask": (LONGEST,)}, scale="true_cfg_scale"),
        Tiny("wan", wan, {"transformer.blocks.0": 0, "transformer_2.blocks.0": 0}, EMBEDS, takes=filmed),
        Tiny("lumina2", lumina2, {"transformer.noise_refiner.0": 0, "transformer.layers.0": 0}, MASKED),
        Tiny("chroma", chroma, {BLOCK: TEXT_FIRST, SINGLE: 0}, MASKED),
        Tiny(
            "hunyuanvideo",
            hunyuanvideo,
            {BLOCK: IMAGE_FIRST, SINGLE: IMAGE_FIRST},
            MASKED | POOLED,
            scale="true_cfg_scale",
            takes=filmed,
        ),
        Tiny("ltx", ltx, {BLOCK: 0}, MASKED, takes=filmed),
        Tiny("zimage", zimage, {"transformer.noise_refiner.0": 0, "transformer.layers.0": 0}, EMBEDS, off=0.0, join=list),
    )
}
"""A family by its name."""


# -- with words ------------------------------------------------------------------------------------------------

WORDS = "red old tiny blue sun cup boat bird".split()  # noqa: SIM905
"""Four adjectives and four nouns, a token each; other words are spelt."""


def toy_clip() -> dict[str, Any]:
    """A tokenizer that knows the alphabet and a few words, and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = [pair for word in WORDS for pair in _merges(word)]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *dict.fromkeys(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(tokens), len(tokens) + 1
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special: dict[str, Any] = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = CLIPTextConfig(vocab_size=len(vocab), max_position_embeddings=16, **sizes, **special)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)  # type: ignore[arg-type]
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config)}


def _merges(word: str) -> list[tuple[str, str]]:
    """How a word is put together from its letters, from the left."""
    ends = [*word[:-1], f"{word[-1]}</w>"]
    return [("".join(ends[:i]), ends[i]) for i in range(1, len(ends))]


def sd_control() -> Any:
    unet = d.UNet2DConditionModel(**CROSS)
    controlnet = d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
    return sd1("StableDiffusionControlNetPipeline", unet=unet, controlnet=controlnet, **toy_clip())


WITH_TEXT = {
    tiny.name: tiny
    for tiny in (
        Tiny("sd_with_text", lambda: sd1(**toy_clip()), UNET_SITES, takes=lambda n, h, w: sized(n, h, w) | worded(n)),
        Tiny(
            "sd_img2img",
            lambda: sd1("StableDiffusionImg2ImgPipeline", **toy_clip()),
            UNET_SITES,
            takes=lambda n, h, w: worded(n) | {"image": picture(n, h, w), "output_type": "latent"},
        ),
        Tiny(
            "sd_inpaint",
            lambda: sd1("StableDiffusionInpaintPipeline", **toy_clip()),
            UNET_SITES,
            takes=lambda n, h, w: sized(n, h, w) | worded(n) | {"image": picture(n, h, w), "mask_image": left_half(n, h, w)},
        ),
        Tiny(
            "sd_controlnet",
            sd_control,
            UNET_SITES | {"controlnet.mid_block.attentions.0": 0},
            takes=lambda n, h, w: sized(n, h, w) | worded(n) | {"image": picture(n, h, w)},
        ),
    )
}
"""Stable Diffusion of the first generation, four ways, with a tokenizer and a text encoder of its own."""

sd_with_text, sd_img2img, sd_inpaint, sd_controlnet = (tiny.build for tiny in WITH_TEXT.values())
ALL = PIPELINES | WITH_TEXT
