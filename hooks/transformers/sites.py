"""Where the named sites of a transformers model are, found from the model itself.

It follows from how transformers builds its models: blocks in one `ModuleList`, an attention and a feed-forward part in each.
What cannot be found that way is in `families.py`.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from types import NoneType
from typing import Any

from torch import nn

from steerlib.sites import Layout, Site

from ..attach import modules_on
from ..modules import arguments, layout_of, taken_by
from .families import AFTER, CHILDREN, HEADS, MIXERS, OTHER, PROJECTION, TOKENS, family

PARTS = ("in", "heads", "attn", "mlp.in", "mlp", "update", "out")
"""Of a block, in the order in which it runs them."""
PART, HEAD = r"(?P<part>in|attn|mlp\.in|mlp|update)", r"(?P<head>\.heads(\.\d+)?)"
IN_BLOCK = re.compile(rf"(encoder\.|decoder\.)?layers\.(?P<block>\d+)(\.{PART})?{HEAD}?")


def is_block(name: str) -> bool:
    """Whether a name is that of a block or of a part of one."""
    return IN_BLOCK.fullmatch(name) is not None


@dataclass(frozen=True)
class Stack:
    """A decoder or an encoder: the module that is called with tokens, its blocks, and the modules whose call shows where a
    pass stands, from the inside out; the outermost that is called counts."""

    prefix: str
    path: str
    blocks: tuple[str, ...]
    clocks: tuple[str, ...]
    layout: Layout


def stacks(model: Any) -> tuple[Stack, ...]:
    """The text stacks of a model: one, or `encoder.` and `decoder.`."""
    names = {module: name for name, module in model.named_modules()}
    both = getattr(model.config, "is_encoder_decoder", False)
    parts = {"encoder.": model.get_encoder(), "decoder.": model.get_decoder()} if both else {"": _decoder(model)}
    found = []
    for prefix, part in parts.items():
        if part is not None and (blocks := _blocks(part)) and family(blocks[0]).tokens:
            clocks = dict.fromkeys((names[part],) if prefix else (names[part], names[_caller(model, part)]))
            paths = tuple(names[block] for block in blocks)
            axes: Layout = next((f.layout for m in (blocks[0], part) if (f := family(m)).layout != "BND"), "BND")
            found.append(Stack(prefix, names[part], paths, tuple(clocks), axes))
    return tuple(found)


def _caller(model: Any, part: nn.Module) -> nn.Module:
    """What is given the padding mask itself: a body of text and pictures makes another mask for what it calls."""
    if not family(part).masked:
        return model
    body = model.base_model
    return body if {"input_ids", "attention_mask"} <= {*arguments(body)} else part


def _decoder(model: Any) -> nn.Module:
    """What decodes: transformers' own answer if that takes tokens, else the body, under whatever name."""
    named = [model.base_model]
    with suppress(AttributeError, NotImplementedError):
        named.insert(0, model.get_decoder())
    own = not any("." not in name for name in lists_of_blocks(model)) and [*model.children()]
    for candidates in (named, own or []):
        bodies = (m for m in candidates if m is not model and "input_ids" in arguments(m) and hasattr(m, "config"))
        if (found := [part for part in bodies if _blocks(part)]) and (candidates is named or len(found) == 1):
            return found[0]
    return model


def _blocks(stack: Any) -> list[nn.Module]:
    """The blocks whose outputs are the residual stream: the one list of layers that can be checkpointed, else of as many
    modules as the configuration has layers; if there are several, the one that the stack holds itself, else none."""
    special, config = family(stack), getattr(stack, "config", None)
    if any(getattr(config, field, value) != value for field, value in special.needs):
        return []
    if (given := special.blocks or special.within) is not None:
        return list(stack.get_submodule(given))
    outer, depth = lists_of_blocks(stack), _first(_config(stack), "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    kinds = {name: {cls.__name__ for cls in type(blocks[0]).__mro__} for name, blocks in outer.items()}
    lists = [name for name in outer if "GradientCheckpointingLayer" in kinds[name]]
    is_marked = bool(lists)
    lists = lists or [name for name, blocks in outer.items() if len(blocks) == depth or config is None]
    if len(lists if is_marked else outer) > 1:
        lists = [name for name in lists if "." not in name]
    return outer[lists[0]] if len(lists) == 1 else []


def lists_of_blocks(stack: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost lists of modules that project, by path: no convolutions that stand before a stack; in what reads text, none
    of a part that does not."""
    inner = dict(stack.named_modules())
    lists = {name: list(m) for name, m in inner.items() if isinstance(m, nn.ModuleList) and len(m)}
    towers = [name for name, m in inner.items() if name and reads(m) is False] if reads(stack) is not False else []
    within = tuple(f"{name}." for name in (*lists, *towers))
    return {n: b for n, b in lists.items() if not n.startswith(within) and any(b[0].children()) and _projects(b[0])}


def _projects(block: nn.Module) -> bool:
    return any(_first(module, "in_features", "nx") is not None for module in block.modules())


def reads(module: nn.Module) -> bool | None:
    """Whether a module is given a text's tokens, or (False) pictures or sound; None where its arguments do not tell."""
    return _reads(type(module).forward, getattr(module, "main_input_name", None))


@lru_cache(4096)
def _reads(forward: Callable[..., Any], main: str | None) -> bool | None:
    given = taken_by(forward)
    if {"input_ids", "decoder_input_ids"} & {*given}:
        return True
    if any(name.startswith(OTHER) for name in given) or (main in given and main not in TOKENS):
        return False
    return True if main in TOKENS and "inputs_embeds" in given else None


def _config(part: Any) -> Any:
    """The configuration of a stack's text; None where it has none of its own."""
    return part.config.get_text_config(decoder=True) if hasattr(part, "config") else None


def _first(source: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(source, name, None)) is not None), None)


