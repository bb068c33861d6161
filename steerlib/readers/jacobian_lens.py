"""Jacobian lenses (Gurnee et al. 2026), `…lens.pt`: a matrix J_l [D, D] a layer; untested on releases.

J_l is the mean of d h_final / d h_l, where h_final has not passed the final norm, [out, in]. The direction of a word is its row
of the unembedding less the mean row, back through the final norm, times J_l. Matrices lie in a mapping by layer, in a list, or
stacked as [L, D, D], at the top or under one of `UNDER`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bank.concepts import Concept
from ..encoders import Directions
from ..errors import BadBank, CorruptBank, WrongWidth
from ..hosts import Host, host_for
from ..vocabulary import aim_of, site_for, unembedding
from . import files
from .foreign import Foreign, Found, refuse
from .table import Table

FILES, OF, READS_MODEL = ("lens.pt",), "lm-eval", True
UNDER = ("J", "J_bar", "jacobian", "jacobians", "lens", "matrices", "state_dict")
LAYER = re.compile(r"(?:[A-Za-z_.]*[._])?(\d+)(?:\.(?:J|jacobian|weight))?")
"""A layer's key: `12`, `J_12`, `layers.12`, `layers.12.weight`."""
SETTINGS = Table(
    read="model_id model model_name d_model n_layers layers source_layers",
    aside="n_prompts n_tokens prompts dataset max_length seq_len context_length skip_first dtype seed version config metadata",
)


def units(path: Path) -> list[Path]:
    """Files of one lens each."""
    found = [path] if path.is_file() else sorted(path.rglob("*.pt")) if path.is_dir() else []
    return [file for file in found if file.name.endswith(FILES[0])]


def read(
    path: Path,
    title: str,  # noqa: ARG001
    *,
    base: Any = None,
    words: Sequence[str] = (),
    tokenizer: Any = None,
    layer: int | None = None,
    ignore: Iterable[str] = (),
) -> Foreign:
    """A concept for each word, at one layer; one unit is a vector of length 1, since a lens has no measure of amounts.

    `base` is the model itself, whose unembedding and final norm are read; `tokenizer` is by default the one that was loaded
    with it, `layer` the one that `sl.words` takes. `ignore` names fields that directions do not depend on.
    """
    if base is None or isinstance(base, str) or isinstance(words, str) or not words:
        raise BadBank("a lens names no concepts: give words=[...], and base= as the loaded model, whose unembedding is needed")
    if len(found := units(path)) > 1:
        raise BadBank(f"{path.name!r} has {len(found)} lenses; read one of them: {', '.join(file.name for file in found[:5])}")
    host = host_for(base)
    matrices, model = _lens(found[0], files.pickled(found[0]), tuple(ignore))
    site = site_for(host) if layer is None else f"layers.{layer}"
    if (matrix := matrices.get(int(site.removeprefix("layers.")))) is None:
        raise BadBank(f"{found[0].name!r} has nothing of {site}; give layer=, one of {', '.join(map(str, sorted(matrices)))}")
    rows = unembedding(host.model)[1].weight
    if len(matrix) != rows.shape[1]:
        raise WrongWidth(f"{found[0].name!r} is of width {len(matrix)}, the model of width {rows.shape[1]}")
    names = list(dict.fromkeys(" ".join(word.split()) for word in words))
    aims = [aim_of(host.tokenizer() if tokenizer is None else tokenizer, rows, name) for name in names]
    directions = before_norm(host, torch.stack(aims)).cpu() @ matrix.float()
    encoder = Directions(directions / directions.norm(dim=-1, keepdim=True))
    concepts = [Concept(name=name, encoder=site, index=k, label=f"the word “{name}”") for k, name in enumerate(names)]
    return Foreign(found=[Found(encoder=encoder, hook=site, base=model)], concepts=concepts)


def before_norm(host: Host, aims: Float[Tensor, "K D"]) -> Float[Tensor, "K D"]:
    """Gradients at the output of the final norm as gradients at its input, averaged over inputs along each axis."""
    norm = host.model.get_submodule(host.site("norm").module)
    with torch.inference_mode(False), torch.enable_grad():
        h = (torch.eye(aims.shape[1], device=aims.device) * aims.shape[1] ** 0.5).requires_grad_()
        y = norm(h)
        found = [torch.autograd.grad(y, h, aim.expand_as(y).to(y), retain_graph=True)[0].mean(0) for aim in aims]
    return torch.stack(found)


def _lens(path: Path, values: Any, ignore: tuple[str, ...]) -> tuple[dict[int, Tensor], str]:
    """The matrices by layer, and the model as the file calls it."""
    about = {key: value for key, value in values.items() if isinstance(key, str)} if isinstance(values, Mapping) else {}
    holders = [key for key in about if key in UNDER]
    if len(holders) > 1:
        refuse(path, f"a lens with matrices under {' and '.join(holders)}", "only one of them can be meant")
    found = _by_layer(path, about[holders[0]] if holders else values, about.get("layers", about.get("source_layers")))
    sides = {side for matrix in found.values() for side in matrix.shape}
    if len(sides) != 1 or about.get("d_model") not in (None, *sides):
        raise CorruptBank(f"expected matrices of sides {about.get('d_model', 'D')} in {path.name}, got sides {sorted(sides)}")
    if type(count := about.get("n_layers", max(found) + 1)) is not int or max(found) >= count:
        raise CorruptBank(f"expected layers below n_layers={count!r:.80} in {path.name}, got {max(found)}")
    known = {*holders, *(key for key in about if not holders and LAYER.fullmatch(key))}
    SETTINGS.check(path, {key: value for key, value in about.items() if key not in known}, ignore)
    return found, next((str(about[key]) for key in ("model_id", "model", "model_name") if key in about), "")


def _by_layer(path: Path, held: Any, layers: Any) -> dict[int, Tensor]:
    """Matrices by the numbers in their keys, or in the order of `layers`, by default from 0 on."""
    pairs: list[tuple[int, Any]] = []
    if isinstance(held, Mapping):
        pairs = [(int(m[1]), matrix) for key, matrix in held.items() if (m := LAYER.fullmatch(str(key)))]
    elif isinstance(held, list | tuple) or (isinstance(held, Tensor) and held.ndim == 3):
        numbers = [int(layer) for layer in layers] if isinstance(layers, list | tuple | Tensor) else range(len(held))
        if len(numbers) != len(held):
            raise CorruptBank(f"{path.name} has {len(held)} matrices and names {len(numbers)} layers")
        pairs = [*zip(numbers, held, strict=True)]
    if not pairs or len({layer for layer, _ in pairs}) < len(pairs):
        keys = ", ".join(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
        refuse(path, f"a torch file of {keys!s:.200}", "one matrix [D, D] for each layer is read")
    return {layer: files.part({str(layer): matrix}, str(layer), 2) for layer, matrix in pairs}
