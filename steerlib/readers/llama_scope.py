"""Llama Scope (He et al. 2024, 2410.20526): `hyperparams.json` with `checkpoints/final.safetensors`, untested on releases.

encoder.weight [n, D], encoder.bias [n], decoder.weight [D, n], decoder.bias [D]. With s = root(D) / mean length of activations
on each side, weights were trained on x s; as its own library does for inference, b_enc and b_dec are divided by s_in and s_out
and the decoder multiplied by s_in / s_out, so that latents count in the model's own units. Where the cost of latents counted
what they write (`sparsity_include_decoder_norm`, the default), decoder rows then get length 1 and latents their lengths;
`jump_relu_threshold` holds for these. (SAELens keeps latents in units of training.)
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders import Encoder, JumpReLU, ReLU, Transcoder
from ..errors import CorruptBank
from . import files
from .foreign import Foreign, Found, refuse
from .table import Table

FILES = ("hyperparams.json", "checkpoints/final.safetensors")
SETTINGS = Table(
    read="""hook_point_in hook_point_out use_decoder_bias apply_decoder_bias_to_pre_encoder d_model d_sae act_fn
        jump_relu_threshold norm_activation dataset_average_activation_norm sparsity_include_decoder_norm""",
    aside="""device seed dtype expansion_factor bias_init_method decoder_bias_init_method geometric_median_max_iter
        decoder_exactly_fixed_norm decoder_exactly_unit_norm init_decoder_norm init_encoder_norm
        init_encoder_with_decoder_transpose lp l1_coefficient l1_coefficient_warmup_steps top_k initial_k k_warmup_steps
        use_batch_norm_mse use_ghost_grads tp_size ddp_size sae_pretrained_name_or_path strict_loading""",
    only={"use_glu_encoder": (False, None)},
)
TENSORS = Table(read="encoder.weight encoder.bias decoder.weight decoder.bias")


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str, *, ignore: Iterable[str] = ()) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder. `ignore` names settings that this reader does not know and that readings do not depend on."""
    return Foreign(found=[_found(folder, tuple(ignore)) for folder in units(path)])


def _found(folder: Path, ignore: tuple[str, ...]) -> Found:
    params = files.settings(folder / FILES[0])
    SETTINGS.check(folder, params, ignore)
    jumps = params.get("act_fn") == "jumprelu" or params.get("act_fn") == "topk" and bool(params.get("jump_relu_threshold"))
    if params.get("act_fn") != "relu" and not jumps:
        refuse(folder, f"of activation {params.get('act_fn')!r:.40}", "read those with ReLU or a jump_relu_threshold")
    hook = str(params.get("hook_point_in", ""))
    out = str(params.get("hook_point_out") or hook)
    found, transcodes = _weights(folder, params, ignore), out != hook
    return Found(
        encoder=_encoder(found, params, jumps, transcodes),
        hook=out,
        reads=hook if transcodes else "",
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base="meta-llama/Llama-3.1-8B",
    )


def _weights(folder: Path, params: Mapping[str, Any], ignore: tuple[str, ...]) -> dict[str, Any]:
    """As the library computes with them: without scales of training, in decoder rows of length 1."""
    tensors = files.safetensors(folder / FILES[1])
    TENSORS.check_tensors(folder, tensors, ignore)
    files.check_sides(folder, tensors, "encoder.weight", (params.get("d_sae"), params.get("d_model")))
    found = _unscaled(folder, params, tensors)
    if not params.get("sparsity_include_decoder_norm", True):
        return found
    length = found["decoder"].float().norm(dim=-1)
    changed: dict[str, Tensor] = {"decoder": found["decoder"].float() / length[:, None], "bias": found["bias"] * length}
    return {**found, **changed, "encoder": found["encoder"].float() * length[:, None]}


def _unscaled(folder: Path, params: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"encoder": files.part(tensors, "encoder.weight", 2)}
    found |= {"bias": files.part(tensors, "encoder.bias", 1), "decoder": files.turned(tensors, "decoder.weight")}
    if params.get("use_decoder_bias", True):
        found["decoder_bias"] = files.part(tensors, "decoder.bias", 1)
        found["centred"] = bool(params.get("apply_decoder_bias_to_pre_encoder", True))
    norm = params.get("norm_activation")
    if norm == "dataset-wise":
        return _standardised(found, params.get("dataset_average_activation_norm"))
    if norm == "token-wise":
        return {**found, "norm": "length"}
    if norm not in ("inference", "none"):
        refuse(folder, f"normalised {norm!r}", "read encoders normalised by dataset or by token")
    return found


def _standardised(found: Mapping[str, Any], lengths: Any) -> dict[str, Any]:
    if not isinstance(lengths, dict) or not all(
        isinstance(lengths.get(s), int | float) and lengths[s] > 0 for s in ("in", "out")
    ):
        raise CorruptBank(f"expected the mean lengths of activations 'in' and 'out', got {lengths!r:.80}")
    s_in, s_out = (found["encoder"].shape[1] ** 0.5 / lengths[side] for side in ("in", "out"))
    changed: dict[str, Tensor] = {"bias": found["bias"] / s_in, "decoder": found["decoder"] * s_in / s_out}
    if "decoder_bias" in found:
        changed["decoder_bias"] = found["decoder_bias"] / s_out
    return {**found, **changed}


def _encoder(found: dict[str, Any], params: Mapping[str, Any], jumps: bool, transcodes: bool) -> Encoder:
    value = params.get("jump_relu_threshold", 0.0) if jumps else 0.0
    if not isinstance(value, int | float):
        raise CorruptBank(f"expected 'jump_relu_threshold' as a number, got {value!r:.80}")
    threshold = torch.full((len(found["encoder"]),), float(value))
    if transcodes:
        return Transcoder(**found, threshold=threshold)
    return JumpReLU(**found, threshold=threshold) if jumps else ReLU(**found)
