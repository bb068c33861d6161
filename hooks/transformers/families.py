"""What differs between families of transformers models. A family that needs special care is one entry in `FAMILIES`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from steerlib.passes import Branch
from steerlib.sites import Layout

from ..modules import entry_of


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cannot be read off a block. Paths start at the block; None means: find it, and "": the block has none.

    Args:
        attn: path of the module that attends.
        mlp: path of the module that feeds forward.
        layout: axis order of what flows between blocks.
        stream: whether `[B, N, D]` flows between blocks; if not, blocks have no name, and a user names a module inside.
        tokens: whether what flows are the tokens given, with nothing before, after or beside them; if not, nothing has a name.
        copies: field of the configuration that counts copies of the residual stream, where they lie side by side in one tensor.
        norm: beside the blocks, the norm after the last one.
        masked: whether the stack is given the padding mask; if not, only the model that calls it is.
        within: of a stack, path of the `ModuleList` that holds its blocks, where several could.
        needs: fields of the configuration and the values without which this entry does not hold, and nothing has a name.
        blocks: the `ModuleList` whose elements give the residual stream, where there are no blocks as such; `attn` and `mlp`
            are lists then, too.
    """

    attn: str | None = None
    mlp: str | None = None
    layout: Layout = "BND"
    stream: bool = True
    tokens: bool = True
    copies: str | None = None
    norm: str | None = None
    masked: bool = True
    within: str | None = None
    needs: tuple[tuple[str, Any], ...] = ()
    blocks: str | None = None


XLM = Family(blocks="layer_norm2", attn="attentions", mlp="ffns", needs=(("pre_norm", False),))
FAMILIES = {
    # the residual is added inside a module whose arguments do not show it
    "XLNetLayer": Family(attn="", mlp="ff.layer_2", layout="NBD"),
    "ZambaHybridLayer": Family(attn="mamba_decoder.mamba", mlp=""),
    "Zamba2HybridLayer": Family(attn="mamba_decoder.mamba", mlp=""),
    # rows and tokens are one axis there
    "Llama4TextDecoderLayer": Family(mlp=""),
    "OPTDecoderLayer": Family(mlp=""),
    # several streams side by side
    "DeepseekV4DecoderLayer": Family(stream=False),
    "Gemma3nTextDecoderLayer": Family(stream=False),
    "HYV4DecoderLayer": Family(stream=False),
    "Qwen4ExpTextDecoderLayer": Family(copies="hc_count"),
    # tokens before, beside and after those given
    "CpmAntTransformerBlock": Family(tokens=False),
    "ProphetNetDecoderLayer": Family(tokens=False),
    "ReformerLayer": Family(tokens=False),
    # a norm that the embeddings, or every round of a loop, pass through too
    "HrmTextModel": Family(norm="", within="L_module.layers"),
    "NanoChatModel": Family(norm=""),
    # only the model is given the padding mask
    "RwkvModel": Family(masked=False),
    # no blocks as such
    "FlaubertModel": XLM,
    "XLMModel": XLM,
    # blocks of pictures beside those of text
    "IdeficsModel": Family(within="layers"),
    # several axes of tokens
    "PatchTSMixerLayer": Family(layout="B...D"),
    "PatchTSTEncoderLayer": Family(layout="B...D"),
    "Sam3ViTLayer": Family(layout="B...D"),
    "SamHQVisionLayer": Family(layout="B...D"),
    "SamVisionLayer": Family(layout="B...D"),
    # channels first
    "SegformerStage": Family(layout="BDN"),
    "SwiftFormerStage": Family(layout="BDN"),
    "VitDetLayer": Family(layout="BDN"),
    "SqueezeBertModel": Family(layout="BDN", within="encoder.layers"),
    # rows second
    "FSMTDecoder": Family(layout="NBD"),
    "FSMTEncoder": Family(layout="NBD"),
}
"""By the class of the block, or of the stack, or of a class that it inherits from."""


@dataclass(frozen=True)
class Stacked:
    """A model whose `generate()` stacks both halves of guidance in the batch.

    Args:
        when: whether it does, by what the call was asked for.
        branches: the halves, in their order.
        encoder: whether the encoder's rows are stacked too.
    """

    when: Callable[[dict[str, Any]], bool] = lambda asked: False  # noqa: ARG005
    branches: tuple[Branch, ...] = ("cond", "uncond")
    encoder: bool = False


ABOVE_1 = Stacked(lambda asked: (asked.get("guidance_scale") or 1) > 1)
STACKED = {
    "DiaForConditionalGeneration": Stacked(lambda asked: asked.get("guidance_scale") not in (None, 1), encoder=True),
    "JanusForConditionalGeneration": Stacked(lambda asked: asked.get("generation_mode") == "image"),
    "MusicgenForCausalLM": ABOVE_1,
    "MusicgenForConditionalGeneration": ABOVE_1,
    "MusicgenMelodyForCausalLM": ABOVE_1,
    "MusicgenMelodyForConditionalGeneration": ABOVE_1,
}
"""By the class of the model, or of one that it inherits from."""

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
MIXERS = ("linear_attn", "mlstm_layer", "temporal_block", "mixer", "mamba", "conv")
"""What stands where attention stands elsewhere; it has no heads that are slices of a projection's input."""
CHILDREN = {
    "attn": (*ATTENTION, *MIXERS),
    "mlp": ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp", "mlp_block", "ff", "fc2", "output"),
}
AFTER = {
    "attn": ("attn_sconv", "post_attention_convolution", "post_self_attn_layernorm", "post_norm1", "post_operator_norm")
    + ("post_attention_layernorm",),
    "mlp": ("mlp_sconv", "post_mlp_convolution", "post_mlp_layernorm", "post_norm2", "post_ffn_norm")
    + ("post_feedforward_layernorm",),
}
"""A norm or a convolution after a part, where a block has one after both: what it gives joins the residual stream."""
PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "out_lin", "resid_proj")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
TOKENS = ("input_ids", "decoder_input_ids", "inputs_embeds")
"""Main inputs of models that read text; towers for pictures or sound have others."""
OTHER = ("pixel_values", "input_features", "input_values", "image", "audio", "video", "flattened_patches", "grid_thw")
"""How the arguments of models that also read pictures or sound begin."""


def family(module: nn.Module) -> Family:
    """What is special about a block or a stack."""
    return entry_of(FAMILIES, module, Family())
