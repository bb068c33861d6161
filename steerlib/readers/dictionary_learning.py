"""dictionary_learning (Marks et al.): seven classes, each a state dict in `ae.pt` with `config.json`.

Linear layers are encoder.weight [n, D], encoder.bias [n], decoder.weight [D, n]; matrices are W_enc [D, n], W_dec [n, D]. All
classes but `AutoEncoderNew` and `JumpReluAutoEncoder` take the decoder's bias off the input. The library's own loader gives the
decoder rows of an `AutoEncoder` length 1, and so does this one, unless told not to.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders import BatchTopK, Encoder, Gated, JumpReLU, Matryoshka, ReLU, TopK
from ..errors import CorruptBank
from . import files
from .foreign import Foreign, Found, refuse

FILES = ("ae.pt", "config.json")
PLACES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}
State = Mapping[str, Any]


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str, *, normalize_decoder: bool = True) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder."""
    return Foreign(found=[_found(folder, normalize_decoder) for folder in units(path)])


def _found(folder: Path, normalize: bool) -> Found:
    trainer, state = files.settings(folder / FILES[1]).get("trainer"), files.pickled(folder / FILES[0])
    if not isinstance(trainer, dict) or not isinstance(state, dict):
        raise CorruptBank(f"expected the settings of a trainer and a state dict in {folder.name!r}")
    name = str(trainer.get("dict_class"))
    if name not in CLASSES:
        refuse(folder, f"of class {name!r}", f"there are {', '.join(CLASSES)}")
    encoder = CLASSES[name](state)
    if name == "AutoEncoder" and normalize:
        encoder = _unit_rows(encoder)
    return Found(
        encoder=encoder,
        hook=_hook(trainer),
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base=str(trainer.get("lm_name", "")),
    )


def _hook(trainer: Mapping[str, Any]) -> str:
    """The residual stream after a block, unless the submodule says otherwise."""
    name = str(trainer.get("submodule_name") or "")
    found = re.fullmatch(r"(resid_post|mlp_out|attn_out)_layer_(\d+)", name)
    if found or not name:
        place, layer = found.groups() if found else ("resid_post", trainer.get("layer"))
        return f"blocks.{layer}.{PLACES[place]}"
    return name


def _linear(state: State, bias: str) -> dict[str, Any]:
    found = {"encoder": files.part(state, "encoder.weight", 2), "decoder": files.turned(state, "decoder.weight")}
    return found | {"decoder_bias": files.part(state, bias, 1)}


def _matrices(state: State) -> dict[str, Any]:
    found = {"encoder": files.turned(state, "W_enc"), "decoder": files.part(state, "W_dec", 2)}
    return found | {"bias": files.part(state, "b_enc", 1), "decoder_bias": files.part(state, "b_dec", 1)}


def _number(state: State, name: str) -> float:
    tensor = state.get(name)
    if not isinstance(tensor, Tensor) or tensor.numel() != 1:
        raise CorruptBank(f"expected {name!r} as one number, got {tensor!r:.80}")
    return tensor.item()


def _top(state: State) -> dict[str, Any]:
    return {
        **_linear(state, "b_dec"),
        "bias": files.part(state, "encoder.bias", 1),
        "centred": True,
        "k": int(_number(state, "k")),
    }


def _auto(state: State) -> Encoder:
    return ReLU(**_linear(state, "bias"), bias=files.part(state, "encoder.bias", 1), centred=True)


def _auto_new(state: State) -> Encoder:
    return ReLU(**_linear(state, "decoder.bias"), bias=files.part(state, "encoder.bias", 1))


def _gated(state: State) -> Encoder:
    names = {"bias": "mag_bias", "gate_bias": "gate_bias", "log_scale": "r_mag"}
    own: dict[str, Any] = {ours: files.part(state, theirs, 1) for ours, theirs in names.items()}
    return Gated(**_linear(state, "decoder_bias"), **own, centred=True)


def _jump(state: State) -> Encoder:
    return JumpReLU(**_matrices(state), threshold=files.part(state, "threshold", 1))


def _top_k(state: State) -> Encoder:
    threshold = _number(state, "threshold") if "threshold" in state else -1.0
    return TopK(**_top(state), threshold=threshold if threshold >= 0 else None)  # -1: not measured


def _batch_top_k(state: State) -> Encoder:
    return BatchTopK(**_top(state), threshold=_number(state, "threshold"))


def _matryoshka(state: State) -> Encoder:
    groups, k = state.get("group_sizes"), int(_number(state, "k"))
    if not isinstance(groups, Tensor) or groups.ndim != 1 or groups.is_floating_point():
        raise CorruptBank(f"expected 'group_sizes' as whole numbers, got {groups!r:.80}")
    return Matryoshka(**_matrices(state), groups=groups.tolist(), k=k, threshold=_number(state, "threshold"), centred=True)


CLASSES: dict[str, Callable[[State], Encoder]] = {
    "AutoEncoder": _auto,
    "AutoEncoderNew": _auto_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jump,
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
}


def _unit_rows(encoder: Encoder) -> Encoder:
    """The same code, counted in decoder rows of length 1."""
    tensors = encoder.to_tensors()
    length = tensors["decoder"].norm(dim=-1)
    if torch.allclose(length, torch.ones_like(length)):
        return encoder
    tensors |= {"decoder": tensors["decoder"] / length[:, None], "bias": tensors["bias"] * length}
    return type(encoder).from_tensors({**tensors, "encoder": tensors["encoder"] * length[:, None]}, encoder.settings)
