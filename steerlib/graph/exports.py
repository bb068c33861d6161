"""A bank's graph in the formats of others: circuit-tracer's JSON, and GraphML for NetworkX, Gephi or Cytoscape."""

import json
import re
from dataclasses import asdict
from graphlib import CycleError, TopologicalSorter
from typing import Any
from xml.etree import ElementTree as xml

from ..bank.concept_bank import ConceptBank
from ..errors import BadBank
from .causal_graph import Edge


def joined(bank: ConceptBank) -> list[str]:
    """Names of the concepts that the graph joins, in the order of the bank."""
    if not len(bank.graph):
        raise BadBank(
            f"bank {bank.name!r} has no graph: no concept of it is known to move another; for encoders, a [graph] table in the "
            "recipe finds one"
        )
    ends = {end for edge in bank.graph.edges for end in (edge.src, edge.dst)}
    return [name for name in bank.concepts if name in ends]


def levels(bank: ConceptBank) -> list[str]:
    """Encoders of the concepts that the graph joins, causes first; where that decides nothing, as their names count."""
    level = {end: bank[end].encoder for edge in bank.graph.edges for end in (edge.src, edge.dst)}
    before: dict[str, set[str]] = {name: set() for name in sorted(set(level.values()), key=_counted)}
    for edge in bank.graph.edges:
        first, second = (edge.src, edge.dst) if edge.relation != "selection" else (edge.dst, edge.src)
        before[level[second]] |= {level[first]} - {level[second]}
    order, sorter = [], TopologicalSorter(before)
    try:
        sorter.prepare()
    except CycleError:
        return list(before)
    while sorter.is_active():
        ready = sorted(sorter.get_ready(), key=_counted)
        order += ready
        sorter.done(*ready)
    return order


def _counted(name: str) -> list[Any]:
    """Sorts `layers.10` after `layers.3`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def circuit_tracer(bank: ConceptBank) -> str:
    """The graph as JSON of circuit-tracer (schema 1) and the viewers that read its files: features, without a prompt."""
    order, names = levels(bank), joined(bank)
    place = {name: (order.index(bank[name].encoder), bank[name].index) for name in names}
    ids = {name: f"{level}_{index}_0" for name, (level, index) in place.items()}
    made = {
        "metadata": {
            "slug": bank.name,
            "scan": bank.base.id or bank.name,
            "prompt": "",
            "prompt_tokens": [""],
            "schema_version": 1,
            "info": {"generator": {"name": "steerlib"}, "levels": order},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_feature(name, bank[name].label, ids[name], *place[name]) for name in names],
        "links": [{"source": ids[edge.src], "target": ids[edge.dst], **_known(edge)} for edge in bank.graph.edges],
    }
    return json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _feature(name: str, label: str, id: str, level: int, index: int) -> dict[str, Any]:
    return {
        "node_id": id,
        "feature": (level + index) * (level + index + 1) // 2 + index,  # Cantor's pairing of layer and feature
        "layer": str(level),
        "ctx_idx": 0,
        "feature_type": "cross layer transcoder",
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{level}_{index}-0",
        "clerp": f"{name}: {label}" if label else name,
    }


def _known(edge: Edge) -> dict[str, Any]:
    """What is known of an edge beside its ends."""
    return {key: value for key, value in asdict(edge).items() if value is not None and key not in ("src", "dst")}


def graphml(bank: ConceptBank) -> str:
    """The graph as GraphML (Brandes et al. 2002), with all that is known of an edge."""
    root = xml.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
    graph, kinds = xml.Element("graph", id=bank.name, edgedefault="directed"), dict[tuple[str, str], str]()

    def add(tag: str, ends: dict[str, str], facts: dict[str, Any]) -> None:
        made = xml.SubElement(graph, tag, ends)
        for key, value in facts.items():
            kinds[tag, key] = {str: "string", int: "long", float: "double", bool: "boolean"}[type(value)]
            xml.SubElement(made, "data", key=f"{tag}.{key}").text = (
                str(value).lower() if isinstance(value, bool) else str(value)
            )

    for concept in map(bank.__getitem__, joined(bank)):
        facts = {"label": concept.label, "level": concept.encoder, "index": concept.index, "unit": concept.unit}
        add("node", {"id": concept.name}, facts)
    for edge in bank.graph.edges:
        add("edge", {"source": edge.src, "target": edge.dst}, _known(edge))
    for (owner, key), kind in sorted(kinds.items()):
        xml.SubElement(root, "key", {"id": f"{owner}.{key}", "for": owner, "attr.name": key, "attr.type": kind})
    root.append(graph)
    xml.indent(root)
    return xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
