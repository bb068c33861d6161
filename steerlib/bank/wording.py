"""What a card says of concepts that are called otherwise now, are described otherwise, or are there no more.

A card is the text of its maker, so a name is changed only where it surely is one: between quotes, alone in the cell of a table
(also after `factor: `), in the metadata of what was measured. What is left to say comes as a note on top of the text.
"""

import re
from collections.abc import Collection, Mapping

from .card import FRONT, METRICS, cell

FIGURES = "|".join(METRICS)
OPEN, CLOSE = r"""["'`*|]""", r"""(?=\s*["'`*|])"""


def pattern(names: Collection[str]) -> re.Pattern[str]:
    """Where one of some names stands in a card: group 1 is what is before it, group 2 the name."""
    any_of = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    measured = rf"""(?=: (?:{FIGURES})["']|, steered by its)"""
    return re.compile(rf"""({OPEN}\s*(?:[\w-]+: )?)({any_of})(?:{CLOSE}|{measured})""")


def renamed(card: str, names: Mapping[str, str]) -> str:
    """The card with new names in the places of the old ones, which are the keys."""
    return pattern(names).sub(lambda found: found[1] + names[found[2]], card) if names else card


def without(card: str, gone: Collection[str]) -> str:
    """The card without rows of tables and figures of concepts that are there no more."""
    if not gone or not card:
        return card
    named, any_of = pattern(gone), "|".join(map(re.escape, gone))
    figures = re.compile(rf"""^ *- type: ["'](?:{any_of}): .*\n(?: +(?:value|name): .*\n)*""", re.MULTILINE)
    lines = figures.sub("", card).splitlines(keepends=True)
    left = "".join(line for line in lines if not (line.startswith("|") and named.match(line)))
    if found := {found[2] for found in named.finditer(left)}:
        shown = ", ".join(f"“{name}”" for name in sorted(found))
        left = noted(left, f"this bank does not have {shown} any more; what the text below says of it is of the bank before")
    return left


def relabelled(card: str, labels: Mapping[str, tuple[str, str]]) -> str:
    """The card with new labels in the rows of tables that describe these concepts, each with its old and its new label."""
    if not labels or not card:
        return card
    named, lines, left = pattern(labels), [], []
    for line in card.splitlines(keepends=True):
        found = named.match(line) if line.startswith("|") else None
        old, new = labels[found[2]] if found else ("", "")
        lines.append(line.replace(f"| {cell(old)} |", f"| {cell(new)} |") if old else line)
    told = "".join(lines)
    left = [name for name, (old, new) in labels.items() if len(old) > 3 and old in told and old not in new]
    if left:
        shown = ", ".join(f"“{name}”" for name in left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        told = noted(told, f"{shown} got another label; the text below may still use the old one")
    return told


def joined(card: str, other: str) -> str:
    """One card of two: the metadata of the first, the text of both."""
    found = FRONT.match(other)
    body = (other[found.end() :] if found else other).strip("\n")
    return "\n\n".join(filter(None, (card.rstrip("\n"), body))) + ("\n" if card or body else "")


def noted(card: str, text: str) -> str:
    """A card with a note between metadata and text."""
    found = FRONT.match(card)
    at = found.end() if found else 0
    return f"{card[:at]}\n> Note: {text}.\n\n{card[at:].lstrip(chr(10))}"
