"""What a file gives, as the fields of a dataclass: unknown, missing and mistyped ones are refused by name."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from math import isfinite
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..errors import BadRecipe

WORDS: dict[Any, str] = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Mapping: "a table"}
"""Types of fields, as errors call them."""
NAMES = "expected at least one concept, or instead at least one encoder, or contexts, each name once"
UNSAID = ("folder", "texts")
"""Fields that no file gives."""


def made_of(cls: Any, values: Any, where: str) -> Any:
    """A dataclass from the fields that a file gives, arrays as tuples.

    A table whose default is a dataclass itself gives some of its fields; the others stay as they are.

    Raises `BadRecipe` for a field that is unknown, missing, or not of the type that the class says; `where` names the place.
    """
    if not isinstance(values, Mapping):
        raise BadRecipe(f"{where}: expected fields of a {cls.__name__}, got {values!r:.80}")
    known = {f.name: f for f in fields(cls) if f.name not in UNSAID}
    check_known(values, known, cls.__name__, where)
    needed = [name for name, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise BadRecipe(f"{where}: expected {' and '.join(missing)}, which a {cls.__name__} cannot do without; got none")
    types = get_type_hints(cls)
    given = {
        key: {**vars(known[key].default), **value} if is_dataclass(known[key].default) and isinstance(value, Mapping) else value
        for key, value in values.items()
    }
    return cls(**{key: value_as(types[key], value, f"{where}, {key}") for key, value in given.items()})


def check_known(values: Iterable[str], known: Iterable[str], what: str, where: str) -> None:
    """Raise `BadRecipe` for names of fields that are not known, with those that they resemble."""
    names = sorted(known)
    if not (unknown := sorted({*values} - {*names})):
        return
    near = {key: found[0] for key in unknown if (found := get_close_matches(key, names, n=1))}
    meant = "".join(f"; for {key} did you mean {name!r}?" for key, name in near.items())
    raise BadRecipe(f"{where}: unknown fields {', '.join(unknown)}; known to a {what} are {', '.join(names)}{meant}")


def check_types(made: Any, where: str) -> None:
    """Raise `BadRecipe` where a field of a dataclass that was made in Python is not of the type that its class says."""
    types = get_type_hints(type(made))
    for f in fields(made):
        if f.name not in UNSAID:
            value_as(types[f.name], getattr(made, f.name), f"{where}, {f.name}")


def value_as(kind: Any, value: Any, where: str) -> Any:
    """A value of a file as a field of this type; raises `BadRecipe` for one of another type."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is UnionType:
        known = [part for part in parts if part is not NoneType]
        meant = str if str in known and isinstance(value, str) else known[0]
        return value if value is None and NoneType in parts else value_as(meant, value, where)
    if origin is tuple:
        return _entries(parts[0], value, where)
    if origin is Literal:
        if value not in parts:
            raise BadRecipe(f"{where}: expected {' or '.join(map(repr, parts))}, got {value!r:.80}")
        return value
    if is_dataclass(kind):
        if type(value) is kind:
            check_types(value, where)
            return value
        return getattr(kind, "from_dict", lambda *given: made_of(kind, *given))(value, where)
    if not _is_a(origin or kind, value):
        raise BadRecipe(f"{where}: expected {WORDS[origin or kind]}, got {value!r:.80}")
    return value


def _is_a(kind: Any, value: Any) -> bool:
    """Whether a value is of a plain type: a whole number is a number too, and true is none."""
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool) and isfinite(value)
    return isinstance(value, kind)


def _entries(kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    """The entries of a list; a table is named by its `name`, in quotes, or by its number."""
    if not isinstance(value, (list, tuple)):
        key, single = where.rpartition(", ")[2], WORDS.get(kind, "")
        said = f"[[{key}]] before the fields of each" if not single else f"a list, each {single}, as in {key} = [ … ]"
        raise BadRecipe(f"{where}: expected {said}, got {value!r:.80}")
    names = [entry.get("name") if isinstance(entry, Mapping) else None for entry in value]
    places = [f"{where} {name!r}" if name and isinstance(name, str) else f"{where} {i}" for i, name in enumerate(names, 1)]
    return tuple(value_as(kind, entry, place) for entry, place in zip(value, places, strict=True))


def is_blank(texts: str | Sequence[str]) -> bool:
    """Whether a text, or one of several, is empty."""
    return any(not text.strip() for text in ([texts] if isinstance(texts, str) else texts))


def check_file_name(name: str, what: str) -> None:
    """Raise `BadRecipe` for a name that could not become that of a file."""
    if not name.strip() or not name.isprintable() or len(name) > 100 or name.startswith(".") or {*name} & {*"/\\"}:
        raise BadRecipe(
            f"expected a {what} of 1 to 100 printable letters, without slashes or a dot in front, got {name!r:.120}"
        )


def check_names(names: Sequence[str]) -> None:
    """Raise `BadRecipe` where there is none, or one stands twice."""
    if not names or len({*names}) < len(names):
        raise BadRecipe(NAMES)
