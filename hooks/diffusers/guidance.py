"""Which half of guidance a pass computes: read from the source of the loop that makes it, and from what it passes on.

A half is known by what it reads, and that by the words which loops use for the two. Evidence that contradicts itself is none.
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from torch import Tensor

from steerlib.passes import Branch

from ..source import call_at, function_of, names_in, parameters
from .families import GUIDANCE, PERTURBED, Halves


def _words(*words: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", re.IGNORECASE)


UNWANTED = _words("neg", "negative", "uncond", "unconditional", "unconditioned", "null")
PROMPT = _words("prompt", "prompts", "cond", "conditional", "pos", "positive")
PASSED = _words(PROMPT.pattern, "hidden_states", "encoder_hidden_states")
"""What loops call what the prompt's own half is given."""
WANTED = _words(PASSED.pattern, "text")
"""The same beside its counterpart."""
BOTH = _words("cond_uncond", "uncond_cond", "pos_neg", "neg_pos")
GUIDED = "__guidance_identifier__"
"""What guiders of diffusers write on each batch of inputs: `pred_cond`, `pred_cond_skip`, `pred_uncond`."""
Kinds = frozenset[Branch]
LOOPS = (ast.For, ast.AsyncFor, ast.comprehension)


def kinds(names: Iterable[str], wanted: re.Pattern[str] = WANTED) -> Kinds:
    """The halves that some names speak of."""
    said = [name for name in names if not BOTH.search(name)]
    return frozenset(
        "uncond" if UNWANTED.search(name) else "cond" for name in said if UNWANTED.search(name) or wanted.search(name)
    )


def only(found: Kinds) -> Branch | None:
    """The one half that was found."""
    return next(iter(found)) if len(found) == 1 else None


# -- halves that are stacked ---------------------------------------------------------------------------------------


@lru_cache(256)
def stacked(code: CodeType, cls: type = object) -> Halves:
    """The order in which a function stacks the halves in a batch, by how many it stacks.

    Read where it, or a method of `cls` that it calls, joins what they read, `torch.cat([negative_prompt_embeds,
    prompt_embeds])`, and where it takes apart what comes back, `uncond, text = noise_pred.chunk(2)`.
    """
    nodes = [*ast.walk(function)] if (function := function_of(code)) else []
    orders = [order for node in nodes if (order := _joined(node) or _parted(node))]
    called = {n.func.attr for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)}
    methods = [inspect.unwrap(method) for name in sorted(called) if inspect.isfunction(method := getattr(cls, name, None))]
    inside = [inner for method in methods if (inner := function_of(method.__code__))]
    orders += [order for inner in inside for node in ast.walk(inner) if (order := _joined(node))]
    by_length = {n: _merged([order for order in orders if len(order) == n]) for n in {*map(len, orders)}}
    return {n: merged for n, merged in by_length.items() if merged}


def _merged(orders: list[tuple[Branch | None, ...]]) -> tuple[Branch, ...] | None:
    """What all orders of one length say together; None where they disagree or leave one open."""
    places = [frozenset(half for half in place if half) for place in zip(*orders, strict=True)]
    halves = [only(place) for place in places]
    if halves.count(None) == 1 and len(halves) == 2 and "uncond" in halves and not any(len(place) > 1 for place in places):
        halves = ["cond" if half is None else half for half in halves]  # the other one of two
    return None if None in halves else tuple(halves)  # type: ignore[arg-type]