def named_sites(model: nn.Module) -> dict[str, Site]:
    """Every named site: `layers.3`, its `.in`, `.update`, `.attn`, `.mlp`, `.attn.heads.2`, `embed`, `norm`, with a prefix."""
    sites: dict[str, Site] = {}
    found = stacks(model)
    for stack in found:
        for i in range(len(stack.blocks)):
            sites |= _block_sites(model, stack, i)
        if (norm := _final_norm(model, stack)) is not None:
            sites[f"{stack.prefix}norm"] = Site(name=f"{stack.prefix}norm", module=norm, layout=found[0].layout)
    axes: Layout = "NBD" if found and family(model.get_submodule(found[0].blocks[0])).layout == "NBD" else "BND"
    return sites | {name: Site(name=name, module=path, layout=axes) for name, path in _embeddings(model, found).items()}


def _embeddings(model: Any, found: tuple[Stack, ...]) -> dict[str, str]:
    """Paths of the token embeddings: one for all stacks that read tokens, or each its own."""
    names = {module: name for name, module in model.named_modules()}
    parts: dict[str, Any] = {stack.prefix: model.get_submodule(stack.path) for stack in found}
    own: dict[str, Any] = {}
    for prefix, part in parts.items():
        with suppress(AttributeError, NotImplementedError):  # parts that do not say which they are
            own |= {f"{prefix}embed": part.get_input_embeddings()} if "input_ids" in arguments(part) else {}
    paths = {name: names[m] for name, m in own.items() if m in names and not isinstance(m, nn.ModuleList)}
    return {"embed": min(paths.values())} if len({*paths.values()}) == 1 else paths


def _block_sites(model: Any, stack: Stack, i: int) -> dict[str, Site]:
    path, name, at = stack.blocks[i], f"{stack.prefix}layers.{i}", partial(Site, layout=stack.layout)
    block, beside = model.get_submodule(path), family(model.get_submodule(stack.path))
    if beside.blocks is None:
        special, start = family(block), path
        parts = {part: _part(block, part, getattr(special, part)) for part in CHILDREN}
        added = {part: f"{path}.{_added(block, part, where)}" for part, where in parts.items() if where}
        attends, feeds = (f"{path}.{parts[part]}" if parts[part] else None for part in CHILDREN)
    else:  # the i-th block is the i-th element of several lists
        special = beside
        added = {part: f"{stack.path}.{getattr(special, part)}.{i}".strip(".") for part in CHILDREN}
        start, attends, feeds = added["attn"], added["attn"], None
    sites = [at(name=name, module=path), at(name=f"{name}.in", module=start, side="input")] if special.stream else []
    if special.stream and start == path:
        sites.append(at(name=f"{name}.update", module=path, side="update"))
    sites += [at(name=f"{name}.{part}", module=where) for part, where in added.items()]
    if feeds is not None:
        sites.append(at(name=f"{name}.mlp.in", module=feeds, side="input"))
    if attends is not None:
        sites += _heads(model.get_submodule(attends), attends, name, _config(model.get_submodule(stack.path)))
    return {site.name: site for site in sites}


def _part(block: nn.Module, part: str, given: str | None) -> str | None:
    """The path, inside a block, of the module that attends or feeds forward."""
    if given is not None:
        return given or None
    children = dict(block.named_children())
    if isinstance(sublayers := children.get("layer"), nn.ModuleList):  # as in T5: each computes, and adds
        at = 0 if part == "attn" else len(sublayers) - 1
        return next((f"layer.{at}.{name}" for name, _ in sublayers[at].named_children()), None)
    return next((name for name in CHILDREN[part] if not isinstance(children.get(name), NoneType | nn.ModuleList)), None)


def _added(block: nn.Module, part: str, where: str) -> str:
    """The path, inside a block, of what joins the residual stream: what comes after a part; where the part is handed the
    residual and adds it inside, its last projection; else the part itself."""
    inner = dict(block.named_modules())
    if any(name in inner for name in AFTER["mlp"]):
        return next((name for name in AFTER[part] if name in inner), where)
    for path in (where, f"{where}.output"):
        if path in inner and {"residual", "input_tensor"} & {*arguments(inner[path])}:
            projections = [name for name, m in inner[path].named_children() if hasattr(m, "in_features")]
            return f"{path}.{projections[-1]}" if projections else where
    return where


