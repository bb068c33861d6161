"""Where the named sites of a transformers model are, found from the model itself.

A family that needs special care is one entry in `FAMILIES`; everything else follows from how transformers builds its
models: blocks in one `ModuleList`, an attention and a feed-forward part in each.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from steerlib.sites import Layout, Site


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cannot be read off a block; paths start at the block, and None means: find it."""

    attn: str | None = None
    mlp: str | None = None
    layout: Layout = "BND"
    blocks: str | None = None
    """The `ModuleList` whose elements give the residual stream, where there are no blocks as such."""


FAMILIES = {
    "T5Block": Family(attn="layer.0.SelfAttention", mlp="layer.-1.DenseReluDense"),
    "MT5Block": Family(attn="layer.0.SelfAttention", mlp="layer.-1.DenseReluDense"),
    "UMT5Block": Family(attn="layer.0.SelfAttention", mlp="layer.-1.DenseReluDense"),
    "XLNetLayer": Family(attn="rel_attn", mlp="ff", layout="NBD"),
    "XLMModel": Family(blocks="layer_norm2"),
}
"""By the class of the block, or of the stack."""

ATTENTION = ("self_attn", "attn", "attention", "self_attention", "self_attention_layer", "temporal_block", "mixer", "mamba")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "ff", "feed_forward_layer", "output")
POST_NORMS = {
    "attn": ("post_self_attn_layernorm", "post_attention_layernorm"),
    "mlp": ("post_mlp_layernorm", "post_feedforward_layernorm"),
}
"""A norm after a part, where a block has one for both: what it gives is what joins the residual stream."""
PROJECTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "o", "out_lin", "resid_proj")


@dataclass(frozen=True)
class Stack:
    """A decoder or an encoder: the module that is called with tokens, and its blocks."""

    prefix: str
    path: str
    blocks: tuple[str, ...]
    heads: int


def stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The text stacks of a model: one, or `encoder.` and `decoder.`."""
    config = model.config
    names = {id(module): name for name, module in model.named_modules()}
    if getattr(config, "is_encoder_decoder", False):
        parts = {"encoder.": model.get_encoder(), "decoder.": model.get_decoder()}
    else:
        parts = {"": _decoder(model)}
    found = []
    for prefix, part in parts.items():
        blocks = tuple(names[id(block)] for block in _blocks(part, config)) if part is not None else ()
        heads = _first(config.get_text_config(decoder=True), "num_attention_heads", "n_head", "num_heads", "n_heads") or 0
        if blocks:
            found.append(Stack(prefix, names[id(part)], blocks, heads))
    return tuple(found)


def _decoder(model: Any) -> nn.Module:
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError):
        decoder = model.base_model
    if decoder is None or decoder is model:
        decoder = model.base_model
    if decoder is model:  # a bare decoder, or one whose body hangs under another name
        inner = [child for child in model.children() if "input_ids" in _arguments(child)]
        decoder = inner[0] if inner else model
    return decoder


def _arguments(module: nn.Module) -> tuple[str, ...]:
    code = getattr(getattr(type(module).forward, "__wrapped__", type(module).forward), "__code__", None)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if code else ()


def _blocks(stack: nn.Module, config: Any) -> list[nn.Module]:
    """The blocks whose outputs are the residual stream: the outermost list of layers that can be checkpointed, else of
    as many modules as the configuration has layers."""
    if (family := FAMILIES.get(type(stack).__name__)) is not None and family.blocks is not None:
        return list(stack.get_submodule(family.blocks))
    lists = {name: list(m) for name, m in stack.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = {n: m for n, m in lists.items() if not any(n.startswith(other + ".") for other in lists if other != n)}
    for blocks in outer.values():
        if any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(blocks[0]).__mro__):
            return blocks
    depth = _first(config.get_text_config(decoder=True), "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    return next((b for b in outer.values() if len(b) == depth and any(b[0].children())), [])


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def named_sites(model: nn.Module) -> dict[str, Site]:
    """Every named site: `layers.3`, `.in`, `.attn`, `.mlp`, `.attn.heads.2`, `embed`, `norm`, with the stack's prefix."""
    sites: dict[str, Site] = {}
    for stack in stacks(model):
        for i, path in enumerate(stack.blocks):
            block, name = model.get_submodule(path), f"{stack.prefix}layers.{i}"
            family = FAMILIES.get(type(block).__name__, Family())
            sites[name] = Site(name=name, module=path, layout=family.layout)
            sites[f"{name}.in"] = Site(name=f"{name}.in", module=path, side="input", layout=family.layout)
            for part, choices in (("attn", ATTENTION), ("mlp", FEED_FORWARD)):
                if (where := _part(block, part, getattr(family, part), choices)) is not None:
                    sites[f"{name}.{part}"] = Site(name=f"{name}.{part}", module=f"{path}.{where}", layout=family.layout)
            sites |= _heads(block, path, name, stack.heads)
        if (norm := _final_norm(model.get_submodule(stack.path), stack)) is not None:
            sites[f"{stack.prefix}norm"] = Site(name=f"{stack.prefix}norm", module=norm, layout=_layout(sites))
    embed = next((n for n, m in model.named_modules() if m is model.get_input_embeddings()), None)
    if embed:
        sites["embed"] = Site(name="embed", module=embed, layout=_layout(sites))
    return sites


def _layout(sites: dict[str, Site]) -> Layout:
    return next((site.layout for site in sites.values()), "BND")


def _part(block: nn.Module, part: str, given: str | None, choices: tuple[str, ...]) -> str | None:
    """The path, inside a block, of what is added to the residual stream."""
    if given is not None:
        steps = given.split(".")
        for i, (parent, child) in enumerate(pairwise(steps)):
            if child == "-1":
                steps[i + 1] = str(len(getattr(block, parent)) - 1)
        return ".".join(steps)
    children = dict(block.named_children())
    for attn_norm, mlp_norm in zip(*POST_NORMS.values(), strict=True):
        if attn_norm in children and mlp_norm in children:
            return attn_norm if part == "attn" else mlp_norm
    return next((name for name in choices if name in children), None)


def _heads(block: nn.Module, path: str, name: str, heads: int) -> dict[str, Site]:
    """Heads are slices of the output projection's input."""
    attention = next((name for name in ATTENTION[:5] if name in dict(block.named_children())), None)
    if attention is None or not heads:
        return {}
    for where, module in block.get_submodule(attention).named_modules():
        width = getattr(module, "in_features", None) or getattr(module, "nx", None)
        if where.rpartition(".")[2] in PROJECTION and width and width % heads == 0:
            size = width // heads
            return {
                f"{name}.attn.heads.{h}": Site(
                    name=f"{name}.attn.heads.{h}",
                    module=f"{path}.{attention}.{where}",
                    side="input",
                    columns=(h * size, (h + 1) * size),
                )
                for h in range(heads)
            }
    return {}


def _final_norm(part: nn.Module, stack: Stack) -> str | None:
    """The last norm beside the blocks, if there is one."""
    holder = stack.blocks[-1].rpartition(".")[0].rpartition(".")[0]
    prefix = stack.path + "." if stack.path else ""
    inside = part.get_submodule(holder[len(prefix) :]) if holder.startswith(prefix) else part
    base = holder if inside is not part else stack.path
    norms = [n for n, m in inside.named_children() if "norm" in type(m).__name__.lower() and "embed" not in n.lower()]
    return f"{base}.{norms[-1]}".strip(".") if norms else None