def _joined(node: ast.AST) -> tuple[Branch | None, ...] | None:
    """The halves of the parts of a concatenation along rows, or of the sum of two lists."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [getattr(side, "id", "") for side in (node.left, node.right)]
        if "embeds" in sides[0] and (sides[0] in _contrasts(sides[1]) or sides[1] in _contrasts(sides[0])):
            return tuple(only(kinds([side])) for side in sides)
    if not isinstance(node, ast.Call) or not _calls(node, "cat", "concat", "concatenate"):
        return None
    if not isinstance(parts := node.args[0], (ast.List, ast.Tuple)):
        return None
    found = [only(kinds(names_in(part))) for part in parts.elts]
    return tuple(found) if "uncond" in found and len({*found}) > 1 else None  # type: ignore[return-value]


def _contrasts(name: str) -> tuple[str, ...]:
    """What the unwanted counterpart of a variable may be called."""
    return tuple(f"{word}_{name}" for word in ("negative", "neg", "uncond")) if name else ()


def _parted(node: ast.AST) -> tuple[Branch | None, ...] | None:
    """The halves by what the parts of a batch are called."""
    if not isinstance(node, ast.Assign) or not isinstance(names := node.targets[0], ast.Tuple):
        return None
    if not _calls(node.value, "chunk", "split", "tensor_split"):
        return None
    found = [only(kinds(names_in(name))) for name in names.elts]
    if len(found) > 2:  # a picture may be read with or without the prompt
        found = [
            None if re.search("image|img", ast.unparse(name)) else half for name, half in zip(names.elts, found, strict=True)
        ]
    return tuple(found) if {*found} != {None} else None  # type: ignore[return-value]


def _calls(node: ast.AST, *functions: str) -> bool:
    """Whether a node calls one of these functions of torch, or methods, along the axis of rows."""
    if (
        not isinstance(node, ast.Call)
        or not node.args
        or getattr(node.func, "attr", getattr(node.func, "id", "")) not in functions
    ):
        return False
    is_method = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") != "torch"
    place = 1 if is_method or functions[0] == "cat" else 2
    axes = [k.value for k in node.keywords if k.arg in ("dim", "axis")] or node.args[place : place + 1] or [ast.Constant(0)]
    return isinstance(axes[0], ast.Constant) and axes[0].value == 0


# -- halves that are passed one after the other --------------------------------------------------------------------


def passed(chain: Sequence[FrameType], given: Mapping[str, Any]) -> Branch | None:
    """The half whose tensors a call is given: those that the loop keeps under a name that says so."""
    found: set[Branch | None] = set()
    for value in (v for v in given.values() if isinstance(v, Tensor)):
        names = [
            name for frame in chain for name, kept in frame.f_locals.items()
            if kept is value and name not in _passing(frame.f_code, frame is chain[-1])
        ]  # fmt: skip
        found.add(only(kinds(names, PASSED)))
    return "uncond" if "uncond" in found else "cond" if "cond" in found else None


def asked(chain: Sequence[FrameType], wanted: re.Pattern[str] = PASSED, *, deep: bool = False) -> Branch | None:
    """The half that a chain of calls asks for, the innermost frame first and a method of the pipeline last.

    With `deep` a variable that says nothing is followed to what it was made of.
    """
    for frame in chain:
        call, function = call_at(frame.f_code, frame.f_lasti), function_of(frame.f_code)
        if call is None or function is None:
            continue
        silent = _silent(function, wanted, frame is chain[-1])
        values = (*call.args, *(keyword.value for keyword in call.keywords))
        given = [_said({*names_in(value)}, function, wanted, silent, deep) for value in values]
        halves = {half for found in given for half in found}
        if frame is chain[0] and not deep and "uncond" in map(only, given):  # beside sizes or places that both halves share
            return "uncond"
        if halves:
            return only(frozenset(halves))  # type: ignore[arg-type]
    return None


def _silent(function: ast.FunctionDef, wanted: re.Pattern[str], is_last: bool) -> frozenset[str]:
    """Arguments of a helper, whose names say nothing of what they are given, unless it has one for each half."""
    own = frozenset(parameters(function))
    return frozenset() if is_last or len(kinds(own, wanted)) == 2 else own


@lru_cache(256)
def _passing(code: CodeType, is_last: bool) -> frozenset[str]:
    """Variables of a function that may hold now one half and now the other."""
    if (function := function_of(code)) is None:
        return frozenset()
    loops = [node.target for node in ast.walk(function) if isinstance(node, LOOPS)]
    return _silent(function, WANTED, is_last) | {name for target in loops for name in names_in(target)}


def _said(names: set[str], function: ast.FunctionDef, wanted: re.Pattern[str], silent: frozenset[str], deep: bool) -> Kinds:
    """The halves that an argument speaks of, by the names it is made of."""
    for _ in range(6 if deep else 1):
        names = names - silent
        found = kinds(names, wanted)
        sources = {source for name in names for source in _sources(name, function, everywhere=deep and not found)} - silent
        if found:
            return found | kinds(sources, wanted)
        names = sources - names
    return frozenset()


def _sources(name: str, function: ast.FunctionDef, *, everywhere: bool) -> Iterator[str]:
    """Names that a variable is made of: those that a loop runs over, and those assigned to it in a loop, or `everywhere`."""
    for node in ast.walk(function):
        if isinstance(node, LOOPS) and name in names_in(node.target):
            for source in names_in(node.iter):
                yield from (source, *_sources(source, function, everywhere=True))
        elif isinstance(node, ast.Assign) and (everywhere or node in _repeated(function)):
            is_set = any(name in names_in(target) for target in node.targets)
            if is_set and name not in (inside := {*names_in(node.value)}) and not any(map(_joined, ast.walk(node.value))):
                yield from inside


@lru_cache(256)
def _repeated(function: ast.FunctionDef) -> frozenset[ast.AST]:
    """All that happens inside loops."""
    loops = (node for node in ast.walk(function) if isinstance(node, (ast.For, ast.While)))
    return frozenset(inner for loop in loops for inner in ast.walk(loop))


@lru_cache(256)
def speaks_of_none(code: CodeType) -> bool:
    """Whether a function names nothing that is unwanted: it has no guidance."""
    function = function_of(code)
    names = (
        [getattr(node, "id", getattr(node, "attr", getattr(node, "arg", None))) for node in ast.walk(function)]
        if function
        else ["neg"]
    )
    return "uncond" not in kinds(name for name in names if isinstance(name, str))


# -- either --------------------------------------------------------------------------------------------------------


def halves_of(
    chain: Sequence[FrameType], pipe: Any, given: Mapping[str, Any], copies: int, *, is_first: bool
) -> tuple[Branch, ...] | None:
    """The halves of guidance in a pass, one for each copy of the rows; None where nothing shows them.

    Args:
        chain: the calls that lead to the denoiser, the innermost first, the pipeline's own last.
        pipe: the pipeline.
        given: what the denoiser is given.
        copies: how often the images lie in the batch.
        is_first: whether nothing was called before with the same latents.
    """
    if getattr(pipe, "guider", None) is not None:
        told = [t for frame in chain for v in frame.f_locals.values() if isinstance(t := getattr(v, GUIDED, None), str)]
        return ("cond" if told[0].startswith("pred_cond") else "uncond",) * copies if told else None
    if copies == 1:
        half = passed(chain, given) or asked(chain)
        codes = [frame.f_code for frame in chain]
        if half is None and is_first and (any(stacked(code, type(pipe)) for code in codes) or all(map(speaks_of_none, codes))):
            half = "cond"  # guidance is off, or there is none
        return (half,) if half else None
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        return PERTURBED.get(copies)
    orders = {GUIDANCE.get(frame.f_code.co_qualname, stacked(frame.f_code, type(pipe))).get(copies) for frame in chain} - {None}
    return orders.pop() if len(orders) == 1 else None