def _heads(attention: nn.Module, path: str, name: str, config: Any) -> list[Site]:
    """All heads together, the output projection's input, and each, a slice of it."""
    if path.rpartition(".")[2] in MIXERS:
        return []
    inner = dict(attention.named_modules())
    projections = [where for where in inner if where.rpartition(".")[2].lower() in PROJECTION]
    where, width = next(((w, n) for w in projections if (n := _first(inner[w], "in_features", "nx"))), ("", 0))
    given = next((n for module in inner.values() if isinstance(n := _first(module, *HEADS), int)), None)
    size = getattr(attention, "head_dim", None)
    count = given or (width // size if size else _first(config, *HEADS)) or 1
    size, rest = divmod(width, count)
    if not width or rest:
        return []
    at = partial(Site, module=f"{path}.{where}", side="input")
    heads = [at(name=f"{name}.attn.heads.{h}", columns=(h * size, (h + 1) * size)) for h in range(count)]
    return [at(name=f"{name}.attn.heads"), *heads]


def _final_norm(model: nn.Module, stack: Stack) -> str | None:
    """Beside the blocks, the first norm after them, else the last before; never that of an embedding."""
    if (given := family(model.get_submodule(stack.path)).norm) is not None:
        return f"{stack.path}.{given}".strip(".") if given else None
    holder, _, blocks = stack.blocks[-1].rpartition(".")[0].rpartition(".")
    children = dict(model.get_submodule(holder).named_children())
    norms = [n for n, m in children.items() if "norm" in type(m).__name__.lower() and not n.endswith(("emb", "embedding"))]
    after = [*children][[*children].index(blocks) :]
    chosen = next((name for name in norms if name in after), norms[-1] if norms else None)
    return None if chosen is None else f"{holder}.{chosen}".strip(".")


def stream_width(model: nn.Module, site: Site, found: tuple[Stack, ...]) -> int | None:
    """Width of the residual stream at a block, and of what its parts add to it."""
    stack = next(stack for stack in found if site.name.startswith(f"{stack.prefix}layers."))
    config, copies = _config(model.get_submodule(stack.path)), family(model.get_submodule(site.module)).copies
    width = getattr(config, "hidden_size", None)
    return width if width is None or copies is None else width * getattr(config, copies)


def order(site: Site, found: tuple[Stack, ...], count: int) -> tuple[int, ...]:
    """By stack, by block, and inside a block from its input over heads, attention and feed-forward to its output; `count` is
    at least that of the blocks."""
    stack, inside = int(site.name.startswith("decoder.")), IN_BLOCK.fullmatch(site.name)
    if inside is not None:
        part = "heads" if inside["head"] else inside["part"] or "out"
        return stack, int(inside["block"]), PARTS.index(part)
    for s, known in enumerate(found):
        for block, path in enumerate(known.blocks):
            if site.module.startswith(path + "."):  # some module inside a block, named by its path
                return s, block, PARTS.index("mlp")
    return stack, count if site.name.endswith("norm") else -1, 0


def reads_text(model: nn.Module, path: str) -> bool:
    """Whether the innermost part on a path whose arguments tell is given tokens of text."""
    return next((known for m in reversed(modules_on(model, path)) if (known := reads(m)) is not None), False)


def is_fed_tokens(model: Any, path: str, found: tuple[Stack, ...]) -> bool:
    """Whether a text's tokens flow at a path, in a model that also reads pictures or sound: in its blocks and its head."""
    if any(path.startswith(f"{block}.") for stack in found for block in stack.blocks):
        return True
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None and modules_on(model, path)[-1] is head


def tower(model: nn.Module, path: str) -> str | None:
    """Path of the innermost part around a place whose arguments tell what it is given, if that is no text."""
    steps, inside = path.split("."), modules_on(model, path)
    at = next((n for n in reversed(range(len(inside))) if reads(inside[n]) is not None), 0)
    return None if reads(inside[at]) is not False else ".".join(steps[:at])


def axes_at(model: nn.Module, path: str, side: str, found: tuple[Stack, ...]) -> Layout:
    """Axes at a place that has no name: by torch's own classes; in a tower that packs its rows, none of rows; inside a stack
    as between its blocks."""
    inside, own = modules_on(model, path), layout_of(modules_on(model, path)[-1], side)
    if own in ("BDN", "NBD"):
        return own
    if not reads_text(model, path) and any("cu_seqlens" in arguments(module) for module in inside):
        return "ND"
    around = next((stack.layout for stack in found if path.startswith(f"{stack.path}.") or not stack.path), None)
    return around if around == "NBD" else own if own == "B...D" else around or "?"
