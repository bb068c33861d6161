"""Steering of lm-eval's `steered` model: a CSV whose rows name latents of sparsify or SAELens encoders, or a `.pt` of vectors.

`add` adds coefficient times the vector; `clamp` makes <x - bias, u> equal the coefficient, with u the vector at length 1.
Units are such that `edits(bank)` does what lm-eval does.
"""

import csv
import io
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bank.concept_bank import ConceptBank
from ..bank.concepts import Concept
from ..encoders import Directions, Sparse
from ..errors import BadBank, CorruptBank
from ..steering.interventions import Add, Intervention, Set
from . import files, saelens, sparsify
from .foreign import Foreign, Found, refuse

FILES = (".csv", ".pt", ".pth")
LOADERS = {"sparsify": sparsify, "sae_lens": saelens}
COLUMNS = {"loader", "action", "sparse_model", "hookpoint", "feature_index", "steering_coefficient"}


class Step(NamedTuple):
    """One row."""

    name: str
    hook: str
    action: str
    coefficient: float
    vector: Tensor
    bias: Tensor | None
    label: str = ""


def units(path: Path) -> list[Path]:
    """The file itself, if it looks like one of lm-eval's."""
    if path.suffix == ".csv" and path.is_file():
        columns = next(csv.reader(io.StringIO(files.text(path))), [])
        return [path] if COLUMNS.issubset(columns) else []
    return [path] if path.suffix in (".pt", ".pth") and path.is_file() and path.name not in ("ae.pt", "state_dict.pth") else []


def read(path: Path, title: str, *, models: Mapping[str, str | Path] | None = None) -> Foreign:  # noqa: ARG001
    """A concept for each row. `models` says where what `sparse_model` names lies, if not in that folder or Hub repository."""
    steps = _of_csv(path, models or {}) if path.suffix == ".csv" else _of_vectors(path)
    by_hook: dict[str, list[Step]] = {}
    for step in steps:
        by_hook.setdefault(step.hook, []).append(step)
    found = [Found(encoder=_directions(some), hook=hook, source=_source(some)) for hook, some in by_hook.items()]
    return Foreign(found=found, concepts=[_concept(step, i) for some in by_hook.values() for i, step in enumerate(some)])


def edits(bank: ConceptBank) -> dict[str, Intervention]:
    """What lm-eval does with a bank read from its files."""
    found: dict[str, Intervention] = {}
    for source in bank.provenance.get("encoders", {}).values():
        for name, (action, value) in source["actions"].items():
            found[name] = Set(value) if action == "clamp" else Add(value)
    return found


def _of_csv(path: Path, models: Mapping[str, str | Path]) -> list[Step]:
    cache: dict[tuple[str, str], Found] = {}
    steps = []
    for row in csv.DictReader(io.StringIO(files.text(path))):
        if row["loader"] not in LOADERS:
            raise CorruptBank(f"expected a loader, one of {', '.join(LOADERS)}, got {row['loader']!r}")
        if row.get("head_index"):
            refuse(path, "made for a head", "name the site of a head, layers.N.attn.heads.H, by hand")
        key = row["sparse_model"], row["hookpoint"] if row["loader"] == "sparsify" else row.get("sae_id") or ""
        if key not in cache:
            cache[key] = _encoder(LOADERS[row["loader"]], *key, models)
        encoder, index = cache[key].encoder, _index(row["feature_index"])
        assert isinstance(encoder, Sparse)
        if index >= len(encoder.decoder):
            raise CorruptBank(f"{path.name} names latent {index} of {len(encoder.decoder)} in {key[0]!r}")
        hook = row["hookpoint"] or cache[key].hook
        steps.append(_step(f"{hook}:{index}", hook, row, encoder.decoder[index].float(), encoder.decoder_bias))
    return steps


def _encoder(loader: Any, model: str, folder: str, models: Mapping[str, str | Path]) -> Found:
    try:
        path = files.resolve(models.get(model, model), loader.FILES, folder=folder)
    except BadBank as error:
        raise BadBank(f"lm-eval's file names {model!r}; say where it lies, models={{{model!r}: folder}}: {error}") from None
    found = loader.read(path, model).found
    if len(found) != 1:
        raise BadBank(f"expected one encoder in {folder!r} of {model!r}, got {len(found)}")
    return found[0]


def _index(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise CorruptBank(f"expected 'feature_index' as a whole number, got {text!r:.80}")
    return int(text)


def _of_vectors(path: Path) -> list[Step]:
    saved = files.pickled(path)
    if not isinstance(saved, dict) or not all(isinstance(row, dict) for row in saved.values()):
        raise CorruptBank(f"expected vectors with their actions by hook point in {path.name}")
    steps = []
    for hook, row in saved.items():
        if row.get("head_index") is not None:
            refuse(
                path, "made for activations with an axis of heads", "name the site of a head, layers.N.attn.heads.H, by hand"
            )
        bias = None if row.get("bias") is None else files.part(row, "bias", 1)
        steps.append(_step(str(hook), str(hook), row, files.part(row, "steering_vector", 1).float(), bias))
    return steps


def _step(name: str, hook: str, row: Mapping[str, Any], vector: Tensor, bias: Tensor | None) -> Step:
    try:
        coefficient = float(row.get("steering_coefficient", 1.0))
    except (TypeError, ValueError):
        coefficient = float("nan")
    action = row.get("action") or "add"
    if action not in ("add", "clamp") or not isfinite(coefficient):
        raise CorruptBank(f"expected 'add' or 'clamp' and a finite coefficient for {name!r}, got {dict(row)!r:.120}")
    return Step(name, hook, action, coefficient, vector, bias, str(row.get("description") or ""))


def _directions(steps: list[Step]) -> Directions:
    """An added vector is kept as it is; one to clamp along has length 1, and reads less what its bias reads."""
    rows = [step.vector / step.vector.norm() if step.action == "clamp" else step.vector for step in steps]
    pairs = [(row, step.bias if step.action == "clamp" else None) for row, step in zip(rows, steps, strict=True)]
    means = [torch.zeros(()) if bias is None else row @ bias.float() for row, bias in pairs]
    return Directions(torch.stack(rows), torch.stack(means))


def _concept(step: Step, index: int) -> Concept:
    return Concept(name=step.name, encoder=step.hook, index=index, unit=abs(step.coefficient) or 1.0, label=step.label)


def _source(steps: list[Step]) -> dict[str, Any]:
    sign = {step.name: (step.coefficient > 0) - (step.coefficient < 0) for step in steps}
    return {"actions": {step.name: [step.action, sign[step.name]] for step in steps}}
