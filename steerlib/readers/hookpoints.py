"""Where other libraries say an encoder belongs, in our names of sites.

TransformerLens names tensors (`blocks.5.hook_resid_post`), others the paths of modules, from the model or from its body
(`model.layers.5.output`, `layers.5.mlp`, `h.5`). A path that is none of these stays as it is.
"""

import re

from ..errors import CorruptBank, UnknownSite

TENSOR = re.compile(r"blocks\.(\d+)\.(.+)")
TENSORS = {
    "hook_resid_post": "",
    "hook_resid_pre": ".in",
    "hook_mlp_out": ".mlp",
    "hook_attn_out": ".attn",
    "mlp.hook_in": ".mlp.in",
    "attn.hook_z": ".attn.heads",
}
"""Of TransformerLens, those that are a site."""
MODULE = re.compile(r"(?:model\.|gpt_neox\.|transformer\.)?(?:layers|h)\.(\d+)(?:\.(.+?))??(\.output|\.input)?")
MODULES = {
    (None, "output"): "",
    (None, "input"): ".in",
    ("mlp", "output"): ".mlp",
    ("mlp", "input"): ".mlp.in",
    ("self_attn", "output"): ".attn",
    ("attn", "output"): ".attn",
    ("attention", "output"): ".attn",
    ("self_attn.o_proj", "input"): ".attn.heads",
    ("pre_feedforward_layernorm", "output"): ".mlp.in",
    ("post_feedforward_layernorm", "output"): ".mlp",
}
EMBEDDINGS = re.compile(r"hook_embed|(model\.|gpt_neox\.|transformer\.)?(embed_tokens|embed_in|wte)")


def site(hook: str) -> str:
    """Our name of a hook point."""
    if not re.fullmatch(r"[\w.:$#-]{1,200}", hook, re.ASCII):
        raise CorruptBank(f"expected the name of a hook point, got {hook!r:.80}; give site=")
    if EMBEDDINGS.fullmatch(hook):
        return "embed"
    if found := TENSOR.fullmatch(hook):
        return _of_tensor(hook, *found.groups())
    if found := MODULE.fullmatch(hook):
        block, module, side = found.groups(default=None)
        if (known := MODULES.get((module, (side or ".output")[1:]))) is not None:
            return f"layers.{block}{known}"
    return re.sub(r"\.input$", ".in", hook.removesuffix(".output"))


def _of_tensor(hook: str, block: str, tensor: str) -> str:
    whole, _, head = tensor.partition("#")
    if whole in TENSORS and (not head or whole == "attn.hook_z"):
        return f"layers.{block}{TENSORS[whole]}" + (f".{head}" if head else "")
    if tensor in ("ln2.hook_normalized", "hook_mlp_in"):
        raise UnknownSite(
            f"{hook!r} is what a block's feed-forward part is given before its norm's weights are applied, which no module of "
            f"transformers gives; where those weights are 1 or folded in, give reads='layers.{block}.mlp.in'"
        )
    raise UnknownSite(f"{hook!r} has no name here; give site=, a named site or the path of a module that gives this tensor")


def tensor(site: str) -> str:
    """The TransformerLens name of one of our sites; other sites keep their name."""
    names = {ending: name for name, ending in TENSORS.items()}
    found = re.fullmatch(r"layers\.(\d+)(.*)", site)
    if found and found[2] in names:
        return f"blocks.{found[1]}.{names[found[2]]}"
    return "hook_embed" if site == "embed" else site
