"""A bank's graph as one page that opens from disk, without a network: levels as columns, effects as lines."""

import json
from base64 import b64encode
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from ..bank.card import THUMBNAIL
from ..bank.concept_bank import ConceptBank
from .exports import joined, levels

MARK = "/*graph*/"


def page(bank: ConceptBank) -> str:
    """The page as HTML. What the maker of a bank wrote is text in it, never markup; raises `BadBank` without a graph."""
    text = json.dumps(facts(bank), sort_keys=True, ensure_ascii=False, allow_nan=False)
    frame = (files("steerlib.graph") / "page.html").read_text(encoding="utf-8")
    return frame.replace(MARK, text.replace("<", "\\u003c"))


def facts(bank: ConceptBank) -> dict[str, Any]:
    """What the page shows."""
    shown = ("name", "index", "label", "source", "unit", "range", "useful", "examples")
    concepts = [
        {
            **{key: getattr(concept, key) for key in shown},
            "level": concept.encoder,
            "tokens": [str(token) for token in concept.effects.get("promotes", ())],
            "picture": b64encode(bank.pictures.get(THUMBNAIL.format(concept.name), b"")).decode(),
        }
        for concept in map(bank.__getitem__, joined(bank))
    ]
    edges = [asdict(edge) for edge in bank.graph.edges if edge.relation != "total"]  # these are drawn by the edges they sum up
    return {"name": bank.name, "base": bank.base.id, "levels": levels(bank), "concepts": concepts, "edges": edges}
