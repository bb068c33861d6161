"""The folder of a bank, read and written.

README.md                    the card, with the pictures it shows
bank.json                    format, base model, sites, encoders, provenance, size and SHA-256 of every other file
bank.json.sig                a signature, if it was signed
concepts.jsonl               one line a concept
graph.safetensors            edges by line of concepts.jsonl, one entry an edge: see graph.py
sites/<encoder>.safetensors  one row per concept in each tensor
hashes.safetensors           block hashes, so that single rows can be trusted
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CorruptBank
from ..graph.causal_graph import CausalGraph
from . import trust
from .concepts import Concept
from .hub import Folder, Repository
from .manifest import Manifest

CARD, CONCEPTS, GRAPH, HASHES = "README.md", "concepts.jsonl", "graph.safetensors", "hashes.safetensors"
Home = Folder | Repository
Files = Mapping[str, Mapping[str, Any]]
"""Size, SHA-256 and hashes of groups of blocks by name, as `bank.json` has them."""


def file_of(encoder: str) -> str:
    """The file of an encoder: its id, escaped to letters that every file system takes."""
    plain = "".join(c if c.isalnum() and c.isascii() or c in "._-" else f"-{ord(c):x}-" for c in encoder)
    return f"sites/{plain}.safetensors"


def describes(name: str) -> bool:
    """Whether a file is read when a bank is opened."""
    return name in (CARD, CONCEPTS, GRAPH) or name.endswith(".png")


def read_concepts(home: Home, files: Files) -> list[Concept]:
    """The concepts a bank describes, if it describes some."""
    if CONCEPTS not in files:
        return []
    lines = home.check(CONCEPTS, files[CONCEPTS]).read_bytes().split(b"\n")
    if any(len(line) > trust.MAX_LINE for line in lines):
        raise CorruptBank(f"{CONCEPTS} has a line of more than {trust.MAX_LINE} bytes")
    return [Concept.from_dict(trust.strict_json(line, CONCEPTS)) for line in lines if line.strip()]


def read_graph(home: Home, files: Files, names: Sequence[str]) -> CausalGraph:
    """Edges name concepts by their line in `concepts.jsonl`."""
    if GRAPH not in files:
        return CausalGraph()
    home.check(GRAPH, files[GRAPH])
    file = trust.Tensors(home.read, GRAPH, files[GRAPH])
    return CausalGraph.from_tensors({column: file.all(column) for column in file.header}, names)


def read_card(home: Home, files: Files) -> str:
    """The card, if there is one."""
    if CARD not in files:
        return ""
    try:
        return home.check(CARD, files[CARD]).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptBank(f"{CARD} is not UTF-8: {error}") from None


def read_pictures(home: Home, files: Files) -> dict[str, bytes]:
    """The pictures that a card may show."""
    names = [name for name in files if name.endswith(".png")]
    if sum(files[name]["size"] for name in names) > trust.MAX_PICTURES:
        raise CorruptBank(f"expected pictures of at most {trust.MAX_PICTURES} bytes together, got more")
    return {name: home.check(name, files[name]).read_bytes() for name in names}


def write(
    folder: Path,
    manifest: Manifest,
    encoders: Iterable[tuple[str, Mapping[str, Tensor]]],
    concepts: Sequence[Concept],
    graph: CausalGraph,
    card: str,
    pictures: Mapping[str, bytes],
) -> None:
    """Same bank, same bytes; `encoders` are files with their tensors."""
    (folder / "sites").mkdir()
    hashes: dict[str, Tensor] = {}
    for file, tensors in encoders:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, folder / file)
        hashes[file] = torch.frombuffer(bytearray(trust.block_hashes(folder / file)), dtype=torch.uint8).reshape(-1, 32)
    save_file(hashes, folder / HASHES)
    lines = [
        json.dumps(c.to_dict(), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
        for c in concepts
    ]
    (folder / CONCEPTS).write_text("".join(lines), encoding="utf-8", newline="\n")
    if len(graph):
        save_file(graph.to_tensors([concept.name for concept in concepts]), folder / GRAPH)
    if card:
        (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    for name, picture in pictures.items():
        (folder / trust.checked_name(name)).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in written:
        path.chmod(0o644)  # safetensors writes for its owner alone
    files = {path.relative_to(folder).as_posix(): trust.describe(path) for path in written}
    for file, digest in hashes.items():
        files[file]["blocks"] = trust.group_hashes(digest.numpy().tobytes())
    (folder / "bank.json").write_text(replace(manifest, files=files).to_json(), encoding="utf-8", newline="\n")
