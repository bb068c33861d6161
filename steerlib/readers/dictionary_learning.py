"""dictionary_learning (Marks et al.): seven classes, each a state dict in `ae.pt` with `config.json`.

Linear layers are encoder.weight [n, D], encoder.bias [n], decoder.weight [D, n]; matrices are W_enc [D, n], W_dec [n, D]. All
classes but `AutoEncoderNew` and `JumpReluAutoEncoder` take the decoder's bias off the input. The library's own loader gives the
decoder rows of an `AutoEncoder` length 1, and so does this one, unless told not to.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders import BatchTopK, Encoder, Gated, JumpReLU, Matryoshka, ReLU, TopK
from ..errors import CorruptBank
from . import files
from .foreign import Foreign, Found, refuse
from .table import Table

FILES = ("ae.pt", "config.json")
PLACES = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}
INPUTS = {"resid_post": "hook_resid_pre", "mlp_out": "mlp.hook_in", "attn_out": "attn.hook_in"}
SETTINGS = Table(
    read="dict_class layer lm_name submodule_name k activation_dim dict_size",
    aside="""trainer_class lr steps auxk_alpha warmup_steps decay_start threshold_beta threshold_start_step top_k_aux seed
        device wandb_name sparsity_function sparsity_penalty p_start p_end anneal_start sparsity_queue_length n_sparsity_updates
        resample_steps sparsity_warmup_steps l1_penalty bandwidth target_l0 group_fractions group_weights group_sizes
        norm_factor k_anneal_steps""",
    only={"apply_b_dec_to_input": (False, None)},
)
"""`norm_factor` was multiplied into the biases when they were saved."""
BUFFER = Table(
    read="io",
    aside="d_submodule n_ctxs ctx_len refresh_batch_size out_batch_size device",
    only={"layer": (None,)},
)
"""Where activations come from; one with a layer of its own splits them by head."""
State = Mapping[str, Any]


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(
    path: Path,
    title: str,  # noqa: ARG001
    *,
    normalize_decoder: bool = True,
    ignore: Iterable[str] = (),
) -> Foreign:
    """Every encoder in a folder. `ignore` names settings that this reader does not know and that readings do not depend on."""
    return Foreign(found=[_found(folder, normalize_decoder, tuple(ignore)) for folder in units(path)])


def _found(folder: Path, normalize: bool, ignore: tuple[str, ...]) -> Found:
    config, state = files.settings(folder / FILES[1]), files.pickled(folder / FILES[0])
    trainer, buffer = config.get("trainer"), config.get("buffer") or {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict) or not isinstance(state, dict):
        raise CorruptBank(f"expected the settings of a trainer and a state dict in {folder.name!r}")
    name = str(trainer.get("dict_class"))
    if name not in CLASSES:
        refuse(folder, f"of class {name!r}", f"there are {', '.join(CLASSES)}")
    Table(read="trainer buffer").check(folder, config, ignore)
    SETTINGS.check(folder, trainer, ignore)
    BUFFER.check(folder, buffer, ignore, "in its buffer")
    TENSORS[name].check_tensors(folder, state, ignore)
    encoder = CLASSES[name](state)
    _check_sizes(folder, trainer, encoder)
    if name == "AutoEncoder" and normalize:
        encoder = _unit_rows(encoder)
    return Found(
        encoder=encoder,
        hook=_hook(folder, trainer, buffer.get("io", "out")),
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base=str(trainer.get("lm_name", "")),
    )


def _check_sizes(folder: Path, trainer: Mapping[str, Any], encoder: Any) -> None:
    """Raise where the trainer's settings deny the tensors."""
    found = {"dict_size": len(encoder.encoder), "activation_dim": encoder.encoder.shape[1], "k": getattr(encoder, "k", None)}
    if wrong := [key for key, value in found.items() if value is not None and trainer.get(key) not in (None, value)]:
        raise CorruptBank(f"config.json of {folder.name!r} says {', '.join(wrong)} other than its tensors, which have {found}")


def _hook(folder: Path, trainer: Mapping[str, Any], side: str) -> str:
    """The residual stream after a block, unless the submodule says otherwise; `side` of the module is "in" or "out"."""
    name = str(trainer.get("submodule_name") or "")
    if side not in ("in", "out"):
        refuse(folder, f"of a buffer of {side!r:.40}", "what is read and written at one side, 'in' or 'out', is read")
    found = re.fullmatch(r"(resid_post|mlp_out|attn_out)_layer_(\d+)", name)
    if not found and name:
        return f"{name}.input" if side == "in" else name
    place, layer = found.groups() if found else ("resid_post", trainer.get("layer"))
    if side == "in":
        return f"blocks.{layer}.{INPUTS[place]}"
    return f"blocks.{layer}.{PLACES[place]}"


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
LINEAR, MATRICES = "encoder.weight encoder.bias decoder.weight", "W_enc W_dec b_enc b_dec"
TENSORS = {
    "AutoEncoder": Table(read=f"{LINEAR} bias"),
    "AutoEncoderNew": Table(read=f"{LINEAR} decoder.bias"),
    "GatedAutoEncoder": Table(read="encoder.weight decoder.weight mag_bias gate_bias r_mag decoder_bias"),
    "JumpReluAutoEncoder": Table(read=f"{MATRICES} threshold"),
    "AutoEncoderTopK": Table(read=f"{LINEAR} b_dec k threshold"),
    "BatchTopKSAE": Table(read=f"{LINEAR} b_dec k threshold"),
    "MatryoshkaBatchTopKSAE": Table(read=f"{MATRICES} k threshold group_sizes"),
}


def _unit_rows(encoder: Encoder) -> Encoder:
    """The same code, counted in decoder rows of length 1."""
    tensors = encoder.to_tensors()
    length = tensors["decoder"].norm(dim=-1)
    if torch.allclose(length, torch.ones_like(length)):
        return encoder
    tensors |= {"decoder": tensors["decoder"] / length[:, None], "bias": tensors["bias"] * length}
    return type(encoder).from_tensors({**tensors, "encoder": tensors["encoder"] * length[:, None]}, encoder.settings)
