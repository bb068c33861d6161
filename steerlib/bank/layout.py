"""The folder of a bank, read and written.

README.md                    the card, with the pictures it shows
bank.json                    format, base model, sites, encoders, provenance, size and SHA-256 of every other file
bank.json.sig                a signature, if it was signed
concepts.jsonl               one line a concept
anything else                a pipeline, say: listed and hashed like the rest
graph.safetensors            edges by line of concepts.jsonl, one entry an edge: see `CausalGraph`
outcomes.jsonl               one line an edge from a concept to what answers show
sites/<encoder>.safetensors  one row per concept in each tensor
hashes.safetensors           block hashes, so that single rows can be trusted
anything else                such as what `labels.safetensors` and `recipe.jsonl` keep: listed, hashed and written again

Whatever is in a folder comes and goes as the arguments of `ConceptBank`, the encoders as a `Shelf`. What `bank.json` does not
list is no part of the bank: it is neither read nor copied, and `verify` says that it is there.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import BadBank, CorruptBank
from ..graph.causal_graph import CausalGraph
from ..graph.edge import ANSWERS, Edge
from . import hub, signature, trust
from .concepts import Concept
from .consistency import check_said
from .manifest import SAID, Manifest
from .shelf import Shelf

CARD, CONCEPTS, GRAPH, OUTCOMES = "README.md", "concepts.jsonl", "graph.safetensors", "outcomes.jsonl"
Files = Mapping[str, Mapping[str, Any]]
SHAPE: dict[str, Any] = {"sort_keys": True, "ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
"""Of JSON lines: same values, same bytes."""


def read(home: hub.Home) -> dict[str, Any]:
    """What a bank is made of; reads no weights."""
    if not (home.path / "bank.json").is_file():
        raise CorruptBank(f"{home.path.name!r} is no bank: it has no bank.json")
    if (size := trust.contained(home.path, "bank.json").stat().st_size) > trust.MAX_MANIFEST:
        raise CorruptBank(f"bank.json has {size} bytes, expected at most {trust.MAX_MANIFEST}")
    said, encoders, files = Manifest.from_json((home.path / "bank.json").read_bytes())
    pictures = [name for name in files if name.endswith(".png")]
    small = {CARD, CONCEPTS, GRAPH, OUTCOMES, *pictures}
    wanted = files if sum(record["size"] for record in files.values()) <= hub.SMALL else small
    home.fetch({name: record for name, record in files.items() if name in wanted})
    own = {*small, trust.HASHES, *(facts.file for facts in encoders.values())}
    if sum(files[name]["size"] for name in pictures) > trust.MAX_PICTURES:
        raise CorruptBank(f"expected pictures of at most {trust.MAX_PICTURES} bytes together, got more")
    concepts = _concepts(_bytes(home, files, CONCEPTS))
    graph = CausalGraph()
    if GRAPH in files:
        home.check(GRAPH, files[GRAPH])
        file = trust.Tensors(home.read, GRAPH, files[GRAPH])
        columns = {column: file.all(column) for column in file.header}
        graph = CausalGraph.from_tensors(columns, [concept.name for concept in concepts])
    if answers := _lines(_bytes(home, files, OUTCOMES), OUTCOMES):
        graph = CausalGraph([*graph.edges, *(_outcome(line, {concept.name for concept in concepts}) for line in answers)])
    try:
        card = _bytes(home, files, CARD).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptBank(f"{CARD} is not UTF-8: {error}") from None
    return {
        **said,
        "concepts": concepts,
        "encoders": Shelf(encoders, home=home, records=files),
        "graph": graph,
        "card": card,
        "pictures": {name: _bytes(home, files, name) for name in pictures},
        "files": {name: hub.Filed(home, name, record) for name, record in files.items() if name not in own},
    }


def _bytes(home: hub.Home, files: Files, name: str) -> bytes:
    """A whole file, checked; nothing if the bank does not describe it."""
    return home.check(name, files[name]).read_bytes() if name in files else b""


def _concepts(text: bytes) -> list[Concept]:
    return [Concept.from_dict(line) for line in _lines(text, CONCEPTS)]


def _outcome(line: Any, names: Collection[str]) -> Edge:
    edge = Edge.from_dict(line)
    if not edge.is_outcome or edge.src not in names:
        raise CorruptBank(
            f"expected edges of {OUTCOMES} from concepts of the bank to what is called {ANSWERS}…, got {edge.src!r:.80} -> "
            f"{edge.dst!r:.80}"
        )
    return edge


def _lines(text: bytes, name: str) -> list[Any]:
    """The values of JSON lines."""
    lines = text.split(b"\n")
    if any(len(line) > trust.MAX_LINE for line in lines):
        raise CorruptBank(f"{name} has a line of more than {trust.MAX_LINE} bytes")
    return [trust.strict_json(line, name) for line in lines if line.strip()]


def write(target: Path, bank: Mapping[str, Any], key: str | PathLike[str] | None = None) -> Path:
    """Write a bank to a folder, all of it or nothing, in place of an older bank there; signed where there is a `key`."""
    if target.exists() and any(target.iterdir()) and not (target / "bank.json").is_file():
        raise BadBank(f"{target.name!r} holds other things than a bank; give a new or empty folder")
    check_said({concept.name: concept for concept in bank["concepts"]}, bank["graph"], bank["card"])
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh = Path(scratch) / target.name
        fresh.mkdir()
        fresh.chmod(0o755)
        _write(fresh, bank)
        if key is not None:
            signature.sign(fresh / "bank.json", fresh / hub.SIGNATURE, Path(key))
        if not target.exists():
            return fresh.rename(target)
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
        target.rename(old / target.name)
        fresh.rename(target)
    shutil.rmtree(old)
    return target


def _put(content: str | PathLike[str] | bytes, folder: Path, name: str) -> None:
    """Write bytes, or copy a file or all files of a folder, into that of a bank."""
    if isinstance(content, bytes):
        _room(folder, name).write_bytes(content)
        return
    place = Path(content)
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if not path.is_dir():
            own = f"{name}/{path.relative_to(place).as_posix()}" if place.is_dir() else name
            shutil.copyfile(path, _room(folder, own))


def _room(folder: Path, name: str) -> Path:
    """Where a file goes, in a folder that is there; raises `BadBank` where a bank's own file is."""
    if (target := folder / trust.checked_name(name)).exists():
        raise BadBank(f"files= names {name!r}, which every bank writes itself; give it another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _write(folder: Path, bank: Mapping[str, Any]) -> None:
    """Same bank, same bytes."""
    shelf, concepts, hashes = bank["encoders"], bank["concepts"], dict[str, Tensor]()
    (folder / "sites").mkdir()
    for id, facts in sorted(shelf.facts.items()):
        tensors = shelf.encoder(id).to_tensors()
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, folder / facts.file)
        blocks = bytearray(trust.block_hashes(folder / facts.file))
        hashes[facts.file] = torch.frombuffer(blocks, dtype=torch.uint8).reshape(-1, 32)
    save_file(hashes, folder / trust.HASHES)
    for name, values in ((CONCEPTS, concepts), (OUTCOMES, bank["graph"].answers)):
        lines = "".join(json.dumps(value.to_dict(), **SHAPE) + "\n" for value in values)
        if lines or name == CONCEPTS:
            (folder / name).write_text(lines, encoding="utf-8", newline="\n")
    if len(bank["graph"]):
        save_file(bank["graph"].to_tensors([concept.name for concept in concepts]), folder / GRAPH)
    if bank["card"]:
        (folder / CARD).write_text(bank["card"], encoding="utf-8", newline="\n")
    for name, picture in bank["pictures"].items():
        (folder / trust.checked_name(name)).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture)
    for name, place in bank["files"].items():
        _put(place, folder, name)
    written = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in written:
        path.chmod(0o644)  # safetensors writes for its owner alone
    files = {path.relative_to(folder).as_posix(): trust.describe(path) for path in written}
    for file, digest in hashes.items():
        files[file]["blocks"] = trust.group_hashes(digest.numpy().tobytes())
    text = Manifest({key: bank[key] for key in SAID}, shelf.facts, files).to_json()
    (folder / "bank.json").write_text(text, encoding="utf-8", newline="\n")
