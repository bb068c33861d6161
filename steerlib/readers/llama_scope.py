"""Llama Scope (He et al. 2024, 2410.20526): `hyperparams.json` with `checkpoints/final.safetensors`, untested on releases.

encoder.weight [n, D], encoder.bias [n], decoder.weight [D, n], decoder.bias [D]. With s = root(D) / mean length of activations
on each side, weights were trained on x s; as its own library does for inference, b_enc and b_dec are divided by s_in and s_out
and the decoder multiplied by s_in / s_out, so that latents count in the model's own units and `jump_relu_threshold` holds as
it is. (SAELens keeps latents in units of training: s_in times these.)
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoders import Encoder, JumpReLU, ReLU, Transcoder
from ..errors import CorruptBank
from . import files
from .foreign import Foreign, Found, refuse

FILES = ("hyperparams.json", "checkpoints/final.safetensors")


def units(path: Path) -> list[Path]:
    """Folders of one encoder each."""
    return files.units(path, *FILES)


def read(path: Path, title: str) -> Foreign:  # noqa: ARG001
    """Every encoder in a folder."""
    return Foreign(found=[_found(folder) for folder in units(path)])


def _found(folder: Path) -> Found:
    params = files.settings(folder / FILES[0])
    if params.get("act_fn") not in ("relu", "jumprelu") or params.get("use_glu_encoder"):
        refuse(folder, f"of activation {params.get('act_fn')!r}, or gated by a second encoder", "read its JumpReLU encoders")
    hook = str(params.get("hook_point_in", ""))
    out = str(params.get("hook_point_out") or hook)
    found, transcodes = _weights(folder, params), out != hook
    return Found(
        encoder=_encoder(found, params, transcodes),
        hook=out,
        reads=hook if transcodes else "",
        tag=re.sub(r"[^\w.-]", "-", folder.name, flags=re.ASCII),
        base="meta-llama/Llama-3.1-8B",
    )


def _weights(folder: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    tensors = files.safetensors(folder / FILES[1])
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
    if norm != "inference":
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


def _encoder(found: dict[str, Any], params: Mapping[str, Any], transcodes: bool) -> Encoder:
    value = params.get("jump_relu_threshold", 0.0) if params["act_fn"] == "jumprelu" else 0.0
    threshold = torch.full((len(found["encoder"]),), float(value))
    if transcodes:
        return Transcoder(**found, threshold=threshold)
    return JumpReLU(**found, threshold=threshold) if params["act_fn"] == "jumprelu" else ReLU(**found)
