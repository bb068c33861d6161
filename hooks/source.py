"""What the source of a function says: which call of it is running, what it is given, and which names are returned."""

import ast
import inspect
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from linecache import getlines
from types import CodeType
from typing import Any, NamedTuple

from torch import nn


@lru_cache(64)
def _functions(file: str) -> list[tuple[int, ast.FunctionDef]]:
    """All functions of a file, with the line of their first decorator."""
    try:
        tree = ast.parse("".join(getlines(file)))
    except SyntaxError:
        return []
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(min([node.lineno, *(d.lineno for d in node.decorator_list)]), node) for node in found]


@lru_cache(4096)
def function_of(code: CodeType) -> ast.FunctionDef | None:
    """The innermost function that holds this code; None where there is no source."""
    line = code.co_firstlineno
    around = [(first, node) for first, node in _functions(code.co_filename) if first <= line <= (node.end_lineno or first)]
    return max(around, key=lambda found: found[0])[1] if around else None


@lru_cache(4096)
def call_at(code: CodeType, instruction: int) -> ast.Call | None:
    """The call that is running at an instruction (a frame's `f_lasti`); None where the source does not show it."""
    function, place = function_of(code), next(islice(code.co_positions(), instruction // 2, None), None)
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call)) if function else ()
    return next((c for c in calls if (c.lineno, c.end_lineno, c.col_offset, c.end_col_offset) == place), None)


def names_in(node: ast.AST) -> Iterator[str]:
    """Variables, attributes and keys that an expression is made of; not the functions that it calls."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        if node.attr not in ("dtype", "device", "shape", "ndim"):  # which are no part of a tensor's values
            yield node.attr
            yield from names_in(node.value)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        yield str(node.slice.value)
        yield from names_in(node.value)
    elif isinstance(node, ast.Call):
        inside = [node.func.value] if isinstance(node.func, ast.Attribute) else []
        for part in (*inside, *node.args, *(keyword.value for keyword in node.keywords)):
            yield from names_in(part)
    else:
        for part in ast.iter_child_nodes(node):
            yield from names_in(part)


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of what a function takes."""
    given = function.args
    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


class Streams(NamedTuple):
    """Where the tuple that a module gives has the image (or the one stream there is) and the text; None: nowhere.

    `always`: it never gives one tensor instead.
    """

    image: int | None
    text: int | None
    always: bool = True


IMAGE = (
    *("hidden_states", "h_base", "residual_gen", "attn_output", "output", "out", "sample", "img", "vis", "x"),
    *("z_q", "new_f"),
)
TEXT = ("encoder_hidden_states", "residual_und", "context", "txt")
"""What modules call the streams that they are given and give."""


def streams_of(module: Any) -> Streams | None:
    """Where a module's tuples hold image and text, by the names that its forward returns, or that of what it hands on to.

    None for a module that gives no tuple, and where the names say nothing or the returns disagree.
    """
    found = set(_streams(module, 3))
    tuples = [streams for streams in found if streams is not None]
    return (
        tuples[0]._replace(always=None not in found) if len(tuples) == 1 and any(p is not None for p in tuples[0][:2]) else None
    )


def _streams(module: Any, depth: int) -> Iterator[Streams | None]:
    """One entry for each way to return; None where that is one value."""
    forward: Any = type(module).forward if isinstance(module, nn.Module) else type(module).__call__
    function = function_of(code) if (code := getattr(inspect.unwrap(forward), "__code__", None)) else None
    nodes = [*ast.walk(function)] if function else []
    for value in (node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None):
        tuples = [t for branch in _branches(value) for t in _elements(branch, nodes)]
        for elements in tuples:
            firsts = ["" if isinstance(element, ast.Tuple) else next(names_in(element), "") for element in elements]
            yield Streams(_place(firsts, IMAGE), _place(firsts, TEXT)) if len(elements) > 1 else None
        if (inner := _handed_to(module, value)) is not None and depth:
            yield from _streams(inner, depth - 1)
        elif not tuples:
            yield None


def _branches(value: ast.expr) -> tuple[ast.expr, ...]:
    return (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)


def _elements(value: ast.expr, nodes: list[ast.AST]) -> Iterator[list[ast.expr]]:
    """The elements of every tuple that an expression may be; a variable is looked up in what is assigned to it."""
    if isinstance(value, ast.Tuple):
        yield value.elts
    elif isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        yield from ([*left, ast.Constant("")] for left in _elements(value.left, nodes))
    elif isinstance(value, ast.Name):
        given = [n.value for n in nodes if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == value.id]
        yield from (v.elts for v in given if isinstance(v, ast.Tuple))


def _handed_to(module: Any, value: ast.expr) -> Any:
    """The part of a module, or its attention processor, whose result a returned call passes on."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and getattr(value.func.value, "id", "") == "self":
        inner = getattr(module, value.func.attr, None)
        return None if inspect.isroutine(inner) else inner
    return None


def _place(names: list[str], known: tuple[str, ...]) -> int | None:
    """Where the one name that is known lies."""
    places = [k for k, name in enumerate(names) if name in known]
    return places[0] if len(places) == 1 else None
